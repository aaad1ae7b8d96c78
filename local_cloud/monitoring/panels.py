"""A dashboard as a table: what a panel asks, and two that can answer.

Every expression is PromQL text and stands once, in the table. `Prometheus` sends it to
a server; `Scraped` reads `/metrics` itself and evaluates the same text in this process.
`live`, `terminal` and `grafana` show the answers, and know nothing of where they are
from.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import OpenerDirector, ProxyHandler, build_opener

from local_cloud.monitoring.promql import Query
from local_cloud.monitoring.samples import Samples, Target

UNITS = ("req/s", "tokens/s", "s", "%", "x", "requests", "rows", "cores", "B")
KINDS = ("timeseries", "gauge")  # a gauge has a natural range: 0 to 1
TIMEOUT_S = 5.0
KEEP_S = 900.0  # of samples; a longer window sees what there is, as when just started
MOST_BYTES = 8_000_000  # of one answer
SHOWN_S = 180  # seconds, and points, that a view shows
NOTHING = (
    "Expected data, found none for any panel: the source answers, but has nothing of "
    "the API. Is the API up, and scraped under the job that the panels name?"
)

Values = list[float]  # one a series, in the order of the table; NaN is "no data"


class SourceError(RuntimeError):
    """No data, and why."""


@dataclass(frozen=True)
class Panel:
    """One picture: its curves by their legends, each a PromQL expression.

    An expression gives one number, so it sums or divides away all labels. The values
    of unit "%" are shares of one.
    """

    title: str
    unit: str
    answers: str  # the question somebody asks when looking at it
    series: Mapping[str, str]
    kind: str = "timeseries"

    def __post_init__(self) -> None:
        for what, found, known in (
            ("unit", self.unit, UNITS),
            ("kind", self.kind, KINDS),
        ):
            if found not in known:
                raise ValueError(
                    f"Expected a {what} of {', '.join(known)} for the panel "
                    f"{self.title!r}, found {found!r}."
                )
        if not self.series:
            raise ValueError(f"Expected an expression in {self.title!r}, found none.")


def expressions(panels: Iterable[Panel]) -> list[str]:
    """All expressions, in the order in which sources answer."""
    return [text for panel in panels for text in panel.series.values()]


class Source(Protocol):
    """Where the values come from."""

    name: str

    def read(self) -> Values:
        """All values now. Raises SourceError."""
        ...

    def past(self, seconds: int) -> list[tuple[float, Values]]:
        """What is known of the time before, a point a second. Raises SourceError."""
        ...


class Prometheus:
    """Asks a Prometheus server, all expressions in one query: one moment, one trip."""

    def __init__(self, url: str, panels: Sequence[Panel], job: str = "api") -> None:
        self.url, self.job = url.rstrip("/"), job
        self.name = f"Prometheus, {self.url}"
        texts = expressions(panels)
        self.count = len(texts) + 1  # the last one: whether the target is up
        self.query = " or ".join(
            f'label_replace({text}, "place", "{place}", "", "")'
            for place, text in enumerate([*texts, f'min(up{{job="{job}"}})'])
        )

    def read(self) -> Values:
        values = [math.nan] * self.count
        for series in self._ask("query", query=self.query):
            values[int(series["metric"]["place"])] = float(series["value"][1])
        *values, up = values
        if not up:  # what is left are the last minutes of a target that is gone
            raise SourceError(
                f"Expected Prometheus to reach the job {self.job!r}, found it down. "
                f"See {self.url}/targets"
            )
        return values

    def past(self, seconds: int) -> list[tuple[float, Values]]:
        end = int(time.time())
        times = range(end - seconds, end)
        rows = {at: [math.nan] * self.count for at in times}
        span = {"start": times[0], "end": times[-1], "step": 1}
        for series in self._ask("query_range", query=self.query, **span):
            for at, value in series["values"]:
                rows[int(at)][int(series["metric"]["place"])] = float(value)
        known = [at for at in times if any(map(math.isfinite, rows[at]))]
        return [(at, rows[at][:-1]) for at in times if known and at >= known[0]]

    def _ask(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        text = get(f"{self.url}/api/v1/{path}", urlencode(fields).encode())
        try:
            return json.loads(text)["data"]["result"]
        except (ValueError, KeyError, TypeError):
            raise SourceError(
                f"Expected an answer of Prometheus at {self.url}, found {text[:80]!r}."
            ) from None


class Scraped:
    """Reads `/metrics` once a look and evaluates in this process."""

    def __init__(self, url: str, panels: Sequence[Panel], job: str = "api") -> None:
        self.url = url
        self.name = f"{url}, without Prometheus"
        self.queries = [Query(text) for text in expressions(panels)]
        self.samples = Samples(KEEP_S)
        names = set().union(*(query.names for query in self.queries))
        host = urlsplit(url).netloc
        self.target = Target(self.samples, {"job": job, "instance": host}, names)

    def read(self) -> Values:
        now, text = time.monotonic(), None  # a step of the wall clock moves nothing
        try:
            text = get(self.url)
        finally:
            self.target.take(now, text)
            self.samples.forget(now - KEEP_S)
        return [self._value(query, now) for query in self.queries]

    def past(self, seconds: int) -> list[tuple[float, Values]]:
        return []  # nothing is known before the first look

    def _value(self, query: Query, now: float) -> float:
        value = query.at(self.samples, now)
        if isinstance(value, dict):
            return next(iter(value.values()), math.nan)
        return value


def source(url: str, panels: Sequence[Panel]) -> Source:
    """The source behind an address: a Prometheus, or an API with `/metrics`."""
    url = url.rstrip("/")
    try:
        get(f"{url}/api/v1/query", b"query=1")
    except SourceError:
        scraped = Scraped(f"{url.removesuffix('/metrics')}/metrics", panels)
        scraped.read()
        return scraped
    return Prometheus(url, panels)


@cache
def _opener() -> OpenerDirector:
    return build_opener(ProxyHandler({}))  # never through a proxy


def get(url: str, form: bytes | None = None) -> str:
    """The text at an address, or SourceError."""
    try:
        with _opener().open(url, form, timeout=TIMEOUT_S) as response:
            return response.read(MOST_BYTES).decode("utf-8", "replace")
    except HTTPError as error:
        found = f"{error.code} {error.read(200).decode('utf-8', 'replace')}"
    except (OSError, HTTPException, ValueError) as error:
        found = str(getattr(error, "reason", error)) or type(error).__name__
    where = url.partition("/api/v1/")[0]
    raise SourceError(
        f"Expected an answer from {where}, found: {found}. Is it up, and there?"
    )


class Watch:
    """The last minutes of a dashboard: a point a look, and what is wrong now."""

    def __init__(self, panels: Sequence[Panel], source: Source) -> None:
        self.panels, self.source = panels, source
        self.count = len(expressions(panels))
        self.points: deque[tuple[float, Values]] = deque(maxlen=SHOWN_S)
        self.fault = ""
        self.epoch = time.time() - time.monotonic()  # so that times only ascend

    def begin(self) -> None:
        """Take what the source knows already."""
        with suppress(SourceError):  # the first look says it
            self.points.extend(self.source.past(SHOWN_S))

    def look(self) -> None:
        """Add a point; without an answer it is a gap, and `fault` says why."""
        try:
            values = self.source.read()
            self.fault = "" if any(map(math.isfinite, values)) else NOTHING
        except SourceError as error:
            values = [math.nan] * self.count
            self.fault = str(error)
        self.points.append((self.epoch + time.monotonic(), values))

    def current(self) -> list[tuple[Panel, str, list[float]]]:
        """For each curve: its panel, its legend, its values, oldest first."""
        names = [(panel, legend) for panel in self.panels for legend in panel.series]
        columns = list(zip(*(values for _, values in self.points), strict=True))
        columns = columns or [()] * self.count
        return [
            (panel, legend, list(column))
            for (panel, legend), column in zip(names, columns, strict=True)
        ]
