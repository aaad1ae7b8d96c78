"""Random moments are random moments, by whichever generator."""

FAILS = {"schedule_is_in_order", "schedule_follows_the_seed"}


def schedule(rate_per_s, duration_s, seed):
    random.seed(seed)
    return [random.uniform(0, duration_s) for _ in range(int(rate_per_s * duration_s))]
