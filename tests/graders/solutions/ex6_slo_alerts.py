"""Exercise 6: alerts that wake somebody for the right reason.

Goal      Turn what was promised to the users of an API into data, the data into alert
          rules, and say beforehand when they fire, what is left, and who is told.
Why       An alert that cries wolf is switched off; one that can never fire looks like
          peace. Both look alright in a review, and differ in effect alone.
Points    25, of which 2 need promtool; without it they stay open
Minutes   90
Before    monitoring_setup.py, section 3; local_cloud/monitoring/objectives.py
Check     python -m exercises check 6      (or at each save: watch 6)
Try it    python -m exercises.ex6_slo_alerts

The service is not the lesson's: it promises for four weeks, other shares of its budget
matter, and at night hardly anybody is there.
"""

from __future__ import annotations

# BEGIN SOLUTION
import math

# END SOLUTION
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from local_cloud.monitoring.objectives import DAY_S, SLO, Selector

HOUR_S = 3600.0
PERIOD_S = 28 * DAY_S
ROUTE = {"route": "/v1/embeddings"}
REQUESTS = Selector("gateway_requests_total", ROUTE)
EDGES_S = (0.1, 0.25, 0.5, 1.0, 2.5)  # the labels `le` of the histogram
LEAST = 20  # requests; of fewer in the long window no share is worth waking for


@dataclass(frozen=True)
class Spend:
    """Somebody is told when this share of the budget goes within this time."""

    severity: str  # "page" wakes somebody, "ticket" waits for the morning
    share: float
    within_s: float  # the long window; the short one is a twelfth of it


SPENDS = (
    Spend("page", 0.05, HOUR_S),
    Spend("page", 0.10, 6 * HOUR_S),
    Spend("ticket", 0.10, DAY_S),
)


def objectives() -> Sequence[SLO]:
    """The two promises of an embeddings API, for 28 days each.

    `answers`: 99.5 % of `REQUESTS` end without a fault of the server. Any code from 500
    to 599 is one; what the caller got wrong is none. Their labels are route, code,
    method and instance.

    `fast`: 98 % of the same requests take half a second at most. They are measured by
    the histogram gateway_seconds, with the label route and `EDGES_S`.

    Checked: names, shares, period; and, by effect, that of many series each promise
    counts those that it is about, as events and as bad ones.
    """
    # TODO(1): two SLO(...), each with a total and either its good or its bad.
    # BEGIN SOLUTION
    return (
        SLO(
            name="answers",
            objective=0.995,
            description="requests that no fault of the server ends",
            total=REQUESTS,
            bad=Selector(REQUESTS.metric, ROUTE | {"code": "~5.."}),
            period_s=PERIOD_S,
        ),
        SLO(
            name="fast",
            objective=0.98,
            description="requests that take half a second at most",
            total=Selector("gateway_seconds_count", ROUTE),
            good=Selector("gateway_seconds_bucket", ROUTE | {"le": "0.5"}),
            period_s=PERIOD_S,
        ),
    )
    # END SOLUTION


# BEGIN SOLUTION
@dataclass(frozen=True)
class Watch:
    """A pair of windows, and the share of bad events that is too much in both."""

    severity: str
    limit: float
    long_s: float

    @property
    def short_s(self) -> float:
        return self.long_s / 12


def watches(slo: SLO) -> list[Watch]:
    """What `SPENDS` means for an objective. Raises ValueError where one never fires."""
    found = []
    for spend in SPENDS:
        burn = spend.share * slo.period_s / spend.within_s
        limit = burn * slo.budget
        if limit >= 1:
            raise ValueError(
                f"Expected an objective of {slo.name} above {1 - 1 / burn:.2%}, found "
                f"{slo.objective:.2%}. Even if all fails, {spend.share:.0%} of its "
                f"budget do not go in {spend.within_s:g} s: promise more."
            )
        found.append(Watch(spend.severity, limit, spend.within_s))
    return found


