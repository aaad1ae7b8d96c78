"""Grades exercise 6: rules by what they say to histories of counters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from local_cloud.monitoring import rule_tests
from local_cloud.monitoring.objectives import DAY_S, SLO, Selector
from local_cloud.monitoring.samples import Labels
from tests.graders.histories import (
    MINUTE_S,
    Phase,
    Series,
    Watched,
    around,
    fires,
    history,
    watch,
)
from tests.graders.plugin import Call, Submission, points

HOUR_S = 3600.0
PATH = {"path": "/scan"}
# Objectives of another service than the exercise's.
SCANS = SLO(
    name="scans",
    objective=0.995,
    description="scans that no fault of the server ends",
    total=Selector("scans_total", PATH),
    bad=Selector("scans_total", PATH | {"code": "~5.."}),
    period_s=28 * DAY_S,
)
PROMPT = SLO(
    name="prompt",
    objective=0.98,
    description="scans that take two seconds at most",
    total=Selector("scan_seconds_count", PATH),
    good=Selector("scan_seconds_bucket", PATH | {"le": "2.0"}),
    period_s=28 * DAY_S,
)
# Shares that are too much, by the exercise's SPENDS: within an hour, six, and a day.
HOUR, SIX, DAY = (burn * SCANS.budget for burn in (33.6, 11.2, 2.8))


def rules_of(submission: Submission, slo: SLO) -> Call:
    found = submission.call("rules", slo)
    given = isinstance(found.value, list) and all(
        isinstance(rule, dict)
        and "expr" in rule
        and ("alert" in rule) != ("record" in rule)
        for rule in found.value
    )
    found.must(given, "a list of rules", "Prometheus reads each as a mapping")
    alerts = [rule for rule in found.value if "alert" in rule]
    right = alerts and all(
        rule["alert"] == "BudgetBurn"
        and (rule.get("labels") or {}).get("slo") == slo.name
        and (rule.get("labels") or {}).get("severity") in ("page", "ticket")
        for rule in alerts
    )
    because = "receivers choose by these labels"
    found.must(right, "alerts BudgetBurn with labels severity and slo", because)
    return Call(f"rules(the objective {slo.name})", found.value)


def watched(
    submission: Submission,
    slo: SLO,
    series: Series,
    start: int,
    looks: Iterable[int] | None = None,
) -> Watched:
    """What the learner's rules for an objective say to a history."""
    return watch(rules_of(submission, slo), series, start, looks)


# -- 1: objectives


def objective(submission: Submission, name: str) -> tuple[Call, SLO]:
    found = submission.call("objectives")
    named = {getattr(slo, "name", "?"): slo for slo in found.value or ()}
    because = "the exercise names two promises"
    found.must(set(named) == {"answers", "fast"}, "answers and fast", because)
    return found, named[name]


@points(1, hint="A promise is a share and a time, in the words of the docstring.")
def check_objectives_promise_what_was_said(submission: Submission) -> None:
    """Both promises have their share and their four weeks."""
    for name, share in (("answers", 0.995), ("fast", 0.98)):
        found, slo = objective(submission, name)
        promised = math.isclose(slo.objective, share)
        because = "that is what the users were told"
        found.must(promised, f"{share:.1%} of {name}", because, f"{slo.objective:.1%}")
        days = slo.period_s / DAY_S
        found.must(days == 28, f"28 days for {name}", because, f"{days:g} days")


def _series(
    metric: str, count: float, **labels: str
) -> tuple[str, dict[str, str], float]:
    return metric, {"job": "api", "instance": "a", **labels}, count


ROUTE = "/v1/embeddings"
TOTAL, SECONDS = "gateway_requests_total", "gateway_seconds"
SEEN = [
    _series(TOTAL, 1000, route=ROUTE, code="200", method="POST"),
    _series(TOTAL, 200, route=ROUTE, code="404", method="GET"),
    _series(TOTAL, 300, route=ROUTE, code="429", method="POST"),
    _series(TOTAL, 40, route=ROUTE, code="500", method="POST"),
    _series(TOTAL, 5, route=ROUTE, code="503", method="PUT"),
    _series(TOTAL, 7000, route="/health", code="500", method="GET"),
    _series(f"{SECONDS}_bucket", 600, route=ROUTE, le="0.25"),
    _series(f"{SECONDS}_bucket", 900, route=ROUTE, le="0.5"),
    _series(f"{SECONDS}_bucket", 950, route=ROUTE, le="1.0"),
    _series(f"{SECONDS}_bucket", 1000, route=ROUTE, le="+Inf"),
    _series(f"{SECONDS}_count", 1000, route=ROUTE),
    _series(f"{SECONDS}_count", 5000, route="/health"),
    _series(f"{SECONDS}_bucket", 5000, route="/health", le="0.5"),
]


