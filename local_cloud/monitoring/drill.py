"""Faults on purpose: when somebody should hear of each, and when somebody did.

A `Fault` knows how to begin and end and when its alert is due. `run` begins several at
once, each under a job of its own, ends each when its alert was heard of, waits until it
is resolved, and gives an `Outcome` for each. Whatever happens, every fault is ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from course.draw import COLOURS, INK, lines
from course.process import wait_until
from course.show import Cell, Table
from local_cloud.monitoring.ground import Ground
from local_cloud.monitoring.receivers import Notification
from local_cloud.monitoring.stack import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The bars: how long before and after the prediction an alert may come. What is due soon
# may not come in half the time, or it could be found before it was broken.
EARLY_S, LATE_S = 3.0, 4.0
LOOK_S = 0.1
PATIENCE_S = 15.0  # beyond the prediction; then the alert is missing
RESOLVE_S = 180.0  # that an alert may take to end: a window of drift lasts 150

Burns = dict[str, tuple[list[float], list[float]]]  # by fault: times, burn rates


@dataclass(frozen=True)
class Fault:
    """One fault. `predict(history_s)` gives the seconds until its alert fires.

    A fault with `lasts_s` is a blip, and nobody must be woken.
    """

    name: str
    job: str
    alert: str
    predict: Callable[[float], float]
    start: Callable[[], object]
    stop: Callable[[], object]
    severity: str = "page"
    lasts_s: float | None = None
    barred: bool = False  # whether the bars are for it
    struck: Callable[[], int] | None = None  # requests, until now

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells its alert from others."""
        return self.alert, self.job, self.severity


@dataclass(frozen=True)
class Outcome:
    """What became of a fault; seconds from its start, or None if it did not happen."""

    fault: Fault
    began_at: float  # seconds since 1970
    lasted_s: float
    predicted_s: float
    measured_s: float | None
    told_s: Mapping[str, float] = field(default_factory=dict)  # by webhook, by mail
    resolved_s: float | None = None  # from the end of the fault
    struck: int | None = None  # requests, where it strikes them one by one

    @property
    def late_s(self) -> float | None:
        """Measured minus predicted; None if nothing fired."""
        return None if self.measured_s is None else self.measured_s - self.predicted_s

    @property
    def good(self) -> bool:
        """Found within the bars, told and resolved; or silent, if it was a blip."""
        if self.fault.lasts_s is not None:
            return self.measured_s is None and self.struck != 0
        if self.late_s is None or self.resolved_s is None or not self.told_s:
            return False
        early_s = min(EARLY_S, self.predicted_s / 2)
        return not self.fault.barred or -early_s <= self.late_s <= LATE_S


class _Trial:
    """A fault under way."""

    def __init__(self, fault: Fault, history_s: float) -> None:
        self.fault = fault
        self.predicted_s = fault.predict(history_s)
        self.measured_s = self.ended_s = self.resolved_s = None
        self.struck = fault.struck() if fault.struck else 0
        fault.start()
        self.began, self.began_at = time.monotonic(), time.time()

    @property
    def done(self) -> bool:
        if self.ended_s is None:
            return False
        since = time.monotonic() - self.began - self.ended_s
        if self.measured_s is None:  # a blip, or missed: is it still to come?
            return since > (self.predicted_s if self.fault.lasts_s else 0)
        return self.resolved_s is not None or since > RESOLVE_S

    def look(self, firing: bool, heard: Sequence[Notification]) -> None:
        """Note what is new; end the fault if its time has come."""
        now = time.monotonic() - self.began
        if firing and self.measured_s is None:
            self.measured_s = now
        if self.ended_s is None:
            lasts = self.fault.lasts_s
            patience = self.predicted_s + PATIENCE_S if lasts is None else lasts
            if now >= patience or (lasts is None and firing and self.told(heard)):
                self.fault.stop()
                self.ended_s = time.monotonic() - self.began
        elif self.measured_s is not None and not firing and self.resolved_s is None:
            self.resolved_s = now - self.ended_s

    def told(self, heard: Sequence[Notification]) -> dict[str, float]:
        """When each receiver first heard of it."""
        told: dict[str, float] = {}
        for one in heard:
            ours = (one.alert, one.job, one.severity) == self.fault.key
            if ours and one.status == "firing" and one.at >= self.began_at:
                told.setdefault(one.by, one.at - self.began_at)
        return told

    def outcome(self, heard: Sequence[Notification]) -> Outcome:
        return Outcome(
            self.fault,
            self.began_at,
            self.ended_s or 0.0,
            self.predicted_s,
            self.measured_s,
            self.told(heard),
            self.resolved_s,
            self.fault.struck() - self.struck if self.fault.struck else None,
        )


