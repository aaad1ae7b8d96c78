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

from exercises.load_shapes import SERVICE, Service, compared
from local_cloud.scaling import policies


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
    raise NotImplementedError


def hurts_s(rate: float, before: float, after: float, cold_s: float) -> float:
    """For how many seconds after a jump of the load somebody has to queue.

    The load jumps to `rate` requests a second, while the fleet serves `before` a
    second at most. New replicas serve `cold_s` seconds after the jump, and with them
    the fleet serves `after`. Requests flow evenly, like water.

    Checked: seconds from the jump until the queue is empty; 0 where the old fleet
    copes, infinity where the new one does not catch up either.
    """
    # TODO(1b): what has piled up when the new replicas come, and what empties it?
    raise NotImplementedError


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
    raise NotImplementedError


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
