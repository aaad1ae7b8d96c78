"""Histories of counters, minute by minute, and what alert rules say to them.

    series = history(slo, [Phase(420, 1000), Phase(30, 1000, 0.6)])
    watch(call, series, start=420).must_fire("page", 1008, "a fault", because="...")

The course's own evaluator looks at the rules, once a minute, in no time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from local_cloud.monitoring.alerting import Rules
from local_cloud.monitoring.objectives import DAY_S, SLO, Selector
from local_cloud.monitoring.samples import Labels, Samples, labelled
from tests.graders.plugin import Call, Failed

MINUTE_S = 60.0
EARLY_S, LATE_S = MINUTE_S, 3 * MINUTE_S


@dataclass(frozen=True)
class Phase:
    """So many minutes with so many requests in each, of which a share is bad."""

    minutes: int
    requests: float
    bad: float = 0.0


Series = dict[Labels, list[float]]


def history(
    slo: SLO,
    phases: Sequence[Phase],
    job: str = "api",
    restarts: Mapping[str, Sequence[int]] | None = None,
) -> Series:
    """The counters of two replicas, minute by minute; and such as are not counted.

    `restarts`: by instance the minutes at which it begins again at zero.
    """
    found: Series = {}
    for instance in ("a", "b"):
        own = {"job": job, "instance": instance}
        again = (restarts or {}).get(instance, ())
        for selector, part in counters(slo):
            increases = [
                p.requests / 2 * part(p.bad) for p in phases for _ in range(p.minutes)
            ]
            labels = labelled(selector.metric, {**selector.matchers, **own})
            found[labels] = counted(increases, again)
            aside = {**selector.matchers, **own, "path": "/elsewhere"}
            failing = [9 * part(1.0)] * len(increases)
            found[labelled(selector.metric, aside)] = counted(failing, ())
    return found


def counters(slo: SLO) -> list[tuple[Selector, Callable[[float], float]]]:
    """The series of an objective, and how many of its events each counts."""
    if slo.bad:
        metric, matchers = slo.total.metric, slo.total.matchers
        good, busy, down = (
            Selector(metric, {**matchers, "code": code})
            for code in ("200", "503", "500")
        )
        half: Callable[[float], float] = lambda bad: bad / 2  # noqa: E731
        return [(good, lambda bad: 1 - bad), (busy, half), (down, half)]
    assert slo.good is not None
    return [(slo.good, lambda bad: 1 - bad), (slo.total, lambda _: 1.0)]


def counted(increases: Iterable[float], restarts: Sequence[int]) -> list[float]:
    values = [0.0]
    for minute, increase in enumerate(increases, 1):
        values.append((0.0 if minute in restarts else values[-1]) + increase)
    return values


Firing = list[tuple[str, str]]  # severity and job of each alert


@dataclass(frozen=True)
class Watched:
    """What fired at each minute that was looked at."""

    call: Call
    minutes: Mapping[int, Firing]

    def first(self, severity: str) -> float:
        """The first second at which an alert of this severity fires, or infinity."""
        found = (m for m, firing in self.minutes.items() if fires(firing, severity))
        return MINUTE_S * next(found, math.inf)

    def must_be_silent(self, what: str, because: str) -> None:
        loud = {m: firing for m, firing in self.minutes.items() if firing}
        got = "silence" if not loud else f"{_shown(loud)} (minute {min(loud)})"
        self.call.must(not loud, f"no alert in {what}", because, got=got)

    def must_fire(self, severity: str, due_s: float, what: str, because: str) -> None:
        """Not before it is due, as far as minutes can tell, and soon after."""
        found = self.first(severity)
        low, high = due_s - EARLY_S, due_s + LATE_S
        got = "silence" if math.isinf(found) else f"one after {found:.0f} s"
        expected = f"a {severity} in {what} after {low:.0f} to {high:.0f} s"
        self.call.must(low <= found <= high, expected, because, got=got)


def fires(firing: Firing, severity: str) -> bool:
    return any(kind == severity for kind, _ in firing)


def _shown(loud: Mapping[int, Firing]) -> str:
    return ", ".join(f"a {severity} of {job}" for severity, job in loud[min(loud)])


def watch(
    call: Call, series: Series, start: int, looks: Iterable[int] | None = None
) -> Watched:
    """Evaluates the rules that a call gave, at minutes that count from `start`."""
    try:
        rules = Rules([{"rules": call.value}])
    except (ValueError, AttributeError, TypeError) as error:
        raise Failed(
            f"called {call.text}, expected PromQL that the evaluator has because the "
            f"rules are to be tried, got {type(error).__name__}: {error}"
        ) from None
    samples, last = Samples(2 * DAY_S), max(map(len, series.values()))
    looks = range(1, last - start) if looks is None else looks
    firing: dict[int, Firing] = {}
    done = 0
    for look in looks:
        for minute in range(done, start + look + 1):
            for labels, values in series.items():
                if minute < len(values):
                    samples.add(labels, MINUTE_S * minute, values[minute])
        done = start + look + 1
        rules.evaluate(samples, MINUTE_S * (start + look))
        firing[look] = sorted(
            (alert.labels["severity"], alert.labels.get("job", "no job"))
            for alert in rules.alerts()
            if alert.state == "firing"
        )
    return Watched(call, firing)


def around(due_s: float) -> range:
    """Minutes from a while before something is due to a while after."""
    due = round(due_s / MINUTE_S)
    return range(max(1, due - 12), due + 8)
