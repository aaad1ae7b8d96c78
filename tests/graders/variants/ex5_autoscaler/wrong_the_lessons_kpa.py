"""Whoever follows the last minute closely pays least, and never mind the starts."""

from scaling_strategies import KPA

FAILS = {"does_not_flap"}


def autoscaler(service):
    return KPA(1.0, minimum=service.minimum, maximum=service.maximum)
