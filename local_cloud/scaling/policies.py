"""What policies see, answer and remember: the seam between ideas and machinery.

The simulator, the control loop, the balancer and the manifests know policies by these
types alone. The policies themselves are in `scaling_strategies.py`; here is what they
count with and what they keep of the past.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

ROUNDING = 1e-9  # 0.6 / 0.2 is a little more than 3: no reason for a fourth replica


@dataclass(frozen=True)
class Load:
    """What an autoscaler sees at one tick."""

    time_s: float  # on any clock that never goes back
    ready: int  # replicas that serve
    starting: int = 0  # replicas that were asked for and do not serve yet
    metric: float | None = None  # mean over the ready replicas that reported
    missing: int = 0  # ready replicas that did not report
    queue: int = 0  # requests or jobs that wait for a replica
    concurrency: float = 0.0  # requests in flight in all, mean since the last tick

    @property
    def replicas(self) -> int:
        """All that were asked for."""
        return self.ready + self.starting


class Autoscaler(Protocol):
    """Says how many replicas there should be; remembers its own past, nothing else."""

    def desired(self, load: Load) -> int:
        """The replicas wanted now; called once a tick, in the order of time."""
        ...

    def reset(self) -> None:
        """Forget the past."""
        ...


class Picker(Protocol):
    """Says which member of a fleet gets the next request."""

    def pick(self, loads: Sequence[int]) -> int:
        """The index of a member, given the requests in flight at each; at least one."""
        ...


@dataclass(frozen=True)
class Limit:
    """At most so many pods, or so many percent of them, within a period."""

    kind: Literal["Pods", "Percent"]
    value: int
    period_s: int = 15

    def __post_init__(self) -> None:
        if self.kind not in ("Pods", "Percent"):
            raise ValueError(
                f"Limit: expected the kind Pods or Percent, found {self.kind!r}"
            )
        check_whole(self, 0, "value")
        check_whole(self, 1, "period_s")

    def ceiling(self, current: int, change: int) -> int:
        """The most replicas allowed, after a `change` within the period."""
        before = current - change
        if self.kind == "Pods":
            return before + self.value
        return math.ceil(before * (1 + self.value / 100) - ROUNDING)

    def floor(self, current: int, change: int) -> int:
        """The fewest replicas allowed, after a `change` within the period."""
        before = current - change
        if self.kind == "Pods":
            return before - self.value
        return int(before * (1 - self.value / 100) + ROUNDING)


@dataclass(frozen=True)
class Rules:
    """How replicas may come, or go: after how long a look back, and how fast.

    Of several limits the one that allows the most counts, as by default in Kubernetes.
    """

    window_s: int
    limits: tuple[Limit, ...]

    def __post_init__(self) -> None:
        check_whole(self, 0, "window_s")
        if not self.limits:
            raise ValueError(
                "Rules: expected at least one limit, found none; to allow no change, "
                'give Limit("Pods", 0)'
            )


@dataclass
class Pace:
    """How an autoscaler's past holds it back: what it recommended, what it changed."""

    up: Rules
    down: Rules
    recommended: list[tuple[float, int]] = field(default_factory=list)
    changed: list[tuple[float, int]] = field(default_factory=list)

    def step(
        self, now: float, current: int, wanted: int, minimum: int, maximum: int
    ) -> int:
        """The replicas to have now; remembers what was wanted, and what changes."""
        wanted = self.stabilised(now, current, wanted)
        wanted = self.limited(now, current, wanted, minimum, maximum)
        if wanted != current:
            longest = max(x.period_s for x in (*self.up.limits, *self.down.limits))
            self.changed = within(self.changed, now - longest)
            self.changed.append((now, wanted - current))
        return wanted

    def stabilised(self, now: float, current: int, wanted: int) -> int:
        """The least move that all recommendations of the window agree with."""
        longest = max(self.up.window_s, self.down.window_s)
        self.recommended = within(self.recommended, now - longest)
        self.recommended.append((now, wanted))
        up = within(self.recommended, now - self.up.window_s)
        down = within(self.recommended, now - self.down.window_s)
        least = min([wanted, *(n for _, n in up)])
        most = max([wanted, *(n for _, n in down)])
        return min(max(current, least), most)

    def limited(
        self, now: float, current: int, wanted: int, minimum: int, maximum: int
    ) -> int:
        """No further from what there was a period ago than a limit allows."""
        most = max(
            limit.ceiling(current, self._since(now, limit)) for limit in self.up.limits
        )
        least = min(
            limit.floor(current, self._since(now, limit)) for limit in self.down.limits
        )
        low, high = min(current, max(least, minimum)), max(current, most)
        return max(minimum, min(max(wanted, low), high, maximum))

    def _since(self, now: float, limit: Limit) -> int:
        return sum(change for _, change in within(self.changed, now - limit.period_s))


