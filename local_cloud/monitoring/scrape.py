"""What Prometheus reads of a server: one scrape of /metrics, and two of them compared.

before = scrape(url)
...
seen = scrape(url) - before                 # what was counted in between
seen.total("http_server_request_duration_seconds_count") / seen.seconds
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from urllib.request import OpenerDirector, ProxyHandler, build_opener

Labels = frozenset[tuple[str, str]]
DEADLINE_S = 5.0


@dataclass(frozen=True)
class Scrape:
    """The samples of one scrape, or the increases between two of them."""

    samples: Mapping[tuple[str, Labels], float]
    at: float = 0.0  # seconds on a clock that only goes forward
    seconds: float = 0.0  # between the two

    def __sub__(self, before: Scrape) -> Scrape:
        """Increases of the series that both have; for counters and buckets only.

        As for `rate()`, a series that was not there before has no increase, and one
        that fell began again at zero: its server restarted.
        """
        gained = {
            series: value - was if value >= (was := before.samples[series]) else value
            for series, value in self.samples.items()
            if series in before.samples
        }
        return Scrape(gained, self.at, self.at - before.at)

    def series(self, name: str, **labels: str) -> dict[Labels, float]:
        """All series of a name that carry these labels, perhaps among others."""
        wanted = labels.items()
        return {
            found: value
            for (metric, found), value in self.samples.items()
            if metric == name and wanted <= found
        }

    def total(self, name: str, **labels: str) -> float:
        """Their sum; 0 where there are none, as in a graph."""
        return sum(self.series(name, **labels).values())

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """A histogram's cumulative counts by upper edge, in order, series added up."""
        counts: dict[float, float] = {}
        for found, value in self.series(f"{name}_bucket", **labels).items():
            edge = float(dict(found)["le"])
            counts[edge] = counts.get(edge, 0.0) + value
        return dict(sorted(counts.items()))


def parse(text: str, at: float = 0.0) -> Scrape:
    """The samples of an exposition in Prometheus' text format."""
    from prometheus_client.parser import text_string_to_metric_families

    return Scrape(
        {
            (sample.name, frozenset(sample.labels.items())): float(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        },
        at,
    )


def scrape(url: str) -> Scrape:
    """Read /metrics of a server now.

    Raises:
        OSError: it does not answer, or not with 200.
    """
    address = f"{url.rstrip('/')}/metrics"
    with direct().open(address, timeout=DEADLINE_S) as answer:
        return parse(answer.read().decode(), time.monotonic())


@cache
def direct() -> OpenerDirector:
    """Opens addresses of this machine: never through a proxy, whatever is set."""
    return build_opener(ProxyHandler({}))


def quantile(q: float, buckets: Mapping[float, float]) -> float:
    """Prometheus' `histogram_quantile` of cumulative counts by upper edge.

    A guess along a straight line within one bucket; beyond the last finite edge
    nothing is known, and that edge is all it can say. NaN of no values.
    """
    edges = sorted(buckets)
    # Scraped at one moment, but not atomically: a count may lag behind one below it.
    counts = list(accumulate((buckets[edge] for edge in edges), max))
    if len(edges) < 2 or edges[-1] != math.inf or not counts[-1] > 0:
        return math.nan
    rank = q * counts[-1]
    place = bisect_left(counts, rank, 0, len(counts) - 1)
    if place == len(counts) - 1:
        return edges[-2]
    low, below = (edges[place - 1], counts[place - 1]) if place else (0.0, 0.0)
    if counts[place] == below:  # q is 0, and so is the first count
        return math.nan
    return low + (edges[place] - low) * ((rank - below) / (counts[place] - below))


def share_under(limit: float, buckets: Mapping[float, float]) -> float:
    """The share of values up to a limit: exact if an edge lies on it, else a guess."""
    below, lower, total = 0.0, 0.0, max(buckets.values(), default=0.0)
    for edge, count in buckets.items():
        if limit <= edge and total:
            part = 0.0 if math.isinf(edge) else (limit - lower) / (edge - lower)
            return (below + part * (count - below)) / total
        below, lower = count, edge
    return math.nan