@points(2, hint="Go through the labels one by one: whose request, and whose fault?")
def check_objectives_count_the_right_requests(submission: Submission) -> None:
    """Of many series, each promise counts its events, and the bad ones among them."""
    for name, events, bad in (("answers", 1545, 45), ("fast", 1000, 100)):
        found, slo = objective(submission, name)
        total = _count(slo.total)
        counted = _count(slo.bad) if slo.bad else total - _count(slo.good)
        because = "other routes, and what callers got wrong, are not in the promise"
        right = (total, counted) == (events, bad)
        expected = f"{events} events of {name}, {bad} of them bad"
        found.must(right, expected, because, got=f"{total:g} and {counted:g}")


def _count(selector: Selector | None) -> float:
    assert selector is not None
    return sum(n for name, labels, n in SEEN if selector.matches(name, labels))


# -- 2a: rules by their effect


@points(2, hint="Burn is share x period / window; times the budget it is the limit.")
def check_rules_page_in_time(submission: Submission) -> None:
    """A page comes when the hour, or the six hours, cross their limit."""
    calm = Phase(420, 1000)
    prompt = 11.2 * PROMPT.budget
    for slo, share, due_s, which in (
        (SCANS, 0.6, HOUR_S * HOUR / 0.6, "an hour"),
        (SCANS, 0.1, 6 * HOUR_S * SIX / 0.1, "six hours"),
        (PROMPT, 0.5, 6 * HOUR_S * prompt / 0.5, "six hours"),
    ):
        series = history(slo, [calm, Phase(300, 1000, share)])
        found = watched(submission, slo, series, 420, around(due_s))
        because = f"then as much of {which} is bad as {slo.name} can bear"
        found.must_fire("page", due_s, f"a fault of {share:.0%}", because)


@points(1, hint="Pairs of one severity belong into one rule: this or that.")
def check_rules_page_once(submission: Submission) -> None:
    """A fault that crosses all windows is one page, not one for each."""
    series = history(SCANS, [Phase(420, 1000), Phase(60, 1000, 1.0)])
    found = watched(submission, SCANS, series, 420)
    pages = [sum(s == "page" for s, _ in now) for now in found.minutes.values()]
    because = "two alerts of the same labels are refused by Prometheus as duplicates"
    call = found.call
    call.must(max(pages) == 1, "one page of a total failure", because, max(pages))


@points(1, hint="A ticket is as a page, with another window.")
def check_rules_open_tickets(submission: Submission) -> None:
    """A slow leak of the budget opens a ticket, and wakes nobody."""
    due_s = DAY_S * DAY / 0.03
    series = history(SCANS, [Phase(1440, 1000), Phase(690, 1000, 0.03)])
    found = watched(submission, SCANS, series, 1440, around(due_s))
    because = "then a tenth of the budget went within a day"
    found.must_fire("ticket", due_s, "a fault of 3 %", because)
    paged = found.first("page")
    found.call.must(math.isinf(paged), "no page", "it can wait", got="a page")


@points(2, hint="The short window alone says that it goes on, not that it matters.")
def check_rules_stay_silent_on_a_blip(submission: Submission) -> None:
    """A fault pages; eight bad minutes, or a burn within the budget, do not."""
    fault = [Phase(420, 1000), Phase(30, 1000, 0.6)]
    found = watched(submission, SCANS, history(SCANS, fault), 420, range(25, 31))
    because = "who is silent whatever happens is no help: 60 % failed for half an hour"
    found.call.must(fires(found.minutes[30], "page"), "a page", because, got="none")
    blip = [Phase(1440, 1000), Phase(8, 1000, 1.0), Phase(30, 1000)]
    found = watched(submission, SCANS, history(SCANS, blip), 1440)
    because = "eight minutes without answers are 13 % of an hour, and 16.8 % are due"
    found.must_be_silent("a blip", because)
    series = history(SCANS, [Phase(1500, 1000, 0.0049)])
    found = watched(submission, SCANS, series, 1400, range(1, 100, 10))
    because = "at this rate the budget lasts for longer than the four weeks"
    found.must_be_silent("0.49 % of errors", because)


@points(2, hint="Which window forgets soon?")
def check_rules_resolve_soon(submission: Submission) -> None:
    """When the fault is over, the page ends with the short window."""
    phases = [Phase(420, 1000), Phase(30, 1000, 0.6), Phase(30, 1000)]
    found = watched(submission, SCANS, history(SCANS, phases), 420)
    at_end, later = found.minutes[30], found.minutes[30 + 5 + 1]
    because = "the fault is still there"
    found.call.must(fires(at_end, "page"), "a page at the fault's end", because, "none")
    because = "five minutes were good, and nobody can repair what is repaired"
    what = "no page six minutes after the fault"
    found.call.must(not fires(later, "page"), what, because, got="one")