def errors(
    ground: Ground,
    job: str,
    share: float,
    predict: Callable[[float], float],
) -> Fault:
    """A share of all requests through an edge is answered 500."""
    edge = ground.edges[job]
    return Fault(
        f"errors, {share:.0%}",
        job,
        "AvailabilityBurn",
        predict,
        partial(edge.inject, errors=share),
        edge.clear,
        barred=True,
        struck=lambda: edge.injected,
    )


def blip(
    ground: Ground, job: str, requests: int, predict: Callable[[float], float]
) -> Fault:
    """So many requests in a row are answered 500, and then no more."""
    whole = errors(ground, job, 1.0, predict)
    return replace(
        whole,
        name=f"errors, {requests} in a row",
        start=partial(ground.edges[job].inject, errors=1.0, most=requests),
        lasts_s=(requests + 1) / ground.rate,
        barred=False,
    )


def freeze(ground: Ground, job: str, predict: Callable[[float], float]) -> Fault:
    """The server behind an edge is stopped: nothing fails until the edge gives up."""
    server, waits_s = ground.servers[ground.jobs[job]], ground.edges[job].timeout_s
    return Fault(
        "server stopped (SIGSTOP)",
        job,
        "AvailabilityBurn",
        # While they wait nothing is counted, neither good nor bad.
        lambda history_s: waits_s + predict(history_s),
        server.freeze,
        server.thaw,
        barred=True,
    )


def run(ground: Ground, faults: Sequence[Fault], history_s: float) -> list[Outcome]:
    """Begins all faults now, and waits until each has been found and resolved.

    Args:
        ground: where it happens.
        faults: at most one for each job and alert.
        history_s: for how long good traffic has been watched.

    Raises StackError if who watches is gone, TimeoutError if an alert that is waited
    for fires already and does not end; all faults are ended first.
    """
    wanted = {fault.key for fault in faults}
    quiet = (
        f"none of {sorted(wanted)} to fire before the drill (a machine too busy for "
        "light traffic keeps no promise: end other programs first)"
    )
    before = time.monotonic()
    wait_until(lambda: not wanted & seen(ground.watch.alerts()), RESOLVE_S, quiet)
    history_s += time.monotonic() - before
    with ExitStack() as ending:
        trials: list[_Trial] = []
        for fault in faults:
            ending.callback(fault.stop)  # also if its start fails
            trials.append(_Trial(fault, history_s))
        while not all(trial.done for trial in trials):
            time.sleep(LOOK_S)
            firing = seen(ground.watch.alerts())
            for trial in trials:
                trial.look(trial.fault.key in firing, ground.notifications)
    return [trial.outcome(ground.notifications) for trial in trials]


@dataclass(frozen=True)
class Plan:
    """Where and how a drill begins."""

    groups: Sequence[Group]
    scale: float
    history_s: float  # of good traffic before anything breaks
    share: float  # of requests that fail
    due_s: Callable[[float, float], float]  # by share of errors and history


@dataclass(frozen=True)
class Rehearsal:
    """What came of it."""

    outcomes: list[Outcome]
    curves: Burns
    by: str  # who watched
    page: str  # the words of that for the errors, if there was one


def rehearse(plan: Plan, ratio: str, budget: float) -> Rehearsal:
    """Errors, a stopped server and a blip, all at one time on a ground of their own.

    `ratio` is the recorded share of errors whose curves are drawn.
    """
    jobs = {"errors": "api", "blip": "api", "stopped": "api-2"}
    with Ground(plan.groups, jobs, scale=plan.scale, edges_s=(2.5,)) as ground:
        time.sleep(plan.history_s)
        all_s = partial(plan.due_s, 1.0)
        faults = [
            errors(ground, "errors", plan.share, partial(plan.due_s, plan.share)),
            freeze(ground, "stopped", all_s),
            blip(ground, "blip", 1, all_s),
        ]
        outcomes = run(ground, faults, plan.history_s)
        curves = burn_curves(ground, outcomes, ratio, budget)
        heard = ground.notifications
    own = (n for n in heard if (n.alert, n.job, n.severity) == faults[0].key)
    page = next((n.summary for n in own), "")
    return Rehearsal(outcomes, curves, type(ground.watch).__name__, page)


