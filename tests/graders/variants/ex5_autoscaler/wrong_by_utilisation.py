"""Busy replicas say how many are needed: a queue is no reading of theirs."""

FAILS = {"keeps_the_promise_on_hidden_shapes", "survives_the_loss_of_half"}


class ByUse:
    def __init__(self, service):
        self.service = service
        self.reset()

    def reset(self):
        self.wanted = []

    def desired(self, load):
        busy = min(load.concurrency, load.ready) if load.metric is not None else 0
        fits = math.ceil(busy / 0.85) if math.isfinite(busy) else load.replicas
        self.wanted = [*self.wanted[-47:], fits]
        fits = max(self.wanted)
        return max(self.service.minimum, min(fits, self.service.maximum))


def autoscaler(service):
    return ByUse(service)