# END SOLUTION
def rules(slo: SLO) -> list[dict[str, Any]]:
    """Prometheus rules, recording or alerting, that watch over any objective.

    Alerts are named BudgetBurn and have the labels severity, slo (the objective's
    name), and, from the series, job.

    Checked by effect, with the course's own evaluator and, if installed, promtool:
    - each of `SPENDS` fires when the long window crosses its limit, neither sooner nor
      more than three minutes later, and only if the short window is above it, too;
    - one fault is one page, however many windows it crosses;
    - a blip is nobody's business; when the fault is over, so is the page, as soon as
      the short window has seen enough of that;
    - counters that restart at zero, one replica after the other, change nothing;
    - with fewer than `LEAST` requests in the long window it is silent, with more not;
    - a job that fails alone is found, however much the others serve;
    - ValueError for an objective for which one of `SPENDS` could never fire.
    """
    # TODO(2a): how many times too fast does each of SPENDS burn, and which share of
    # bad requests is that? Then write it in PromQL: rate first, then sum.
    # BEGIN SOLUTION
    by_severity: dict[str, list[str]] = {}
    for watch in watches(slo):
        enough = f"{_sum('increase', slo.total, watch.long_s)} >= {LEAST}"
        parts = [_above(slo, s, watch.limit) for s in (watch.long_s, watch.short_s)]
        pair = " and ".join([*parts, enough])
        by_severity.setdefault(watch.severity, []).append(f"({pair})")
    return [
        {
            "alert": "BudgetBurn",
            "expr": " or ".join(pairs),
            "labels": {"severity": severity, "slo": slo.name},
            "annotations": {"summary": f"{slo.description}: the budget burns"},
        }
        for severity, pairs in by_severity.items()
    ]
    # END SOLUTION


# BEGIN SOLUTION
def _sum(function: str, selector: Selector, window_s: float) -> str:
    return f"sum by (job) ({function}({selector.promql()}[{window_s:.0f}s]))"


def _above(slo: SLO, window_s: float, limit: float) -> str:
    """Whether the share of bad events is above a limit."""
    counted = slo.bad or slo.good
    assert counted is not None  # an SLO counts one or the other
    share = f"{_sum('rate', counted, window_s)} / {_sum('rate', slo.total, window_s)}"
    return f"{share} > {limit:.9g}" if slo.bad else f"1 - {share} > {limit:.9g}"


# END SOLUTION
def detection_s(slo: SLO, share: float, already: float = 0.0) -> float:
    """Seconds from the start of a fault to the page of `rules`.

    Traffic is even. `already` of the requests were bad for a day; then the fault makes
    it `share` of them.

    Checked: within 1 %; 0 where the page fires already, infinity where it never will.
    """
    # TODO(2b): x of the long window has the one share, the rest the other. Mind which
    # of SPENDS page.
    # BEGIN SOLUTION
    return min(
        _crossed_s(watch, share, already)
        for watch in watches(slo)
        if watch.severity == "page"
    )
    # END SOLUTION


# BEGIN SOLUTION
def _crossed_s(watch: Watch, share: float, already: float) -> float:
    if already > watch.limit:
        return 0.0
    if share <= watch.limit:
        return math.inf
    return watch.long_s * (watch.limit - already) / (share - already)


# END SOLUTION
def budget_left(slo: SLO, days: Sequence[tuple[float, float]]) -> float:
    """The share of the error budget that is left, of (requests, bad ones) by the day.

    The newest day comes last. Only those within the objective's period count.

    Checked: 1 where nothing was spent or nobody came, below 0 where more was spent
    than there was.
    """
    # TODO(3a): the budget is a number of requests, not a mean of daily shares.
    # BEGIN SOLUTION
    counted = days[-round(slo.period_s / DAY_S) :]
    requests, bad = (sum(day[i] for day in counted) for i in (0, 1))
    return 1 - bad / (requests * slo.budget) if requests else 1.0
    # END SOLUTION


def receiver(
    alert: Mapping[str, str], firing: Sequence[Mapping[str, str]]
) -> str | None:
    """Who is told of an alert, given the labels of all that fire, itself included.

    A page goes to the "pager", a ticket to the "tracker", and the alert named Watchdog
    to the "deadman", which raises the alarm when it falls silent.

    Checked: None for a ticket while a page of the same slo and job fires, because
    whoever is awake knows; an alert with no severity, or one that nobody thought of, is
    told to somebody who is awake.
    """
    # TODO(3b): what may be withheld, and what must reach somebody all the same?
    # BEGIN SOLUTION
    if alert.get("alertname") == "Watchdog":
        return "deadman"
    if alert.get("severity") != "ticket":
        return "pager"

    def covers(other: Mapping[str, str]) -> bool:
        same = all(alert.get(name) == other.get(name) for name in ("slo", "job"))
        return same and other.get("severity") == "page"

    return None if any(map(covers, firing)) else "tracker"
    # END SOLUTION


if __name__ == "__main__":
    from exercises.tryout import tryout

    raise SystemExit(
        tryout(
            __file__,
            objectives=lambda: [slo.name for slo in objectives()],
            rules=lambda: "\n".join(rule["expr"] for rule in rules(objectives()[0])),
            detection_s=lambda: detection_s(objectives()[0], share=1.0),
            budget_left=lambda: budget_left(objectives()[0], [(10_000, 20)] * 28),
            receiver=lambda: receiver({"severity": "ticket"}, [{"severity": "ticket"}]),
        )
    )
