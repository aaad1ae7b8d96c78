"""What Prometheus does with rules: records, and takes alerts through their states.

Without clock, thread or network, so that it can be held against `promtool` evaluation
by evaluation. Semantics are those of Prometheus 2.42.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from local_cloud.monitoring.promql import Query, QueryError
from local_cloud.monitoring.samples import NAME, Labels, Samples, labelled
from local_cloud.monitoring.stack import Group


@dataclass
class Alert:
    """One alert; times on the evaluator's clock."""

    name: str
    labels: dict[str, str]
    active_at: float
    missing_at: float | None = None  # since when its condition does not hold
    value: float = 0.0
    annotations: dict[str, str] = field(default_factory=dict)
    state: str = "pending"  # then firing, then inactive
    resolved_at: float | None = None


class AlertRule:
    """One alerting rule and its alerts. Semantics as in Prometheus 2.42."""

    def __init__(self, rule: Mapping[str, Any]) -> None:
        self.name: str = rule["alert"]
        self.query = Query(str(rule["expr"]))
        self.hold_s = seconds(rule.get("for", "0s"))
        self.keep_s = seconds(rule.get("keep_firing_for", "0s"))
        self.labels: Mapping[str, str] = rule.get("labels", {})
        self.annotations: Mapping[str, str] = rule.get("annotations", {})
        self.active: dict[Labels, Alert] = {}
        for text in (*self.labels.values(), *self.annotations.values()):
            check(self.name, text)

    def evaluate(self, samples: Samples, at: float) -> None:
        """Brings the alerts up to this moment."""
        present: set[Labels] = set()
        for series, value in self.query.vector(samples, at).items():
            labels = {k: v for k, v in series if k != NAME} | {"alertname": self.name}
            labels |= {k: fill(v, labels, value) for k, v in self.labels.items()}
            key = frozenset(labels.items())
            present.add(key)
            alert = self.active.setdefault(key, Alert(self.name, labels, at))
            alert.value = value
            alert.annotations = {
                k: fill(v, labels, value) for k, v in self.annotations.items()
            }
        for key, alert in [*self.active.items()]:
            if key in present:
                alert.missing_at = None
            elif alert.missing_at is None:
                alert.missing_at = at
            missing = alert.missing_at
            if alert.state == "pending" and missing is not None:
                del self.active[key]  # it was nothing, and nobody is told
            elif missing is not None and at - missing >= self.keep_s:
                del self.active[key]
                alert.state, alert.resolved_at = "inactive", at
            elif alert.state == "pending" and at - alert.active_at >= self.hold_s:
                alert.state = "firing"


class RecordingRule:
    """One recording rule: its result becomes samples of a series of its own."""

    def __init__(self, rule: Mapping[str, Any]) -> None:
        self.name: str = rule["record"]
        self.query = Query(str(rule["expr"]))
        self.labels: Mapping[str, str] = rule.get("labels", {})
        self._known: set[Labels] = set()

    def evaluate(self, samples: Samples, at: float) -> None:
        """Writes the result down."""
        found = {
            labelled(self.name, {**dict(series), **self.labels}): value
            for series, value in self.query.vector(samples, at).items()
        }
        for series, value in found.items():
            samples.add(series, at, value)
        for gone in self._known - found.keys():
            samples.end(gone, at)
        self._known = set(found)


class Rules:
    """All groups: `evaluate` is one evaluation, without clock, thread or network."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.rules = [
            AlertRule(rule) if "alert" in rule else RecordingRule(rule)
            for group in groups
            for rule in group["rules"]
        ]
        queries = [rule.query for rule in self.rules]
        self.names = {"up"}.union(*(query.names for query in queries))
        self.reach_s = max((query.reach_s for query in queries), default=0.0)

    def evaluate(self, samples: Samples, at: float) -> None:
        """All rules, in order. One without a single answer now leaves all as it was."""
        for rule in self.rules:
            with suppress(QueryError):
                rule.evaluate(samples, at)

    def alerts(self) -> list[Alert]:
        """All that are pending or firing."""
        rules = [rule for rule in self.rules if isinstance(rule, AlertRule)]
        return [alert for rule in rules for alert in rule.active.values()]


def seconds(duration: str | float) -> float:
    """Of a duration as rules have it: "1m30s", or seconds."""
    import promql_parser

    if isinstance(duration, int | float):
        return float(duration)
    if re.fullmatch("0[a-z]*", duration):
        return 0.0
    return promql_parser.parse_duration(duration).total_seconds()


WITH = re.compile(r"\{\{\s*with \$labels\.(\w+)\s*\}\}(.*?)\{\{\s*end\s*\}\}")
LABEL = re.compile(r"\{\{\s*\$labels\.(\w+)\s*\}\}")
VALUE = re.compile(
    r"\{\{\s*\$value\s*(?:\|\s*(humanizePercentage|humanize1024)\s*)?\}\}"
)


def fill(text: str, labels: Mapping[str, str], value: float) -> str:
    """The part of Prometheus' templates that rules use, filled in.

    `{{ $labels.name }}`, `{{ $value }}` and `{{ $value | humanize1024 }}`, and what
    stands `{{ with $labels.name }}...{{ . }}...{{ end }}` if there is such a label.
    """

    def told(match: re.Match[str]) -> str:
        label = labels.get(match[1], "")
        return re.sub(r"\{\{\s*\.\s*\}\}", lambda _: label, match[2]) if label else ""

    def number(match: re.Match[str]) -> str:
        if match[1] == "humanizePercentage":
            return f"{100 * value:.4g}%"
        if match[1] == "humanize1024" and value >= 1024:
            power = min(6, int(math.log(value, 1024)))
            return f"{value / 1024**power:.4g}{'_kMGTPE'[power]}i"
        return f"{value:.4g}"

    text = LABEL.sub(lambda match: labels.get(match[1], ""), WITH.sub(told, text))
    return VALUE.sub(number, text)


def check(name: str, text: str) -> None:
    """Raises QueryError for a template that `fill` would leave in a notification."""
    labels = dict.fromkeys(re.findall(r"\$labels\.(\w+)", text), "known")
    if "{{" in (filled := fill(text, labels, 1.0)):
        raise QueryError(
            f"Expected a template of $labels and $value alone in the alert {name}, "
            f"found {filled[filled.index('{{') :]!r}. Say it with these, or use "
            "Prometheus."
        )
