"""The lesson's HPA, with its defaults, is good enough everywhere."""

from exercises.load_shapes import hpa

FAILS = {"costs_little_more_than_hindsight", "costs_less_than_the_hpa"}


def autoscaler(service):
    return hpa(service)
