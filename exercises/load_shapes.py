"""Load that changes, played to an autoscaler in the lesson's simulator.

    trace = played(KNOWN["sine"], SERVICE, policy, seed=1)
    print(trace.quantile(0.95), trace.replica_s)

One queue, and whoever is free takes the next. Times are virtual, and chance has a seed:
the same policy gets the same trace everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from course.show import Table
from local_cloud.scaling import planning, traffic
from local_cloud.scaling.policies import Autoscaler
from local_cloud.scaling.simulator import Fleet, Trace, simulate
from local_cloud.scaling.traffic import Floats
from scaling_strategies import HPA

SECONDS = 1800.0  # that every shape lasts


@dataclass(frozen=True)
class Service:
    """What is promised, and the fleet that has to keep it."""

    service_s: float = 1.0  # a request takes in the mean; most less, some much longer
    promise_s: float = 5.0  # p95 from arrival to end
    start_s: float = 30.0  # a replica takes from being asked for to serving
    tick_s: float = 5.0  # between two looks of the autoscaler
    minimum: int = 2  # replicas
    maximum: int = 40


@dataclass(frozen=True)
class Shape:
    """Requests a second as a function of time, never above `peak`."""

    rate: Callable[[Floats], Floats]
    peak: float


def ramp(first: float, last: float, from_s: float, to_s: float) -> Shape:
    def rate(times: Floats) -> Floats:
        return np.interp(times, [from_s, to_s], [first, last])

    return Shape(rate, max(first, last))


def sine(low: float, high: float, period_s: float) -> Shape:
    middle, half = (low + high) / 2, (high - low) / 2
    omega = 2 * np.pi / period_s
    return Shape(lambda times: middle - half * np.cos(omega * times), high)


def spike(low: float, high: float, from_s: float, to_s: float) -> Shape:
    def rate(times: Floats) -> Floats:
        return np.where((times >= from_s) & (times < to_s), high, low)

    return Shape(rate, high)


def noise(rate: float, share: float, seed: int, every_s: float = 20.0) -> Shape:
    """A rate that every so often is another one, up to this share above or below."""
    factors = np.random.default_rng(seed).uniform(1 - share, 1 + share, 10_000)

    def noisy(times: Floats) -> Floats:
        return rate * factors[(times / every_s).astype(int)]

    return Shape(noisy, rate * (1 + share))


SERVICE = Service()
KNOWN = {"ramp": ramp(2, 18, 200, 1400), "sine": sine(2, 20, 1200)}


def drawn(shape: Shape, service: Service, seed: int) -> tuple[Floats, Floats]:
    """Arrivals of a shape, and how long each request takes a replica."""
    rng = np.random.default_rng(seed)
    arrivals = traffic.varying(rng, shape.rate, shape.peak, SECONDS)
    return arrivals, traffic.exponential(rng, service.service_s, len(arrivals))


def played(
    shape: Shape, service: Service, policy: Autoscaler | None, seed: int
) -> Trace:
    """What becomes of a shape's requests; the fleet fits the load at the beginning."""
    at_first = float(shape.rate(np.zeros(1))[0]) * service.service_s / 0.7
    replicas = max(service.minimum, math.ceil(at_first))
    fleet = Fleet(replicas, start_s=service.start_s, tick_s=service.tick_s)
    return simulate(*drawn(shape, service, seed), fleet, None, policy)


def cheapest_fixed(shape: Shape, service: Service, seed: int) -> Trace:
    """The smallest fleet that keeps the promise without ever changing: hindsight."""
    load = drawn(shape, service, seed)
    fixed = partial(simulate, *load)
    plan = planning.cheapest(
        lambda replicas: fixed(Fleet(replicas)),
        service.promise_s,
        price_hour=1.0,
        most=service.maximum,
    )
    return fixed(Fleet(plan.replicas if plan else service.maximum))


def hpa(service: Service) -> HPA:
    """The lesson's, with its defaults."""
    return HPA(0.7, service.minimum, service.maximum, metric="requests")


def turns(trace: Trace) -> int:
    """How often a fleet that grew began to shrink, or the other way round."""
    moves = [tick.desired - tick.load.replicas for tick in trace.ticks]
    moves = [move for move in moves if move]
    return sum(a * b < 0 for a, b in pairwise(moves))


def compared(policy: Autoscaler, seed: int = 1) -> Table:
    """A policy on the known shapes, beside the lesson's HPA and the cheapest fleet."""
    rows = []
    for name, shape in KNOWN.items():
        policy.reset()
        traces = {
            "yours": played(shape, SERVICE, policy, seed),
            "HPA": played(shape, SERVICE, hpa(SERVICE), seed),
            "cheapest fixed": cheapest_fixed(shape, SERVICE, seed),
        }
        rows += [
            [name, who, f"{t.quantile(0.95):.2f}", f"{t.replica_s:,.0f}", turns(t)]
            for who, t in traces.items()
        ]
    columns = ["shape", "fleet", "p95 s", "replicas x s", "turns"]
    return Table(f"Promise: p95 within {SERVICE.promise_s:g} s", columns, rows)