@points(2, hint="rate() sees one series restart; in a sum of series nobody can.")
def check_rules_survive_restarts(submission: Submission) -> None:
    """A counter that starts at zero again neither fires an alert nor hides one."""
    restarts = {"a": [425, 470], "b": [431, 476]}
    phases = [Phase(420, 1000), Phase(90, 1000, 0.002)]
    series = history(SCANS, phases, restarts=restarts)
    found = watched(submission, SCANS, series, 360)
    because = "0.2 % fail before and after, and no request fails by a restart"
    found.must_be_silent("restarts of both replicas", because)
    due_s = HOUR_S * HOUR / 0.6
    phases = [Phase(420, 1000), Phase(30, 1000, 0.6)]
    series = history(SCANS, phases, restarts={"a": [425], "b": [431]})
    found = watched(submission, SCANS, series, 360)
    because = "restarts do not make up for a fault of 60 %"
    found.must_fire("page", due_s + 60 * MINUTE_S, "a fault with restarts", because)


@points(2, hint="One more `and`: increase() counts the requests of a window.")
def check_rules_sleep_at_night(submission: Submission) -> None:
    """One failure among three requests is silent; thirty failures an hour are not."""
    night = [Phase(1440, 0), Phase(1, 2), Phase(1, 2, 1.0), Phase(60, 0)]
    found = watched(submission, SCANS, history(SCANS, night), 1438)
    because = "half of four requests are no share that says anything"
    found.must_be_silent("an hour with four requests", because)
    few = [Phase(1440, 0.5), Phase(60, 0.5, 1.0)]
    found = watched(submission, SCANS, history(SCANS, few), 1440)
    because = "30 requests come in the hour, and all of them fail"
    found.must_fire("page", HOUR_S * HOUR, "a quiet hour that fails", because)


@points(1, hint="sum by (job)")
def check_rules_keep_jobs_apart(submission: Submission) -> None:
    """A small job that fails is not thinned by a large one that does not."""
    calm = history(SCANS, [Phase(480, 1000)])
    canary = history(SCANS, [Phase(420, 20), Phase(60, 20, 1.0)], job="canary")
    found = watched(submission, SCANS, calm | canary, 420, around(HOUR_S * HOUR))
    because = "all of its requests fail, and its users ask no other"
    last = max(found.minutes)
    paged = {job for severity, job in found.minutes[last] if severity == "page"}
    what = "a page of the job canary alone"
    got = f"{' and '.join(sorted(paged)) or 'none'}"
    found.call.must(paged == {"canary"}, what, because, got=got)


@points(1, hint="No share of errors is above 1.")
def check_rules_refuse_what_never_fires(submission: Submission) -> None:
    """An objective so low that total failure does not spend fast enough is refused."""
    rules_of(submission, replace(SCANS, objective=0.971))
    because = "5 % of its budget cannot go in an hour, not even if all fails"
    low = replace(SCANS, objective=0.97)
    submission.refuses(ValueError, "rules", low, because=because)


@points(
    2,
    hint="promtool says which minute differs; its word is Prometheus' own.",
    needs="prometheus",
    slow=True,
    limit_s=30,
)
def check_rules_hold_in_prometheus(submission: Submission) -> None:
    """Prometheus itself comes to the same: fault, blip and end, by promtool."""
    call = rules_of(submission, SCANS)
    due = 420 + round(HOUR * 60 / 0.6)
    fault = [Phase(420, 1000), Phase(30, 1000, 0.6), Phase(30, 1000)]
    blip = [Phase(420, 1000), Phase(8, 1000, 1.0), Phase(30, 1000)]
    tests = [
        _tried("a fault of 60 %", fault, {due - 2: 0, due + 3: 1, 450: 1, 456: 0}),
        _tried("a blip", blip, {425: 0, 428: 0, 430: 0, 440: 0}),
    ]
    group = {"name": "exercise", "rules": call.value}
    (outcome,) = rule_tests.run([(group, tests)])
    because = "minute by minute this is what was promised"
    call.must(outcome.passed, "promtool to agree", because, got=outcome.words[-600:])


def _tried(
    name: str, phases: Sequence[Phase], fires: Mapping[int, int]
) -> rule_tests.RuleTest:
    checks = [
        rule_tests.Check("BudgetBurn", "page", MINUTE_S * minute, bool(fired))
        for minute, fired in fires.items()
    ]
    series = {
        _named(labels): " ".join(f"{value:g}" for value in values)
        for labels, values in history(SCANS, phases).items()
    }
    return rule_tests.RuleTest(name, "exercise", MINUTE_S, series, checks)