def seen(alerts: Sequence[Mapping[str, Any]]) -> set[tuple[str, str, str]]:
    """Name, job and severity of all that fire."""
    return {
        (of["alertname"], of.get("job", ""), of.get("severity", ""))
        for alert in alerts
        if alert["state"] == "firing" and (of := alert["labels"])
    }


def pages(notifications: Sequence[Notification], job: str) -> list[str]:
    """The pages for a job: under good traffic each of them is a false one."""
    return [
        one.alert
        for one in notifications
        if one.job == job and one.severity == "page" and one.status == "firing"
    ]


def leak_s(
    used: float,
    rate: float,
    limit: float,
    window_s: float,
    later_s: float,
    wait_s: float,
) -> Callable[[float], float]:
    """When `predict_linear` over a window passes a limit, if memory grows from now on.

    A line is fitted to a level that turns into a ramp. With the ramp in the last part
    x of the window, its slope is rate * x^2 * (3 - 2 x), and at the end of the window
    it stands at the mean, rate * window * x^2 / 2 above the level, plus half a window
    of that slope.
    """

    def predict(history_s: float) -> float:
        for tenth in range(10_000):
            since = tenth / 10
            window = min(window_s, history_s + since)
            x = min(1.0, since / window) if window else 0.0
            slope = rate * x * x * (3 - 2 * x)
            line = used + rate * window * x * x / 2 + slope * (window / 2 + later_s)
            if line > limit:
                return since + wait_s
        return math.inf

    return predict


def table(outcomes: Sequence[Outcome], title: str) -> Table:
    """A row for each fault."""
    columns = ["fault", ("hit", "requests"), ("predicted", "s"), ("measured", "s")]
    columns += ["alert", ("webhook", "s"), ("mail", "s")]
    columns += [("resolved", "s after it"), "as promised"]
    rows: list[list[Cell]] = []
    for one in outcomes:
        silent = one.fault.lasts_s is not None
        predicted = "silence" if silent else _shown(one.predicted_s)
        row: list[Cell] = [one.fault.name, one.struck, predicted]
        row += [_shown(one.measured_s), one.fault.alert if one.measured_s else "none"]
        row += [_shown(one.told_s.get(by)) for by in ("webhook", "mail")]
        rows.append([*row, _shown(one.resolved_s), one.good])
    note = (
        f"As promised: at most {EARLY_S:g} s, and half the time, before the prediction "
        f"and {LATE_S:g} s after it for errors and a stopped server, at all for the "
        "others; told, and resolved after it; silence for a blip."
    )
    return Table(title, columns, rows, note)


def _shown(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f}"


def burn_curves(
    ground: Ground, outcomes: Sequence[Outcome], expr: str, budget: float
) -> Burns:
    """The burn rate of each fault against seconds since it began.

    `expr` is the recorded ratio of one window; its series are told apart by `job`.
    """
    curves: Burns = {}
    step = 30 / ground.scale
    for one in outcomes:
        end = one.began_at + one.lasted_s + (one.resolved_s or 5) + 2
        found = ground.watch.query_range(expr, one.began_at - 5, end, step)
        for series in found:
            if series["metric"].get("job") == one.fault.job:
                points = [
                    (at - one.began_at, float(v) / budget) for at, v in series["values"]
                ]
                known = [(at, burn) for at, burn in points if not math.isnan(burn)]
                curves[one.fault.name] = tuple(map(list, zip(*known, strict=True)))  # type: ignore[assignment]
    return curves


def draw(
    ax: Axes,
    curves: Burns,
    outcomes: Sequence[Outcome],
    limit: float,
) -> None:
    """Burn rates against time, the alert's limit, and where it fired."""
    lines(
        ax,
        curves,
        x="seconds since the fault began",
        y="burn rate (times the budget)",
        title="A burning budget, and when somebody hears of it",
    )
    for line in ax.get_lines():
        line.set_marker("")
    ax.axhline(limit, color=INK, linewidth=1, linestyle=":")
    ax.annotate(f"limit {limit:g}", (ax.get_xlim()[0], limit), va="bottom")
    fired = {one.fault.name: one.measured_s for one in outcomes}
    for place, (name, (times, burns)) in enumerate(curves.items()):
        if (at := fired.get(name)) is not None:
            apart = [abs(time - at) for time in times]
            burn = burns[apart.index(min(apart))]
            ax.plot(at, burn, "D", color=COLOURS[place % len(COLOURS)], mec=INK)
            ax.annotate("alert", (at, burn), (8, -4), textcoords="offset points")
