"""A local model beside the cloud: who answers is decided elsewhere, here it is done.

`Router` does it for real calls, `replay` for a day of them in virtual time. Both tell a
`decide` the same `Situation` and expect the same time of the local model.
"""

from __future__ import annotations

import heapq
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Place = Literal["local", "cloud", "nowhere"]


@dataclass(frozen=True)
class Situation:
    """What is known when a call comes."""

    local_s: float | None  # expected until a whole local answer; None: it is down
    cloud_up: bool
    call_usd: float  # what this call would cost in the cloud
    spent_usd: float  # there, today


@dataclass(frozen=True)
class Route:
    """Where a call goes, and why."""

    where: Place
    why: str


LATE_S = 10.0  # after which a caller has gone
Decide = Callable[[Situation], Route]


def expected_s(in_flight: int, slots: int, service_s: float) -> float:
    """Until a whole local answer, with so many calls there already."""
    return service_s * (1 + max(0, in_flight - slots + 1) / slots)


# Real calls.


@dataclass(frozen=True)
class Decision:
    """One decision and what came of it. One line of the log."""

    where: Place
    why: str
    expected_s: float | None
    took_s: float
    outcome: str  # "ok", or the name of the exception
    spent_usd: float  # of all calls so far

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


class Refused(Exception):
    """Nobody could answer this call in time, or for the money. The message says why."""


class Router:
    """Sends each call where `decide` says; one that failed there is decided again.

    `local` and `cloud` take a text and give a value, or raise one of `failures`. A side
    that failed counts as down for `pause_s`. Safe to call from many threads.
    """

    def __init__(
        self,
        local: Callable[[str], Any],
        cloud: Callable[[str], Any],
        decide: Decide,
        *,
        slots: int,
        service_s: float,
        call_usd: float,
        failures: tuple[type[Exception], ...],
        log: Callable[[Decision], Any],
        pause_s: float = 30.0,
    ) -> None:
        self._ask = {"local": local, "cloud": cloud}
        self._decide, self._failures, self._log = decide, failures, log
        self._slots, self._service_s = slots, service_s
        self._call_usd, self._pause_s = call_usd, pause_s
        self._down_until = {"local": 0.0, "cloud": 0.0}
        self._in_flight, self._spent_usd = 0, 0.0
        self._lock = threading.Lock()

    def __call__(self, text: str) -> Any:
        """The value for `text`.

        Raises:
            Refused: the decision was to send it nowhere.
        """
        while True:
            now, route = self._routed()
            start = time.monotonic()
            outcome = "ok"
            try:
                if route.where == "nowhere":
                    raise Refused(route.why)
                return self._ask[route.where](text)
            except self._failures as failure:
                outcome = type(failure).__name__
                self._down_until[route.where] = time.monotonic() + self._pause_s
            except Exception as mistake:
                outcome = type(mistake).__name__
                raise
            finally:
                self._settled(now, route, time.monotonic() - start, outcome)

    def _routed(self) -> tuple[Situation, Route]:
        """The decision, and its place taken."""
        with self._lock:
            up = {k: time.monotonic() >= v for k, v in self._down_until.items()}
            local_s = expected_s(self._in_flight, self._slots, self._service_s)
            now = Situation(
                local_s if up["local"] else None,
                up["cloud"],
                self._call_usd,
                self._spent_usd,
            )
            route = self._decide(now)
            self._in_flight += route.where == "local"
            self._spent_usd += self._call_usd * (route.where == "cloud")
        return now, route

    def _settled(
        self, now: Situation, route: Route, took_s: float, outcome: str
    ) -> None:
        with self._lock:
            self._in_flight -= route.where == "local"
            spent = self._spent_usd
        self._log(Decision(route.where, route.why, now.local_s, took_s, outcome, spent))


# A day of calls, in virtual time.


Span = tuple[float, float]  # seconds of the day


@dataclass(frozen=True)
class Sides:
    """The two sides on that day."""

    slots: int  # calls that the local model answers at once
    service_s: Sequence[float]  # each as measured, with all slots busy
    local_usd_per_hour: float
    cloud_s: float  # a whole answer of the cloud (emulated)
    call_usd: float
    local_down: Span
    cloud_down: Span

    @property
    def typical_s(self) -> float:
        """The median service time."""
        return statistics.median(self.service_s)


@dataclass
class Replayed:
    """What came of a day."""

    latencies_s: list[float] = field(default_factory=list)  # of the calls answered
    routes: Counter[Route] = field(default_factory=Counter)
    cloud_usd: float = 0.0

    @property
    def refused(self) -> int:
        return sum(n for r, n in self.routes.items() if r.where == "nowhere")

    @property
    def p95_s(self) -> float:
        """95 of 100 answers were there after so many seconds."""
        ordered = sorted(self.latencies_s)
        return ordered[int(0.95 * (len(ordered) - 1))]


def replay(
    times: Sequence[float], decide: Decide, sides: Sides, *, seed: int = 0
) -> Replayed:
    """Let calls come at these times. First come, first served; a slot each.

    Service times are drawn from those measured. An outage is known at once, and what
    the local model has begun before one, it ends.
    """
    chance, told = random.Random(seed), Replayed()
    typical_s = sides.typical_s
    free = [0.0] * sides.slots  # when each slot is free
    under_way: list[float] = []  # when each call that is there ends
    for now in times:
        while under_way and under_way[0] <= now:
            heapq.heappop(under_way)
        local_s = expected_s(len(under_way), sides.slots, typical_s)
        situation = Situation(
            None if within(now, sides.local_down) else local_s,
            not within(now, sides.cloud_down),
            sides.call_usd,
            told.cloud_usd,
        )
        route = decide(situation)
        told.routes[route] += 1
        if route.where == "local":
            end = max(now, heapq.heappop(free)) + chance.choice(sides.service_s)
            heapq.heappush(free, end)
            heapq.heappush(under_way, end)
            told.latencies_s.append(end - now)
        elif route.where == "cloud":
            told.latencies_s.append(sides.cloud_s)
            told.cloud_usd += sides.call_usd
    return told


def compare(
    times: Sequence[float], decide: Decide, sides: Sides
) -> dict[str, Replayed]:
    """The day with the local model alone, with the cloud alone, and with both.

    Alone, the local model refuses what would come later than `LATE_S`.
    """

    def local_only(now: Situation) -> Route:
        in_time = now.local_s is not None and now.local_s <= LATE_S
        return Route("local", "only") if in_time else Route("nowhere", "down or late")

    def cloud_only(now: Situation) -> Route:
        return Route("cloud", "only") if now.cloud_up else Route("nowhere", "down")

    ways = {"local only": local_only, "cloud only": cloud_only, "hybrid": decide}
    return {name: replay(times, way, sides) for name, way in ways.items()}


def within(now: float, span: Span) -> bool:
    """Whether a time lies in a span."""
    return span[0] <= now < span[1]
