"""The rules pass promtool's tests, and no wrong rule does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

import monitoring_setup as lesson
from local_cloud.monitoring import stack
from local_cloud.monitoring.mutants import survivors
from local_cloud.monitoring.objectives import SLO, Selector
from local_cloud.monitoring.rule_tests import RuleTest, burn_tests, counter, run

pytestmark = pytest.mark.prometheus


@pytest.fixture(autouse=True)
def _installed() -> None:
    if missing := stack.found():
        pytest.skip(missing)


def belonging(group: dict) -> list[RuleTest]:
    return [test for test in lesson.rule_tests() if test.group == group["name"]]


def test_the_rules_of_production_pass():
    groups = lesson.groups()
    assert sum(len(belonging(group)) for group in groups) >= 12
    assert {c.alert for t in lesson.rule_tests() for c in t.checks} == {
        r["alert"] for g in groups for r in g["rules"] if "alert" in r
    }
    outcomes = run([(group, belonging(group)) for group in groups])
    assert all(outcome.passed for outcome in outcomes), outcomes


def test_no_changed_threshold_window_or_operator_passes():
    groups = lesson.groups()
    with ThreadPoolExecutor() as pool:
        tried = list(pool.map(lambda group: survivors(group, belonging(group)), groups))
    mutants = {what: left for each in tried for what, left in each.items()}
    # Of each window of each objective alone: longer, shorter, and its four limits.
    assert len(mutants) > 200
    assert [what for what, left in mutants.items() if left] == []


@pytest.mark.parametrize("objective", [0.94, 0.97, 0.995, 0.9999])
def test_the_tests_hold_for_other_promises(objective: float):
    total = Selector("rpcs", {"method": "Ask"})
    bad = Selector("rpcs", {"method": "Ask", "code": "~Un.*"})
    slo = SLO("other", objective, "calls", total, bad=bad)
    tests = burn_tests(slo, lesson.WINDOWS, lesson.LEAST)
    (outcome,) = run([(lesson.rules(slo), tests)])
    assert outcome.passed, outcome.words


def test_promtools_words_are_kept_where_rules_are_broken():
    group = lesson.causes()
    broken = {**group, "rules": [{"alert": "Broken", "expr": "up ==="}]}
    (bad, good) = run([(broken, belonging(group)), (group, belonging(group))])
    assert not bad.passed
    assert "could not parse expression" in bad.words
    assert good.passed


def test_a_counter_keeps_its_sum_where_its_pace_changes():
    assert counter([(3, 10), (2, 0), (1, 5)]) == "0 10+10x2 30+0x1 35+5x0"
