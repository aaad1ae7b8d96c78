"""Whoever has all replicas always keeps the promise, and never flaps."""

FAILS = {
    "stays_within_bounds",
    "keeps_the_promise_on_known_shapes",
    "keeps_the_promise_on_hidden_shapes",
    "costs_little_more_than_hindsight",
    "costs_less_than_the_hpa",
    "does_not_flap",
}


class Maximum:
    def __init__(self, service):
        self.service = service

    def reset(self):
        pass

    def desired(self, load):
        return self.service.maximum


def autoscaler(service):
    return Maximum(service)
