"""A dashboard as a table: what a panel asks, and two that can answer.

Every expression is PromQL text and stands once, in the table. `Prometheus` sends it to
a server; `Scraped` reads `/metrics` itself and evaluates the same text in this process.
`live`, `terminal` and `grafana` show the answers, and know nothing of where they are
from.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request

from local_cloud.monitoring.promql import Query
from local_cloud.monitoring.samples import Samples, Target
from local_cloud.monitoring.scrape import direct

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
NEEDS_KEY = (
    "It wants a key that opens its metrics: name a file with one in METRICS_KEY_FILE "
    "(of docker-compose.yml: secrets/metrics_key), or look at its Prometheus instead."
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

    def __init__(
        self, url: str, panels: Sequence[Panel], job: str = "api", key: str = ""
    ) -> None:
        self.url, self._key = url, key
        self.name = f"{url}, without Prometheus"
        self.queries = [Query(text) for text in expressions(panels)]
        self.samples = Samples(KEEP_S)
        names = set().union(*(query.names for query in self.queries))
        host = urlsplit(url).netloc
        self.target = Target(self.samples, {"job": job, "instance": host}, names)

    def read(self) -> Values:
        now, text = time.monotonic(), None  # a step of the wall clock moves nothing
        try:
            text = get(self.url, key=self._key)
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
        at = f"{url.removesuffix('/metrics')}/metrics"
        scraped = Scraped(at, panels, key=metrics_key())
        scraped.read()
        return scraped
    return Prometheus(url, panels)


def get(url: str, form: bytes | None = None, key: str = "") -> str:
    """The text at an address, or SourceError."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    advice = "Is it up, and there?"
    try:
        asked = Request(url, form, headers)
        with direct().open(asked, timeout=TIMEOUT_S) as response:
            return response.read(MOST_BYTES).decode("utf-8", "replace")
    except HTTPError as error:
        found = f"{error.code} {error.read(200).decode('utf-8', 'replace')}"
        if error.code in (401, 403):
            found, advice = f"{error.code}, a closed door", NEEDS_KEY
    except (OSError, HTTPException, ValueError) as error:
        found = str(getattr(error, "reason", error)) or type(error).__name__
    where = url.partition("/api/v1/")[0]
    raise SourceError(f"Expected an answer from {where}, found: {found}. {advice}")


def metrics_key() -> str:
    """The key in the file that METRICS_KEY_FILE names; "" if it names none."""
    path = os.environ.get("METRICS_KEY_FILE")
    if not path:
        return ""
    try:
        key, found = Path(path).read_text("ascii").strip(), "something else"
    except (OSError, UnicodeDecodeError) as error:
        key, found = "", str(error)
    if not re.fullmatch(r"\S+", key):
        raise SourceError(
            f"METRICS_KEY_FILE={path}: expected a file with one key, found {found}. "
            "Name the file that Prometheus reads: secrets/metrics_key."
        )
    return key


class Watch:
    """The last minutes of a dashboard: a point a look, and what is wrong now."""

    def __init__(self, panels: Sequence[Panel], source: Source) -> None:
        self.panels, self.source = panels, source
        self.count = len(expressions(panels))
        # Both in one, and replaced, never changed: whoever reads it while another
        # thread looks gets a fault and the points that it is about.
        self.shown: tuple[list[tuple[float, Values]], str] = [], ""
        self.epoch = time.time() - time.monotonic()  # so that times only ascend

    @property
    def points(self) -> list[tuple[float, Values]]:
        """When, and the values then, oldest first."""
        return self.shown[0]

    @property
    def fault(self) -> str:
        """What is wrong now, or ""."""
        return self.shown[1]

    def begin(self) -> None:
        """Take what the source knows already."""
        with suppress(SourceError):  # the first look says it
            self.shown = self.source.past(SHOWN_S), ""

    def look(self) -> None:
        """Add a point; without an answer it is a gap, and `fault` says why."""
        try:
            values = self.source.read()
            fault = "" if any(map(math.isfinite, values)) else NOTHING
        except SourceError as error:
            values, fault = [math.nan] * self.count, str(error)
        now = self.epoch + time.monotonic(), values
        self.shown = [*self.points, now][-SHOWN_S:], fault

    def current(self) -> list[tuple[Panel, str, list[float]]]:
        """For each curve: its panel, its legend, its values, oldest first."""
        names = [(panel, legend) for panel in self.panels for legend in panel.series]
        columns = list(zip(*(values for _, values in self.points), strict=True))
        columns = columns or [()] * self.count
        return [
            (panel, legend, list(column))
            for (panel, legend), column in zip(names, columns, strict=True)
        ]
