"""What a fleet costs, and the cheapest one that keeps its promise.

p95 against replicas is a cliff: one replica less is often the difference between a good
service and none. So the promise is simulated, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from local_cloud.scaling.policies import check_bounds
from local_cloud.scaling.simulator import Trace


@dataclass(frozen=True)
class Plan:
    """A fleet that keeps its promise."""

    replicas: int
    p95_s: float
    per_1000: float  # price of a thousand requests, in the unit of the price given


def cost_per_1000(
    trace: Trace, price_hour: float, price_overflow: float = 0.0
) -> float:
    """What a thousand requests cost: replicas by the hour, overflow by the request."""
    hours = trace.replica_s / 3600
    total = hours * price_hour + trace.overflowed.sum() * price_overflow
    return 1000 * total / len(trace.arrivals)


def cheapest(
    simulated: Callable[[int], Trace], target_s: float, price_hour: float, most: int
) -> Plan | None:
    """The fewest replicas with a p95 within the target; None if `most` do not reach it.

    More replicas are never slower, so that halving the range finds the edge.
    """
    check_bounds("cheapest", target_s, 1, most)
    low, high, found = 1, most, None
    while low <= high:
        replicas = (low + high) // 2
        trace = simulated(replicas)
        p95_s = trace.quantile(0.95)
        if p95_s <= target_s:
            found = Plan(replicas, p95_s, cost_per_1000(trace, price_hour))
            high = replicas - 1
        else:
            low = replicas + 1
    return found
