"""A promise to the users as data: what is counted, how much of it must be good.

Nothing here computes: rules, tests, dashboards and predictions are made of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DAY_S = 86_400.0
# The burn that spends 2 % of a 30 days' budget within an hour: the fastest that is
# watched for, and so the limit of what an objective can be (see `SLO`).
FAST_BURN = 14.4
INTERVAL_S = 30.0  # between two scrapes, and between two looks at the rules
UNITS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}


class SLOError(ValueError):
    """A promise that cannot be kept watch over: expected, found, what to do."""


@dataclass(frozen=True)
class Selector:
    """Some series of a metric: `{"code": "~5.."}` takes 500 and 503, `"500"` one."""

    metric: str
    matchers: Mapping[str, str] = field(default_factory=dict)

    def promql(self) -> str:
        """As Prometheus writes it: `metric{code=~"5..",route="/chat"}`."""
        return f"{self.metric}{{{','.join(map(_matcher, self.matchers.items()))}}}"

    def matches(self, metric: str, labels: Mapping[str, str]) -> bool:
        """Whether a series is among them; a label that is missing reads as empty."""
        return metric == self.metric and all(
            re.fullmatch(wanted[1:], labels.get(name, ""))
            if wanted.startswith("~")
            else labels.get(name, "") == wanted
            for name, wanted in self.matchers.items()
        )


def _matcher(item: tuple[str, str]) -> str:
    name, wanted = item
    operator = "=~" if wanted.startswith("~") else "="
    text = wanted.removeprefix("~").replace("\\", r"\\").replace('"', r"\"")
    return f'{name}{operator}"{text}"'


def promql_time(seconds: float) -> str:
    """A duration in Prometheus' words, in one unit: `1h`, `90s`, `500ms`."""
    milliseconds = round(seconds * 1000)
    unit, size = next(u for u in UNITS.items() if milliseconds % u[1] == 0)
    return f"{milliseconds // size}{unit}"


def promql_seconds(duration: str) -> float:
    """The seconds of a duration that `promql_time` wrote."""
    number = duration.rstrip("dhms")
    return int(number) * UNITS[duration.removeprefix(number)] / 1000


def within(histogram: str, edges: Sequence[float], threshold_s: float) -> Selector:
    """What a histogram counted within a threshold, which must be one of its edges.

    Between two edges nothing is known: a ratio there would be made up.
    """
    if threshold_s not in edges:
        near = sorted(sorted(edges, key=lambda edge: abs(edge - threshold_s))[:2])
        raise SLOError(
            f"Expected a threshold that is a bucket's edge of {histogram}, found "
            f"{threshold_s:g} s. Take {' or '.join(f'{e:g}' for e in near)} s, or give "
            f"the histogram an edge at {threshold_s:g}."
        )
    return Selector(f"{histogram}_bucket", {"le": str(float(threshold_s))})


@dataclass(frozen=True)
class SLO:
    """Of all that `total` counts, the share `objective` is good over `period_s`.

    Either the `good` events are counted or the `bad`. Raises SLOError for a promise
    that nobody could keep, or whose breach would page late or never: the ratio of
    errors cannot pass 1, so `FAST_BURN` times the budget has to stay below it.
    """

    name: str
    objective: float
    description: str
    total: Selector
    good: Selector | None = None
    bad: Selector | None = None
    period_s: float = 30 * DAY_S

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z][a-z0-9_]*", self.name):
            raise SLOError(
                f"Expected a name of small letters, digits and _, found {self.name!r}. "
                "It becomes a label and the name of alerts: choose such a name."
            )
        if (self.good is None) == (self.bad is None):
            raise SLOError(
                f"Expected {self.name} to count either its good events or its bad, "
                f"found {'neither' if self.good is None else 'both'}. Give one of them."
            )
        lowest = 1 - 1 / FAST_BURN
        if not lowest < self.objective < 1:
            raise SLOError(
                f"Expected an objective of {self.name} between {lowest:.2%} and 100 %, "
                f"found {self.objective:.2%}. "
                + (
                    "Without a budget for errors every error breaks it: promise less."
                    if self.objective >= 1
                    else "Even if all failed, its budget would not burn "
                    f"{FAST_BURN:g} times too fast: the fast alert could not fire, and "
                    "the slow one would after hours, or never: promise more."
                )
            )

    @property
    def budget(self) -> float:
        """The share of events that may be bad."""
        return 1 - self.objective


@dataclass(frozen=True)
class Window:
    """An alert's condition: the budget burns `burn` times too fast, over both windows.

    The long one says that it matters, the short one that it still goes on, so that
    the alert ends soon after the fault.
    """

    severity: str  # "page" wakes somebody, "ticket" waits for the morning
    burn: float
    long_s: float
    short_s: float
