"""The square-root rule instead of Erlang's formula; no trend, but more spare."""

from collections import deque


def capacity(replicas, service_s, wait_s):
    if not (replicas >= 1 and service_s > 0 and wait_s >= 0):
        raise ValueError("no such fleet")
    rate, step = 0.0, replicas / service_s
    while step > 1e-7 * replicas / service_s:
        step /= 2
        load = (rate + step) * service_s
        if mmc_wait_quantile(replicas, load, service_s, 0.95) <= wait_s:
            rate += step
    return rate


def hurts_s(rate, before, after, cold_s):
    if before >= rate:
        return 0
    return cold_s * (after - before) / (after - rate) if after > rate else float("inf")


class SquareRoot:
    def __init__(self, service):
        self.service = service
        self.reset()

    def reset(self):
        self.queue, self.erlangs, self.wanted = 0, None, deque(maxlen=36)

    def desired(self, load):
        of = self.service
        whole = load.concurrency == load.concurrency
        if whole:
            grown = (load.queue - self.queue) * of.service_s / of.tick_s
            self.queue = load.queue
            now = max(0.0, min(load.concurrency, load.ready) + grown)
            self.erlangs = now if self.erlangs is None else self.erlangs
            weight = 0.3 if now > self.erlangs else 0.15
            self.erlangs += weight * (now - self.erlangs)
        work = (self.erlangs or 0.0) + load.queue * of.service_s / 40
        self.wanted.append(math.ceil(work + 1.2 * math.sqrt(work)))
        most = max(self.wanted)
        if self.wanted[-1] > load.replicas or most < 0.85 * load.replicas:
            answer = min(most, max(self.wanted[-1], load.replicas - 3))
        else:
            answer = load.replicas
        return max(of.minimum, min(answer, of.maximum))


def autoscaler(service):
    return SquareRoot(service)
