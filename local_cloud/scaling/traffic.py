"""Load for the simulator: when requests arrive, and how long each takes to serve."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Arrivals: times in seconds, ascending; shape (requests,).


def poisson(rng: np.random.Generator, rate: float, requests: int) -> Floats:
    """Arrivals of many who do not know of each other, `rate` a second."""
    return rng.exponential(1 / rate, requests).cumsum()


def varying(
    rng: np.random.Generator,
    rate: Callable[[Floats], Floats],
    peak: float,
    end_s: float,
) -> Floats:
    """Poisson arrivals whose rate is a function of time and never above `peak`.

    Arrivals at the peak's rate are thinned. Source: P. Lewis and G. Shedler, 1979.
    """
    count = rng.poisson(peak * end_s)
    times = np.sort(rng.uniform(0, end_s, count))
    rates = rate(times)
    if rates.size and (rates.max() > peak * (1 + 1e-9) or rates.min() < 0):
        raise ValueError(
            f"varying: expected rates from 0 to the peak of {peak}, found "
            f"{rates.min():g} to {rates.max():g}; raise peak"
        )
    return times[rng.uniform(0, peak, count) < rates]


def daily(
    rng: np.random.Generator, low: float, high: float, day_s: float, days: float = 1
) -> Floats:
    """Arrivals over days: `low` a second at midnight, `high` at noon."""

    def rate(times: Floats) -> Floats:
        return low + (high - low) * (1 - np.cos(2 * np.pi * times / day_s)) / 2

    return varying(rng, rate, high, days * day_s)


def bursts(
    rng: np.random.Generator,
    calm: float,
    busy: float,
    calm_s: float,
    busy_s: float,
    end_s: float,
) -> Floats:
    """Arrivals that are calm, and busy at times (MMPP with two states).

    Both states last exponentially long: `calm_s` and `busy_s` in the mean.
    """
    turns = 2 * math.ceil(2 * end_s / (calm_s + busy_s) + 10)
    lasts = rng.exponential(1.0, turns) * np.resize([calm_s, busy_s], turns)
    changes = lasts.cumsum()
    while changes[-1] < end_s:  # rare: the states were shorter than expected
        more = rng.exponential(1.0, turns) * np.resize([calm_s, busy_s], turns)
        changes = np.append(changes, changes[-1] + more.cumsum())

    def rate(times: Floats) -> Floats:
        odd = np.searchsorted(changes, times) % 2 == 1
        return np.where(odd, busy, calm)

    return varying(rng, rate, max(calm, busy), end_s)


def steady(
    rng: np.random.Generator, servers: int, rho: float, mean_s: float, requests: int
) -> tuple[Floats, Floats]:
    """Poisson arrivals and exponential services that load each server with `rho`.

    Stretched so that both means are exact in the sample too. A thousandth more load
    makes waits near saturation percents longer, which is luck and tells of no policy.
    """
    arrivals = poisson(rng, 1.0, requests)
    services = exponential(rng, 1.0, requests)
    arrivals *= requests * mean_s / (rho * servers * arrivals[-1])
    return arrivals, services * mean_s / services.mean()


# Services: seconds at one replica, from start to end; shape (requests,).


def constant(mean_s: float, requests: int) -> Floats:
    """All the same."""
    return np.full(requests, mean_s)


def exponential(rng: np.random.Generator, mean_s: float, requests: int) -> Floats:
    """The one for which theory has the most formulas."""
    return rng.exponential(mean_s, requests)


def lognormal(
    rng: np.random.Generator, mean_s: float, cv: float, requests: int
) -> Floats:
    """Most short and some very long; `cv` is the deviation in units of the mean."""
    variance = math.log(1 + cv**2)
    return rng.lognormal(math.log(mean_s) - variance / 2, math.sqrt(variance), requests)


def language_model(
    rng: np.random.Generator,
    requests: int,
    *,
    prompt_tokens: float,
    answer_tokens: float,
    longest: int,
    prefill_per_s: float,
    decode_per_s: float,
) -> Floats:
    """Prompts of lognormal length are read, answers of geometric length written."""
    prompts = lognormal(rng, prompt_tokens, 1.0, requests)
    answers = np.minimum(rng.geometric(1 / answer_tokens, requests), longest)
    return prompts / prefill_per_s + answers / decode_per_s
