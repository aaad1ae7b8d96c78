"""Tests of alert rules, made from the objectives and run by Prometheus' own promtool.

Each pair of windows is tried from both ends: errors a little above its limit must fire
it at the predicted minute and not one look earlier; a burst must fall silent as soon as
the short window has forgotten it; of a handful of requests none is worth waking for.
Whether such tests would notice a wrong rule is itself tested: `mutants.py` bends each
threshold, window and operator, one at a time.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from local_cloud.monitoring.objectives import SLO, Selector, Window, promql_time
from local_cloud.monitoring.rule_groups import MEMORY_BYTES, alert_name
from local_cloud.monitoring.stack import need

LOOKS = 4  # at the rules within the short window of a pair
TRAFFIC = 1e9  # requests between two looks, so that shares come out exact
MIB = 2**20

Group = Mapping[str, Any]
Phase = tuple[int, float, float]  # looks, requests and share of errors in each


@dataclass(frozen=True)
class Check:
    """At this time an alert fires, or does not."""

    alert: str
    severity: str
    at_s: float
    fires: bool


@dataclass(frozen=True)
class RuleTest:
    """One history of some series, and what must come of it."""

    name: str
    group: str  # of the rules that it tries
    step_s: float
    series: Mapping[str, str]  # in promtool's notation: `0+10x60`
    checks: Sequence[Check]

    def as_promtool(self) -> dict[str, Any]:
        """The test as a promtool file has it."""
        return {
            "name": self.name,
            "interval": promql_time(self.step_s),
            "input_series": [
                {"series": name, "values": values}
                for name, values in self.series.items()
            ],
            "promql_expr_test": [_expectation(check) for check in self.checks],
        }


def _expectation(check: Check) -> dict[str, Any]:
    wanted = f'alertname="{check.alert}",severity="{check.severity}"'
    return {
        "expr": f'count(ALERTS{{{wanted},alertstate="firing"}})',
        "eval_time": promql_time(check.at_s),
        "exp_samples": [{"labels": "{}", "value": 1}] if check.fires else [],
    }


def burn_tests(slo: SLO, windows: Sequence[Window], least: int) -> list[RuleTest]:
    """Three tests for each pair of windows of one objective's alert."""
    alert, tests = alert_name(slo), []
    for window in windows:
        rivals = [w for w in windows if w.severity == window.severity]
        longest_s = max(w.long_s for w in rivals)
        limit = window.burn * slo.budget
        for what, usual, phases, looks in (
            ("slow burn", TRAFFIC, *_slow(window, limit)),
            ("burst", TRAFFIC, *_burst(window, limit)),
            ("few requests", 0.0, *_few(window, least)),
        ):
            step_s = window.short_s / LOOKS
            # Much good traffic just before the window begins: thus no longer window
            # fires in its place. It comes at once, which is all the same to a rate.
            before = 2 * longest_s / step_s
            history = [(1, before * TRAFFIC, 0.0), (_looks(window), usual, 0.0)]
            start = sum(looks for looks, _, _ in history)
            checks = [
                Check(alert, window.severity, (start + look) * step_s, fires)
                for look, fires in looks
            ]
            name = f"{slo.name}: {what}, {window.severity} at {window.burn:g}"
            series = events(slo, [*history, *phases])
            tests.append(RuleTest(name, slo.name, step_s, series, checks))
    return tests


def _slow(window: Window, limit: float) -> tuple[list[Phase], list[tuple[int, bool]]]:
    """Errors just above the limit: the long window must be nearly full of them."""
    looks, share = _looks(window), min(1.05 * limit, (1 + limit) / 2)
    # x looks of half the traffic and all the rest before it hold enough errors once
    # share * x / 2 > limit * (looks - x / 2).
    crossed = math.floor(2 * looks * limit / (share + limit))
    phases = [(looks, TRAFFIC / 2, share)]
    return phases, [(crossed, False), (crossed + 1, True)]


def _burst(window: Window, limit: float) -> tuple[list[Phase], list[tuple[int, bool]]]:
    """Nothing but errors, soon fewer: the alert ends with the short window."""
    errors = _looks(window) * min(1.2 * limit, (1 + limit) / 2)  # what it takes
    looks = math.ceil(errors)
    above, below = min(1.04 * limit, (1 + limit) / 2), 0.94 * limit
    phases = [
        (looks, TRAFFIC, errors / looks),
        (2 * LOOKS, TRAFFIC, above),
        (2 * LOOKS, TRAFFIC / 2, below),
    ]
    # As above: until x / 2 * (limit - below) outweighs (LOOKS - x) * (above - limit).
    over, under = above - limit, (limit - below) / 2
    crossed = math.floor(LOOKS * over / (over + under))
    ends = looks + 2 * LOOKS + crossed
    return phases, [(ends, True), (ends + 1, False)]


