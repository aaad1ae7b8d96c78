"""Drift of one feature of the traffic: counted as it passes, scored when it is scraped.

    watch = Watch("prompt_tokens", baseline, psi)
    watch_prompts(app.state.service.metrics, watch)     # of an app by `create_app`

tells the watch of each prompt (`watch.observe(57)`; memory stays bounded) and exports
`model_input_drift_psi{feature="prompt_tokens"}`, the distance of the newest values from
the baseline, and `model_input_drift_limit`, which that distance exceeds once in a
hundred windows without any drift. Until the window is full the distance is NaN: not
known, and no alert compares true with it.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from serving.metrics import Metrics

WINDOW = 300  # values; with fewer the noise hides what is looked for
BINS = 8  # of the baseline, equally full
ROUNDS = 2000  # of the bootstrap: 20 of them lie beyond the limit
SEED = 1

Score = Callable[[Sequence[float], Sequence[float]], float]  # baseline, window: counts


class Watch:
    """Watches one feature. `observe` may be called from any thread."""

    def __init__(
        self,
        feature: str,
        baseline: Sequence[float],
        score: Score,
        *,
        window: int = WINDOW,
        of: str = "input",
    ) -> None:
        """`of` is "input" or "output", and part of the metric's name."""
        values = np.asarray(baseline, float)
        if min(len(values), window) < WINDOW or not np.isfinite(values).all():
            raise ValueError(
                f"{feature}: expected a baseline and a window of at least {WINDOW} "
                f"finite values, found {len(values)} and {window}; collect more, "
                "a small sample differs from any other"
            )
        self.feature, self.window, self.of = feature, window, of
        self._score = score
        self.edges = edges(values)
        self.baseline = self.count(values)
        self.limit = limit(self.baseline, window, score)
        self._places: deque[int] = deque()
        self._counts = [0] * len(self.baseline)
        self._lock = threading.Lock()

    def count(self, values: Sequence[float] | np.ndarray) -> list[int]:
        """How many values lie in each bin."""
        places = np.searchsorted(self.edges, values, side="left")
        return np.bincount(places, minlength=len(self.edges) + 1).tolist()

    def observe(self, value: float) -> None:
        """Take in one value; beyond the window the oldest is forgotten."""
        if not math.isfinite(value):
            raise ValueError(
                f"{self.feature}: expected a finite number, found {value}; leave out "
                "what could not be measured and count it instead"
            )
        place = bisect_left(self.edges, value)
        with self._lock:
            self._places.append(place)
            self._counts[place] += 1
            if len(self._places) > self.window:
                self._counts[self._places.popleft()] -= 1

    def value(self) -> float:
        """The window's distance from the baseline; NaN until the window is full."""
        with self._lock:
            if len(self._places) < self.window:
                return math.nan
            counts = list(self._counts)
        return self._score(self.baseline, counts)


class DriftCollector:
    """`model_<of>_drift_psi{feature}` and its limit, computed at scrape time."""

    def __init__(self, *watches: Watch) -> None:
        self.watches = watches

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family for each name: the features of one model share it."""
        for of in sorted({watch.of for watch in self.watches}):
            distance = GaugeMetricFamily(
                f"model_{of}_drift_psi",
                "Distance of the newest values from the baseline; NaN: too few yet.",
                labels=["feature"],
            )
            limits = GaugeMetricFamily(
                f"model_{of}_drift_limit",
                "Exceeded by 1 % of the windows in which nothing drifted.",
                labels=["feature"],
            )
            for watch in (w for w in self.watches if w.of == of):
                distance.add_metric([watch.feature], watch.value())
                limits.add_metric([watch.feature], watch.limit)
            yield from (distance, limits)


def watch_prompts(metrics: Metrics, watch: Watch) -> None:
    """Let an API export the drift of its prompts' lengths in tokens.

    None does so by itself: whose days were the better ones, and so the baseline, is for
    its operator to say.
    """
    metrics.on_prompt.append(watch.observe)
    metrics.registry.register(DriftCollector(watch))  # type: ignore[arg-type]


def edges(values: np.ndarray) -> list[float]:
    """Bin edges at the baseline's quantiles; a bin holds its upper edge.

    A feature of few values has fewer: equal ones are one. If its least value fills the
    first bin there is an empty one below it, or what sank would not be seen.
    """
    inner = np.linspace(0, 1, BINS + 1)[1:-1]
    quantiles = np.quantile(values, inner, method="lower")
    least = values.min()
    below = [np.nextafter(least, -np.inf)] if quantiles[0] == least else []
    return np.unique([*below, *quantiles]).tolist()


def limit(
    baseline: Sequence[float], window: int, score: Score, q: float = 0.99
) -> float:
    """The score's q-quantile where nothing drifted, by bootstrap.

    Both samples are drawn anew: the baseline is a sample too, with an error of its own.
    """
    rng, size = np.random.default_rng(SEED), int(sum(baseline))
    shares = np.asarray(baseline, float) / size
    scores = [
        score(rng.multinomial(size, shares).tolist(), drawn.tolist())
        for drawn in rng.multinomial(window, shares, ROUNDS)
    ]
    return float(np.quantile(scores, q))