class Horizontal(Autoscaler, Protocol):
    """An autoscaler that Kubernetes can run itself: HorizontalPodAutoscaler."""

    target: float
    minimum: int
    maximum: int
    metric: str
    up: Rules
    down: Rules

    @property
    def is_resource(self) -> bool:
        """Whether the metric is a share of what the pod requests."""
        ...


class Queued(Autoscaler, Protocol):
    """An autoscaler that KEDA can run: by the length of a queue, down to zero."""

    per_replica: float
    activation: int
    minimum: int
    maximum: int
    polling_s: int
    cooldown_s: int

    @property
    def hpa(self) -> Horizontal:
        """Who decides between one replica and many."""
        ...


def filled(load: Load, ratio: float, busy: float) -> tuple[float, int]:
    """What all replicas together would report, in targets, and how many they are.

    Silent replicas are taken for `busy` before one is removed and for idle before one
    is added; starting ones for idle before one is added.

    Args:
        ratio: of the mean of those that reported to the target.
        busy: of a replica that has all it can do to the target.
    """
    total = ratio * (load.ready - load.missing)
    if ratio > 1:
        return total, load.ready + load.starting
    return total + load.missing * busy, load.ready


@dataclass
class Looks:
    """A reading over time, and its mean over as long a look back as one likes."""

    seen: list[tuple[float, float]] = field(default_factory=list)

    def note(self, now: float, value: float, longest_s: float) -> None:
        """One more reading; what is older than the longest look is forgotten."""
        self.seen = [s for s in self.seen if s[0] > now - longest_s]
        self.seen.append((now, value))

    def mean(self, after: float) -> float:
        """Of the readings since then."""
        values = [value for time, value in self.seen if time > after]
        return sum(values) / len(values)


@dataclass
class Grace:
    """The last replica goes when nobody has needed it for a while."""

    idle_since: float | None = None

    def step(self, now: float, replicas: int, wanted: int, grace_s: float) -> int:
        """The replicas to have now, where so many are wanted."""
        if wanted:
            self.idle_since = None
            return wanted
        if self.idle_since is None:
            self.idle_since = now
        return 1 if replicas and now - self.idle_since < grace_s else 0


def least_from(loads: Sequence[int], start: int) -> int:
    """Where the least load is, looking from `start` on and then from the beginning."""
    least = 0 if 0 in loads else min(loads)
    try:
        return loads.index(least, start)
    except ValueError:  # none from here to the end
        return loads.index(least)


def within(past: list[tuple[float, int]], after: float) -> list[tuple[float, int]]:
    """The entries of a history that are younger than `after`."""
    return [entry for entry in past if entry[0] > after]


def check_bounds(name: str, target: float, minimum: int, maximum: int) -> None:
    """Raises ValueError for numbers that no fleet can follow."""
    if not (math.isfinite(target) and target > 0):
        raise ValueError(f"{name}: expected a target above 0, found {target}")
    whole = isinstance(minimum, int) and isinstance(maximum, int)
    if not whole or not 0 <= minimum <= maximum or maximum < 1:
        raise ValueError(
            f"{name}: expected 0 <= minimum <= maximum, both whole, and at least 1 "
            f"replica at most, found minimum {minimum} and maximum {maximum}"
        )


def check_least(one: object, least: float, *names: str) -> None:
    """Raises ValueError for a field that is not finite, or below `least`."""
    for name in names:
        number = getattr(one, name)
        if not (math.isfinite(number) and number >= least):
            raise ValueError(
                f"{type(one).__name__}: expected {name} of at least {least:g}, found "
                f"{number}"
            )


def check_whole(one: object, least: int, *names: str) -> None:
    """The same, of fields that must be whole, too."""
    check_least(one, least, *names)
    for name in names:
        if not isinstance(number := getattr(one, name), int):
            raise ValueError(
                f"{type(one).__name__}: expected a whole {name}, found {number}"
            )
