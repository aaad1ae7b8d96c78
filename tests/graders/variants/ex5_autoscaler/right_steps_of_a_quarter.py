"""Fleets of fixed sizes, a quarter apart: up when one is full, down when two fit."""


class Sizes:
    def __init__(self, service):
        sizes = {service.minimum, service.maximum}
        size = 2.0
        while size < service.maximum:
            sizes.add(math.ceil(size))
            size *= 1.2
        self.sizes = sorted(n for n in sizes if service.minimum <= n)
        self.inner = Forecast(service)

    def reset(self):
        self.inner.reset()

    def desired(self, load):
        wanted = self.inner.desired(load)
        return next(n for n in self.sizes if n >= wanted)


def autoscaler(service):
    return Sizes(service)
