"""Exercise 5: an autoscaler that keeps its promise for less.

Goal      Write an autoscaler for a service whose replicas take half a minute to start,
          and the two formulas that it stands on.
Why       The lesson's HPA keeps the promise too, but reacts only when requests queue
          already, pays for five minutes after every peak, and keeps a third of the
          fleet idle at any size: large fleets need less than that.
Points    25
Minutes   90
Before    scaling_strategies.py, section 1; local_cloud/scaling/policies.py
Check     python -m exercises check 5      (or at each save: watch 5)
Try it    python -m exercises.ex5_autoscaler

The simulator is the lesson's. Two of the shapes that your policy is checked on are in
exercises/load_shapes.py; the others it meets for the first time, as in production.
"""

from __future__ import annotations

# BEGIN SOLUTION
import bisect
import math
from collections.abc import Callable

# END SOLUTION
from exercises.load_shapes import SERVICE, Service, compared
from local_cloud.scaling import policies

# BEGIN SOLUTION
from local_cloud.scaling.theory import mmc_wait_quantile

# END SOLUTION


def capacity(replicas: int, service_s: float, wait_s: float) -> float:
    """Requests a second that a fleet can take, so that 95 % wait `wait_s` at most.

    Arrivals are Poisson, services exponential with a mean of `service_s`; there is one
    queue for all replicas (M/M/c).

    Checked: the largest such rate, within 1 %, for small and large fleets and for
    `wait_s` 0 (then 5 % may wait at all). ValueError for no replica, and for a
    service or a wait that no clock can measure.
    """
    # TODO(1a): local_cloud/scaling/theory.py knows the wait for a load; you need the
    # load for a wait. More load never waits less.
    # BEGIN SOLUTION
    if replicas < 1 or not service_s > 0 or not wait_s >= 0:
        raise ValueError(
            f"Expected a replica, a service above 0 s and a wait of at least 0 s, "
            f"found {replicas}, {service_s} and {wait_s}."
        )
    low, high = 0.0, float(replicas)  # Erlangs
    for _ in range(40):
        load = (low + high) / 2
        if mmc_wait_quantile(replicas, load, service_s, 0.95) <= wait_s:
            low = load
        else:
            high = load
    return low / service_s
    # END SOLUTION


def hurts_s(rate: float, before: float, after: float, cold_s: float) -> float:
    """For how many seconds after a jump of the load somebody has to queue.

    The load jumps to `rate` requests a second, while the fleet serves `before` a
    second at most. New replicas serve `cold_s` seconds after the jump, and with them
    the fleet serves `after`. Requests flow evenly, like water.

    Checked: seconds from the jump until the queue is empty; 0 where the old fleet
    copes, infinity where the new one does not catch up either.
    """
    # TODO(1b): what has piled up when the new replicas come, and what empties it?
    # BEGIN SOLUTION
    if rate <= before:
        return 0.0
    if rate >= after:
        return math.inf
    return cold_s + (rate - before) * cold_s / (after - rate)
    # END SOLUTION


def autoscaler(service: Service) -> policies.Autoscaler:
    """A policy of your own: an object with `desired(load)` and `reset()`.

    Checked in the simulator, on the known shapes and on hidden ones (a spike, a slow
    wave, a load that falls, noise):
    - the promise is kept: p95 from arrival to end within `service.promise_s`, by a
      fleet that follows: where the load grows or falls fivefold, the largest fleet is
      at least twice the smallest (noise is judged together with such a fall);
    - all shapes together cost at most 1.25 times what the cheapest fixed fleets cost,
      which know each shape beforehand, and 0.9 times what the lesson's HPA does;
    - under noise of 5 % it turns (grows, then shrinks, or the other way round) at most
      12 times in half an hour;
    - half the replicas lost at once: the promise is kept all the same; all of them
      lost: every request is still served, and three minutes later p95 is back.

    Checked without it:
    - always a whole number from `service.minimum` to `service.maximum`: the minimum
      after ten minutes without load, the maximum after ten minutes of a flood;
    - also when a reading is broken (`metric` None, `concurrency` NaN) or no replica is
      left; and once readings are whole again, it goes on as before;
    - the same loads give the same answers: after `reset()`, and on a clock that starts
      anywhere. It reads no clock but `load.time_s`, and draws nothing by chance.
    """
    # TODO(2): what comes in, in Erlangs: replicas at work, and what the queue grew by.
    # Then: what will come when a replica asked for now is ready, what has piled up,
    # how many replicas that takes (1a), and how long to wait before giving one back.
    # BEGIN SOLUTION
    return Forecast(service)
    # END SOLUTION


# BEGIN SOLUTION
Holds = Callable[[int, float, float], float]


class Forecast:
    """Asks for what the load will be when a replica that is asked for now serves."""

    look_s = 60.0  # back, for level and trend
    recent_s = 30.0
    drain_s = 30.0  # in which what has piled up should be gone
    hold_s = 180.0  # what was wanted within is not given back
    slack = 0.2  # of the fleet, which is not worth a change downwards

    def __init__(self, service: Service, holds: Holds = capacity) -> None:
        self.service = service
        wait_s = service.promise_s / 5
        self.rates = [
            holds(n, service.service_s, wait_s) for n in range(1, service.maximum + 1)
        ]
        self.reset()

    def reset(self) -> None:
        self.seen: list[tuple[float, float]] = []  # time, requests a second
        self.wanted: list[tuple[float, int]] = []
        self.before: policies.Load | None = None

    def desired(self, load: policies.Load) -> int:
        least, most = self.service.minimum, self.service.maximum
        if not math.isfinite(load.concurrency):
            return max(least, min(load.replicas, most))
        self.seen = [s for s in self.seen if s[0] > load.time_s - self.look_s]
        self.seen.append((load.time_s, self.came(load)))
        rate = self.expected(load.time_s) + load.queue / self.drain_s
        fits = bisect.bisect_left(self.rates, rate) + 1
        fits = max(least, min(fits, most))
        self.wanted = [w for w in self.wanted if w[0] > load.time_s - self.hold_s]
        self.wanted.append((load.time_s, fits))
        there = max(least, min(load.replicas, most))
        if fits >= there:
            return fits
        kept = max(n for _, n in self.wanted)
        return kept if kept < there * (1 - self.slack) else there

    def came(self, load: policies.Load) -> float:
        """Requests a second since the last look: served ones, and the queue's growth.

        As many were served as replicas were at work, each in `service_s`.
        """
        before, self.before = self.before, load
        at_work = min(load.concurrency, load.ready)
        rate = at_work / self.service.service_s
        if before:
            rate += (load.queue - before.queue) / (load.time_s - before.time_s)
        return max(0.0, rate)

    def expected(self, now: float) -> float:
        """The rate when a replica that is asked for now will be ready."""
        recent = [rate for time, rate in self.seen if time > now - self.recent_s]
        older = [rate for time, rate in self.seen if time <= now - self.recent_s]
        level = sum(recent) / len(recent)
        if not older:
            return level
        trend = (level - sum(older) / len(older)) / self.recent_s  # a second
        ahead = self.recent_s / 2 + self.service.start_s + self.service.tick_s
        return level + max(0.0, trend) * ahead


# END SOLUTION
if __name__ == "__main__":
    from exercises.tryout import tryout

    raise SystemExit(
        tryout(
            __file__,
            capacity=lambda: capacity(10, SERVICE.service_s, 1.0),
            hurts_s=lambda: hurts_s(18, before=12, after=24, cold_s=35),
            autoscaler=lambda: compared(autoscaler(SERVICE)),
        )
    )
