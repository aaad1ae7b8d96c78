"""What is known of fleets and caches without simulating: formulas with their sources.

Times are in the unit of `mean`, the mean service time; `load` is in Erlangs (arrival
rate times mean service time), `rho` is the load of one server. All assume that arrivals
are Poisson and that the queue is stable; an overloaded one waits for ever (inf).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

STEPS = 200  # halvings of a bisection: more than a float can tell apart


def erlang_b(servers: int, load: float) -> float:
    """Share of requests that find all servers busy, where none may wait.

    Source: A. K. Erlang, 1917; as the stable recursion over the servers.
    """
    if servers < 0 or load < 0:
        raise ValueError(
            f"Expected servers and load of at least 0, found {servers} and {load}."
        )
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = load * blocked / (n + load * blocked)
    return blocked


def erlang_c(servers: int, load: float) -> float:
    """Share of requests that wait, where all may (M/M/c). Source: Erlang, 1917."""
    if load >= servers:
        return 1.0
    blocked = erlang_b(servers, load)
    return blocked / (1 - load / servers * (1 - blocked))


def mmc_wait(servers: int, load: float, mean: float) -> float:
    """Mean wait in one queue for `servers` (M/M/c); add `mean` for the whole stay.

    Source: L. Kleinrock, Queueing Systems I, 1975, section 3.5.
    """
    if load >= servers:
        return math.inf
    return erlang_c(servers, load) * mean / (servers - load)


def mmc_wait_quantile(servers: int, load: float, mean: float, share: float) -> float:
    """The wait that a `share` of requests does not exceed (M/M/c, first come first).

    Who waits at all waits exponentially long. Source: Kleinrock, as above.
    """
    if load >= servers:
        return math.inf
    waits = erlang_c(servers, load)
    return max(0.0, math.log(waits / (1 - share)) * mean / (servers - load))


def md1_wait(rho: float, mean: float) -> float:
    """Mean wait at one server with constant service: half of M/M/1's.

    Source: Pollaczek and Khinchine, about 1930.
    """
    return math.inf if rho >= 1 else rho / (2 * (1 - rho)) * mean


def round_robin(rho: float, mean: float, servers: float = math.inf) -> float:
    """Mean stay behind a round robin of `servers` (E_k/M/1; of infinitely many: D/M/1).

    Each server gets every k-th arrival. sigma is the root below 1 of A(1 - sigma),
    with A the transform of the time between two. Source: Kleinrock, section 6.4.
    """
    if rho >= 1:
        return math.inf

    def excess(sigma: float) -> float:
        if math.isinf(servers):
            return sigma - math.exp(-(1 - sigma) / rho)
        return sigma - (1 + (1 - sigma) / (servers * rho)) ** -servers

    return mean / (1 - bisect(excess, 0.0, 1 - 1e-9))


def power_of_choices(rho: float, mean: float, choices: int = 2) -> float:
    """Mean stay where each request joins the shortest of a few random queues.

    In a large fleet a share of rho^((d^i - 1) / (d - 1)) of queues holds i or more.
    With one choice this is M/M/1. Source: M. Mitzenmacher, The Power of Two Choices in
    Randomized Load Balancing, 1996; N. Vvedenskaya and others, 1996.
    """
    if rho >= 1:
        return math.inf
    if choices == 1:
        return mean / (1 - rho)
    total, exponent = 0.0, 1.0
    while (share := rho**exponent) > 1e-15:
        total += share
        exponent = exponent * choices + 1
    return total * mean / rho


def known(rho: float, mean: float, servers: int) -> dict[str, float | None]:
    """The mean stay by way of balancing; nobody has a formula for them all."""
    return {
        "random": power_of_choices(rho, mean, 1),
        "round robin": round_robin(rho, mean, servers),
        "power of two": power_of_choices(rho, mean, 2),  # of infinitely many
        "least connections": None,
        "central queue": mean + mmc_wait(servers, rho * servers, mean),
    }


def che_hit_rates(popularity: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """How often each item is found in an LRU cache of `size`, for independent requests.

    An item is found if it was asked for within the time in which `size` different
    others are. Source: H. Che and others, Hierarchical Web Caching Systems, 2002.

    Args:
        popularity: of each item, in any unit; shape (items,).

    Returns:
        Shares, shape (items,); the cache's own is their mean weighted by popularity.
    """
    share = popularity / popularity.sum()
    if size >= len(share):
        return np.ones_like(share)
    if size < 1:
        return np.zeros_like(share)

    def excess(time: float) -> float:
        return float(-np.expm1(-share * time).sum()) - size

    end = float(size)
    while excess(end) < 0:
        end *= 2
    return -np.expm1(-share * bisect(excess, 0.0, end))


def che_hit_rate(popularity: NDArray[np.float64], size: int) -> float:
    """How many of all requests an LRU cache of `size` answers; see `che_hit_rates`."""
    share = popularity / popularity.sum()
    return float(share @ che_hit_rates(popularity, size))


def bisect(excess: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that is negative at `low` and not at `high` changes its sign."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        if excess(middle) < 0:
            low = middle
        else:
            high = middle
    return high
