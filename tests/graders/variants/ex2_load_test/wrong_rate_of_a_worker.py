"""The rate is for all four workers together, so each gets a quarter of it."""

FAILS = {"schedule_has_the_rate"}


def schedule(rate_per_s, duration_s, seed, whole=schedule):
    return whole(rate_per_s / 4, duration_s, seed)
