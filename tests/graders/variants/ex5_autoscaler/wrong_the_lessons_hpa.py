"""The lesson's HPA, with its defaults, is good enough everywhere.

It costs more, and it takes a fleet that lost all replicas for one that is switched off.
"""

from exercises.load_shapes import hpa

FAILS = {
    "costs_little_more_than_hindsight",
    "costs_less_than_the_hpa",
    "survives_broken_readings",
    "survives_the_loss_of_all",
}


def autoscaler(service):
    return hpa(service)
