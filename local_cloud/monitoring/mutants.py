"""Wrong rules, made from right ones: one threshold, window or operator bent in each.

A test that lets a mutant pass would also let the mistake pass. Left out is `>` for `>=`
where a share of errors is compared: they differ in one point, which no float hits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from local_cloud.monitoring.objectives import promql_seconds, promql_time
from local_cloud.monitoring.rule_tests import Check, RuleTest, run

Group = Mapping[str, Any]
Rule = Mapping[str, Any]
Bend = Callable[[str], tuple[str, ...]]


def _scaled(number: str) -> tuple[str, ...]:
    value = float(number)
    return tuple(f"{v:.10g}" for v in ((0.8 * value, 1.25 * value) if value else (1,)))


def _stretched(duration: str) -> tuple[str, ...]:
    seconds = promql_seconds(duration)
    around = (0.5 * seconds, 2 * seconds) if seconds else (3600.0,)
    return tuple(map(promql_time, around))


def _becomes(*others: str) -> Bend:
    return lambda _: others


# What is looked for in an expression, and what becomes of the part in parentheses.
BENDS: tuple[tuple[str, Bend], ...] = (
    (r" (?:[<>]|==) (\d[\d.e+]*)", _scaled),
    (r" > ([a-z]\w+)$", lambda limit: (f"0.8 * {limit}", f"1.25 * {limit}")),
    (r", (\d+)\)", _scaled),  # how far predict_linear looks ahead
    (r'le="([\d.]+)"', _becomes("0.0")),
    (r"\[(\w+)\]", _stretched),
    (r" (>) ", _becomes("<")),
    (r" (>) (?=\w+$|\d+\))", _becomes(">=")),  # whole numbers do meet
    (r" (==) ", _becomes("!=")),
    (r" (and|or) ", lambda word: ("or" if word == "and" else "and",)),
    (r" (/) ", _becomes("*")),
    (r" (-) ", _becomes("+")),
    (r" (\*) ", _becomes("/")),
    (r" (by) \(job\)", _becomes("without")),
    (r'"(5)\.\."', _becomes("4")),
)


def survivors(group: Group, tests: Sequence[RuleTest]) -> dict[str, bool]:
    """What was changed in each mutant of a group, and whether no test noticed it.

    All mutants of a severity stand beside the right rules, under names of their own,
    and every check is made of each: one pass of promtool for all of them.
    """
    survived: dict[str, bool] = {}
    for severity in sorted({check.severity for test in tests for check in test.checks}):
        part = _reached(group, severity)
        changed, mutated = _with_mutants(part)
        own = [test for test in tests if test.checks[0].severity == severity]
        tried = [replace(test, checks=_checks(test, mutated["rules"])) for test in own]
        (outcome,) = run([(mutated, tried)])
        noticed = set(re.findall(r"_mutant\d+\b", outcome.words))
        survived |= {what: end not in noticed for end, what in changed.items()}
    return survived


def _reached(group: Group, severity: str) -> Group:
    """The alerts of one severity and the recorded rules that they read."""
    alerts = [
        r for r in group["rules"] if r.get("labels", {}).get("severity") == severity
    ]
    read = [
        rule
        for rule in group["rules"]
        if "record" in rule and any(f"{rule['record']}{{" in a["expr"] for a in alerts)
    ]
    return {**group, "rules": [*read, *alerts]}


def _with_mutants(group: Group) -> tuple[dict[str, str], Group]:
    """What was changed under which end of a name, and the group with all of it."""
    changed: dict[str, str] = {}
    rules = list(group["rules"])
    for rule in group["rules"]:
        for what, bent in _bent(rule):
            end = f"_mutant{len(changed)}"
            changed[end] = f"{_name(rule)}: {what}"
            rules += _beside(group, bent, end)
    return changed, {**group, "rules": rules}


def _name(rule: Rule) -> str:
    return rule.get("alert") or rule["record"]


def _beside(group: Group, bent: Rule, end: str) -> Iterator[Rule]:
    """The bent rule, and copies of the rules that read it, all with new names."""
    kind, name = ("alert" if "alert" in bent else "record"), _name(bent)
    yield {**bent, kind: name + end}
    for rule in group["rules"] if kind == "record" else ():
        if f"{name}{{" in rule["expr"]:
            expr = rule["expr"].replace(f"{name}{{", f"{name}{end}{{")
            yield {**rule, "alert": rule["alert"] + end, "expr": expr}


def _checks(test: RuleTest, rules: Sequence[Rule]) -> list[Check]:
    """The checks of a test, for the right alert and for each mutant of it."""
    alerts = [(r["alert"], r["labels"]["severity"]) for r in rules if "alert" in r]
    return [
        replace(check, alert=name)
        for check in test.checks
        for name, severity in alerts
        if (name.partition("_mutant")[0], severity) == (check.alert, check.severity)
    ]


def _bent(rule: Rule) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rule with one place of it changed, once for each place and change."""
    expr = rule["expr"]
    for pattern, bend in BENDS:
        for match in re.finditer(pattern, expr):
            before, after = expr[: match.start(1)], expr[match.end(1) :]
            for other in bend(match[1]):
                changed = f"{before}{other}{after}"
                yield f"{expr} became {changed}", {**rule, "expr": changed}
    if "for" in rule:
        for other in _stretched(rule["for"]):
            yield f"for {rule['for']} became {other}", {**rule, "for": other}