def _few(window: Window, least: int) -> tuple[list[Phase], list[tuple[int, bool]]]:
    """Nothing but errors, one at a look, and a pause among them: then one too many.

    With the pause they fill more than half of the window, or half of it would do.
    """
    pause = _looks(window) - 2 - least
    phases = [(least // 2, 1.0, 1.0), (pause, 0.0, 0.0), (least - least // 2 + 1, 1, 1)]
    return phases, [(pause + least, False), (pause + least + 1, True)]


def _looks(window: Window) -> int:
    return round(window.long_s / window.short_s * LOOKS)


def events(slo: SLO, phases: Sequence[Phase], job: str = "api") -> dict[str, str]:
    """The series of an objective; and beside them such as must not be counted."""
    counted = slo.bad or slo.good
    assert counted is not None  # an SLO counts one or the other
    all_of = [(looks, n) for looks, n, _ in phases]
    part = [(looks, n * (e if slo.bad else 1 - e)) for looks, n, e in phases]
    ones = {"job": job, **_example(counted)}
    series = {_series(counted.metric, ones): counter(part)}
    if counted.metric == slo.total.metric:  # then the rest has a series of its own
        only = counted.matchers.keys() - slo.total.matchers.keys()
        rest = [(looks, n - m) for (looks, n), (_, m) in zip(all_of, part, strict=True)]
        others = ones | dict.fromkeys(only, "other")
        series[_series(counted.metric, others)] = counter(rest)
    else:
        totals = {"job": job, **_example(slo.total)}
        series[_series(slo.total.metric, totals)] = counter(all_of)
    if job == "edge":
        return series
    for label in slo.total.matchers:  # errors that are nobody's business
        strange = ones | {label: "other"}
        series[_series(counted.metric, strange)] = counter(all_of)
    # And a healthy neighbour, which must not thin the errors.
    calm = [(looks, 10 * n, 0.0) for looks, n, _ in phases]
    return series | events(slo, calm, job="edge")


def _example(selector: Selector) -> dict[str, str]:
    """Labels that a selector takes: the plainest text of each pattern."""
    labels = {
        name: wanted[1:].replace(".*", "x").replace(".", "0")
        if wanted.startswith("~")
        else wanted
        for name, wanted in selector.matchers.items()
    }
    if not selector.matches(selector.metric, labels):
        raise ValueError(
            f"Expected patterns of letters, . and .*, found {selector.promql()}. Write "
            "its tests by hand, or choose a plainer pattern."
        )
    return labels


def _series(metric: str, labels: Mapping[str, str]) -> str:
    pairs = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
    return f"{metric}{{{pairs}}}"


def counter(phases: Sequence[tuple[int, float]]) -> str:
    """A counter in promtool's notation, of (looks, increase at each)."""
    words, now = ["0"], 0
    for looks, increase in phases:
        step = round(increase)
        words.append(f"{now + step}+{step}x{looks - 1}")
        now += step * looks
    return " ".join(words)


def level(*values: tuple[float, int]) -> str:
    """A gauge in promtool's notation, of (value, looks)."""
    return " ".join(f"{value:g}+0x{looks - 1}" for value, looks in values)


def cause_tests() -> list[RuleTest]:
    """The alerts that are no burn rates: at the limit silent, just past it firing."""
    minute = 60.0

    def after(alert: str, severity: str, **looks: bool) -> list[Check]:
        return [
            Check(alert, severity, int(look[1:]) * minute, fires)
            for look, fires in looks.items()
        ]

    def one(
        name: str, checks: list[Check], job: str = "api", **series: str
    ) -> RuleTest:
        labelled = {f'{metric}{{job="{job}"}}': t for metric, t in series.items()}
        return RuleTest(name, "causes", minute, labelled, checks)

    def failures(metric: str) -> RuleTest:
        looks = {"m10": False, "m11": True, "m15": True, "m16": False}
        checks = after("NotificationsFail", "page", **looks)
        return one(f"{metric} counts one", checks, **{metric: level((0, 11), (1, 20))})

    def apart(seconds: int) -> RuleTest:
        checks = after("ClockSkew", "ticket", m4=False, m5=abs(seconds) > 5)
        text = f"0+60x4 {300 + seconds}+60x5"
        return one(f"a clock {seconds} s apart", checks, host_clock_seconds=text)

    def step(seconds: int) -> RuleTest:
        seen = abs(seconds) > 5
        checks = after("ClockStep", "ticket", m9=False, m10=seen, m14=seen, m15=False)
        text = level((100, 10), (100 + seconds, 20))
        return one(
            f"a clock set by {seconds} s", checks, host_clock_offset_seconds=text
        )

    def drift(of: str) -> RuleTest:
        looks = {"m10": False, "m20": False, "m21": True}
        psi, limit = f"model_{of}_drift_psi", f"model_{of}_drift_limit"
        series = {psi: level((0.25, 11), (0.26, 20)), limit: level((0.25, 31))}
        return one(
            f"{of}s drift", after(f"{of.title()}Drift", "ticket", **looks), **series
        )

    limit = MEMORY_BYTES
    grown = f"{limit // 2}+0x120 {limit // 2 + 4 * MIB}+{4 * MIB}x120"
    full = f"{limit}+0x120"
    once = f"{limit // 2}+0x60 {limit // 2 + 600 * MIB}+{2 * MIB}x30"
    steps = level(*((1024 * MIB + 64 * MIB * n, 8) for n in range(12)))
    over = f"{limit // 2}+0x29 {limit}+0x39 {limit * 11 // 10}+0x39"
    return [
        one(
            "a target falls silent",
            after("TargetDown", "page", m9=False, m11=False, m12=True),
            up=level((1, 10), (0, 10)),
        ),
        one(
            "the engine stands still",
            after("EngineStalled", "page", m10=False, m12=False, m13=True),
            engine_stalled_seconds=level((10, 11), (10.5, 5)),
        ),
        one(
            "a queue as long as the rows, then longer",
            after("QueueGrows", "ticket", m10=False, m12=False, m13=True),
            engine_queued_requests=level((4, 11), (5, 10)),
            engine_rows=level((4, 21)),
        ),
        one(
            "memory at the limit, for good",
            after("MemoryGrows", "ticket", m120=False),
            process_resident_memory_bytes=full,
        ),
        one(
            "memory that grows",
            after("MemoryGrows", "ticket", m184=False, m185=True),
            process_resident_memory_bytes=grown,
        ),
        one(
            "memory that grew once, and then hardly",
            after("MemoryGrows", "ticket", m70=False, m76=False, m91=False),
            process_resident_memory_bytes=once,
        ),
        one(
            "memory that grew to the limit, then over it",
            after("MemoryGrows", "ticket", m41=False, m60=False, m79=False, m85=True),
            process_resident_memory_bytes=over,
        ),
        one(
            "memory that grows by steps, minutes apart",
            after("MemoryGrows", "ticket", m60=True, m67=True, m74=True),
            process_resident_memory_bytes=steps,
        ),
        one(
            "memory of another program that grows",
            after("MemoryGrows", "ticket", m185=False, m200=False),
            job="prometheus",
            process_resident_memory_bytes=grown,
        ),
        drift("input"),
        drift("output"),
        failures("alertmanager_notifications_failed_total"),
        failures("prometheus_notifications_errors_total"),
        *(apart(seconds) for seconds in (5, 6, -6)),
        *(step(seconds) for seconds in (5, 6, -6)),
        one("the watchdog", after("Watchdog", "none", m0=True, m10=True), up="1+0x10"),
    ]


def test_files(
    rule_files: Sequence[str], tests: Sequence[RuleTest]
) -> dict[str, dict[str, Any]]:
    """Files for `promtool test rules` by name: one for each step."""
    steps = dict.fromkeys(test.step_s for test in tests)
    return {
        f"every_{promql_time(step)}": {
            "rule_files": list(rule_files),
            "evaluation_interval": promql_time(step),
            "tests": [test.as_promtool() for test in tests if test.step_s == step],
        }
        for step in steps
    }


@dataclass(frozen=True)
class Outcome:
    """What promtool said to some rules."""

    passed: bool
    words: str


def run(trials: Sequence[tuple[Group, Sequence[RuleTest]]]) -> list[Outcome]:
    """Tries each group of rules by the tests for it: one promtool for all of them.

    Raises StackError if promtool is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="promtool-") as folder:
        paths = [
            list(_write(Path(folder), str(number), group, tests))
            for number, (group, tests) in enumerate(trials)
        ]
        argv = [need("promtool"), "test", "rules", *chain.from_iterable(paths)]
        done = subprocess.run(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            env={**os.environ, "GOGC": "400"},  # a fifth less work, for more memory
        )
    # It says "Unit Testing:  <file>" and below it SUCCESS, or what failed.
    parts = re.split(r"^Unit Testing:\s+(\S+)$", done.stdout, flags=re.M)
    said = dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))
    outcomes = []
    for own in paths:
        bad = [
            said.get(path, done.stdout) for path in own if said.get(path) != "SUCCESS"
        ]
        outcomes.append(Outcome(not bad, "\n".join(bad)))
    return outcomes


def _write(
    folder: Path, number: str, group: Group, tests: Sequence[RuleTest]
) -> Iterator[str]:
    rules = folder / f"{number}.rules"
    rules.write_text(json.dumps({"groups": [group]}))
    for name, content in test_files([rules.name], tests).items():
        path = folder / f"{number}.{name}"
        path.write_text(json.dumps(content))
        yield str(path)