def _named(labels: Labels) -> str:
    pairs = dict(labels)
    metric = pairs.pop("__name__")
    inside = ",".join(f'{key}="{value}"' for key, value in sorted(pairs.items()))
    return f"{metric}{{{inside}}}"


# -- 2b and 3


@points(1, hint="x * share + (1 - x) * already is the limit; solve for x.")
def check_detection_counts_what_burns_already(submission: Submission) -> None:
    """The page is predicted, from peace and from a service that fails a little."""
    for share, already, window_s, limit in (
        (1.0, 0.0, HOUR_S, HOUR),
        (0.1, 0.0, 6 * HOUR_S, SIX),
        (0.6, 0.03, HOUR_S, HOUR),
        (0.2, 0.05, 6 * HOUR_S, SIX),
    ):
        found = submission.call("detection_s", SCANS, share, already)
        expected = window_s * (limit - already) / (share - already)
        because = f"then {limit:.1%} of {window_s / HOUR_S:g} h are bad"
        found.near(expected, because)


@points(1, hint="Two cases need no formula.")
def check_detection_is_now_or_never(submission: Submission) -> None:
    """What pages already is found at once, what is below all limits never."""
    for share, already, expected, because in (
        (0.05, 0.0, math.inf, "5 % are below the lowest limit of a page, 5.6 %"),
        (0.03, 0.0, math.inf, "it opens a ticket, which is no page"),
        (0.5, 0.06, 0.0, "6 % are above it already"),
    ):
        found = submission.call("detection_s", SCANS, share, already)
        found.equals(expected, because)


@points(1, hint="Sum up first, divide once.")
def check_budget_weighs_days_by_requests(submission: Submission) -> None:
    """A bad Sunday weighs as much as its requests, and old days weigh nothing."""
    for days, expected, because in (
        ([(10_000, 10)] * 28, 0.8, "280 of the 1400 that may fail did"),
        ([(10_000, 0)] * 27 + [(100, 50)], 1 - 50 / 1350.5, "50 of 1350.5 failed"),
        ([(10_000, 9_000)] + [(10_000, 25)] * 28, 0.5, "the first day is too old"),
    ):
        found = submission.call("budget_left", SCANS, days)
        found.near(expected, because)


@points(1, hint="Nothing came: nothing was spent.")
def check_budget_can_be_whole_or_overdrawn(submission: Submission) -> None:
    """No traffic leaves it whole; whoever spends more than all is below zero."""
    for days, expected, because in (
        ([], 1.0, "nobody came, nothing failed"),
        ([(0, 0)] * 28, 1.0, "nobody came, nothing failed"),
        ([(1000, 10)], -1.0, "twice of what may fail did: that must be seen"),
    ):
        submission.call("budget_left", SCANS, days).near(expected, because)


def _alert(severity: str, slo: str = "scans", job: str = "api") -> dict[str, str]:
    named = {"alertname": "BudgetBurn", "slo": slo, "job": job}
    return named | ({"severity": severity} if severity else {})


@points(1, hint="What would happen to an alert whose severity has a typing error?")
def check_receiver_always_has_somebody(submission: Submission) -> None:
    """Each kind goes where it belongs; what nobody thought of goes to the pager."""
    watchdog = {"alertname": "Watchdog", "severity": "none"}
    page = _alert("page")
    for alert, expected, because in (
        (page, "pager", "a page wakes somebody"),
        (_alert("ticket"), "tracker", "a ticket waits for the morning"),
        (watchdog, "deadman", "its silence is the alarm"),
        (
            _alert("critcal"),
            "pager",
            "an alert that reaches nobody is worse than noise",
        ),
        (_alert(""), "pager", "an alert that reaches nobody is worse than noise"),
    ):
        found = submission.call("receiver", alert, [alert, watchdog])
        found.equals(expected, because)
    found = submission.call("receiver", page, [page, page, _alert("ticket")])
    found.equals("pager", because="a page is never withheld")


@points(1, hint="Compare slo and job, and nothing else.")
def check_receiver_withholds_the_ticket_of_a_page(submission: Submission) -> None:
    """A ticket is withheld while its own page fires, and only then."""
    ticket = _alert("ticket")
    for others, expected, because in (
        ([_alert("page")], None, "whoever was woken for it knows"),
        (
            [_alert("page", slo="prompt")],
            "tracker",
            "that page is about another promise",
        ),
        ([_alert("page", job="canary")], "tracker", "that page is about another job"),
        ([_alert("ticket", slo="prompt")], "tracker", "nobody is awake yet"),
    ):
        found = submission.call("receiver", ticket, [ticket, *others])
        found.equals(expected, because)
