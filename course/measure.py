"""Times, and how far they can be trusted.

A single time is an anecdote. A `Series` keeps every raw value, so that a median comes
with its spread and a percentile with an interval that assumes nothing about the shape
of the distribution: latencies are never normal.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from course.machine import card_line, cpu_quota, machine_card

__all__ = [
    "Paired",
    "Percentile",
    "Series",
    "Stopwatch",
    "card_line",
    "compare",
    "cpu_quota",
    "interval_ranks",
    "machine_card",
    "measure",
    "stopwatch",
]


@dataclass(frozen=True)
class Percentile:
    """A percentile and the interval it lies in; a bound of None cannot be given."""

    q: float  # per cent
    value: float
    low: float | None
    high: float | None
    n: int
    confidence: float
    unit: str = "s"

    def __str__(self) -> str:
        low = "?" if self.low is None else f"{self.low:.4g}"
        high = "?" if self.high is None else f"{self.high:.4g}"
        text = f"{self.value:.4g} {self.unit} [{low} to {high}]"
        if self.low is None or self.high is None:
            text += f" (n={self.n} is too few for both bounds)"
        return text


@dataclass(frozen=True)
class Series:
    """Repeated measurements of one thing, in one unit, in the order they were made."""

    values: tuple[float, ...]
    unit: str = "s"

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(v) for v in self.values))
        if not self.values or any(math.isnan(v) for v in self.values):
            raise ValueError(
                f"Expected at least one value and no NaN, found {self.values!r}."
            )

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def min(self) -> float:
        return min(self.values)

    @property
    def max(self) -> float:
        return max(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def median(self) -> float:
        return self.at(50)

    @property
    def p50(self) -> float:
        return self.at(50)

    @property
    def p90(self) -> float:
        return self.at(90)

    @property
    def p99(self) -> float:
        return self.at(99)

    @property
    def spread(self) -> float:
        """The middle half's width: the 75th percentile less the 25th."""
        return self.at(75) - self.at(25)

    def at(self, q: float) -> float:
        """The q-th percentile (0 to 100), between two values by straight line."""
        ordered = sorted(self.values)
        place = (self.n - 1) * q / 100
        below = math.floor(place)
        above = min(below + 1, self.n - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    def percentile(self, q: float, confidence: float = 0.95) -> Percentile:
        """The q-th percentile (between 0 and 100) with its interval.

        The bounds are themselves measured values, picked by the binomial
        distribution alone. With few values a bound does not exist and is None: at
        95 % the median needs 6 values for both, the 99th percentile 368.
        """
        low, high = interval_ranks(self.n, q / 100, confidence)
        ordered = sorted(self.values)
        return Percentile(
            q=q,
            value=self.at(q),
            low=None if low is None else ordered[low - 1],
            high=None if high is None else ordered[high - 1],
            n=self.n,
            confidence=confidence,
            unit=self.unit,
        )

    def scaled(self, factor: float, unit: str) -> Series:
        """The same measurements in another unit: `scaled(1000, "ms")`."""
        return Series(tuple(v * factor for v in self.values), unit)

    def __str__(self) -> str:
        spread = f"spread {self.spread:.3g}, n={self.n}"
        return f"{self.median:.4g} {self.unit} ({spread})"


def interval_ranks(
    n: int, q: float, confidence: float = 0.95
) -> tuple[int | None, int | None]:
    """Ranks (1 to n) of the sorted values that enclose the q-quantile, 0 < q < 1.

    How many of n values lie below the true quantile is binomial(n, q). So the value
    of rank r lies above it with probability P(B < r), and not above it with
    P(B >= r). Each side may be wrong with half of what confidence leaves.
    """
    if not (0 < q < 1 and 0 < confidence < 1):
        raise ValueError(
            "Expected a quantile and a confidence strictly between 0 and 1, "
            f"found {q} and {confidence}."
        )
    below = _binomial_cdf(n, q)  # below[k] = P(B < k)
    risk = (1 - confidence) / 2
    low = [rank for rank in range(1, n + 1) if below[rank] <= risk]
    high = [rank for rank in range(1, n + 1) if 1 - below[rank] <= risk]
    return (low[-1] if low else None, high[0] if high else None)


def _binomial_cdf(n: int, q: float) -> list[float]:
    total, sums = 0.0, [0.0]
    for k in range(n + 1):
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(ways + k * math.log(q) + (n - k) * math.log1p(-q))
        sums.append(total)
    return sums


@dataclass(frozen=True)
class Paired:
    """Two things measured turn by turn, so that a slow minute hits both alike."""

    a: Series
    b: Series

    @property
    def ratios(self) -> Series:
        """a over b, one ratio a turn."""
        pairs = zip(self.a.values, self.b.values, strict=True)
        return Series(tuple(a / b for a, b in pairs), "x")

    def ratio(self, confidence: float = 0.95) -> Percentile:
        """The median of the ratios with the interval of the sign test.

        An interval that leaves out 1 is a difference; one that holds 1 is none that
        this many turns can show.
        """
        return self.ratios.percentile(50, confidence)


class Stopwatch:
    """Seconds since it was started; they stand still once its block has ended."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stop: float | None = None

    @property
    def seconds(self) -> float:
        end = time.perf_counter() if self._stop is None else self._stop
        return end - self._start

    def __enter__(self) -> Stopwatch:
        self._start, self._stop = time.perf_counter(), None
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = time.perf_counter()


def stopwatch() -> Stopwatch:
    """Times a block: `with stopwatch() as watch: ...`, then `watch.seconds`."""
    return Stopwatch()


def measure(fn: Callable[[], Any], *, warmup: int = 1, repeats: int = 5) -> Series:
    """Seconds a call of `fn` takes, `repeats` times, after `warmup` unmeasured ones."""
    for _ in range(warmup):
        fn()
    return Series(tuple(_seconds(fn) for _ in range(repeats)))


def compare(
    a: Callable[[], Any], b: Callable[[], Any], *, warmup: int = 1, repeats: int = 7
) -> Paired:
    """Seconds of `a` and `b`, measured in turns; who goes first alternates."""
    for _ in range(warmup):
        a()
        b()
    first: list[float] = []
    second: list[float] = []
    for turn in range(repeats):
        order = ((a, first), (b, second))
        for fn, times in order if turn % 2 == 0 else order[::-1]:
            times.append(_seconds(fn))
    return Paired(Series(tuple(first)), Series(tuple(second)))


def _seconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start
