"""Ten a second means one each 0.1 s."""

FAILS = {"schedule_is_poisson", "schedule_follows_the_seed"}


def schedule(rate_per_s, duration_s, seed):
    return [i / rate_per_s for i in range(int(rate_per_s * duration_s))]
