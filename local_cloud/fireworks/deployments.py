"""On-demand deployments: replicas that boot, take load, scale and go to sleep.

There is one model behind all of them. A replica here is a line in a book: when it
began to boot, and so when it serves and what it costs. The rules are those of the
service: requests to a deployment at zero wake it and are refused meanwhile; READY is
not yet serving; booting is not billed.
"""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from local_cloud.fireworks.clock import moment
from local_cloud.fireworks.wire import INVALID_ARGUMENT, Refusal

TICK_S = 15.0  # how often load is looked at while there is any
KEPT_S = 3600.0  # how long calls are remembered; the longest window there may be
QUOTA = 64  # replicas of one deployment (emulated)
CONCURRENT = 8.0  # requests at once that are a replica's full load (emulated)
REGIONS = {"EUROPE": "EU_FRANKFURT_1", "APAC": "AP_TOKYO_1"}  # emulated, else Iowa
PURGE_S = 7 * 86_400.0  # a deleted deployment can be brought back this long

WINDOWS_S = {  # default, least, most
    "scaleUpWindow": (30.0, 0.0, 3600.0),
    "scaleDownWindow": (600.0, 0.0, 3600.0),
    "scaleToZeroWindow": (3600.0, 300.0, math.inf),
}
LOAD_TARGETS = (
    "default",
    "tokens_generated_per_second",
    "prompt_tokens_per_second",
    "requests_per_second",
    "concurrent_requests",
)


@dataclass(frozen=True)
class Boot:
    """What a replica goes through before it serves, in virtual seconds (emulated)."""

    schedule_s: float = 15.0
    download_s: float = 45.0
    initialise_s: float = 30.0
    route_s: float = 5.0  # READY, but no request reaches it yet

    @property
    def ready_s(self) -> float:
        return self.schedule_s + self.download_s + self.initialise_s


@dataclass(frozen=True)
class Call:
    """A request that a deployment answered, or refused: `at_s` is when it ended."""

    at_s: float
    status: int = 200
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0
    load_s: float = 0.0  # total_s in virtual time


@dataclass
class Deployment:
    """One deployment: what its owner set, and the replicas that follow from it."""

    name: str
    fields: dict[str, Any]  # as in the API; defaults filled in by `complete`
    created_s: float
    boot: Boot = field(default_factory=Boot)
    replicas: list[float] = field(default_factory=list)  # when each began to boot
    calls: deque[Call] = field(default_factory=deque)
    gpu_seconds: float = 0.0
    updated_s: float = 0.0
    last_used_s: float = -math.inf
    last_served_s: float = -math.inf
    deleted_s: float | None = None
    first_ready_s: float = 0.0
    busy: int = 0  # requests being answered now

    def __post_init__(self) -> None:
        self.settled_s = self.updated_s = self.created_s
        self._looked_s = self.created_s
        self._wanted: deque[tuple[float, int]] = deque()
        self._grow(min(max(self._least, 1), self._most))
        boots = self.boot.ready_s if self.replicas else 0.0
        self.first_ready_s = self.created_s + boots

    @property
    def _least(self) -> int:
        return self.fields["minReplicaCount"]

    @property
    def _most(self) -> int:
        return self.fields["maxReplicaCount"]

    def _window(self, name: str) -> float:
        return seconds(self.fields["autoscalingPolicy"][name], name)

    # Time passes.

    def settle(self, now: float) -> None:
        """Let everything happen that is due by `now`: billing, scaling, sleep."""
        while (due := self._due()) <= now:
            self._bill(due)
            self._scale(due)
        self._bill(now)
        while self.calls and self.calls[0].at_s < now - KEPT_S:
            self.calls.popleft()

    def _due(self) -> float:
        """The next moment at which something is decided."""
        if self.deleted_s is not None:
            return math.inf
        due = self._sleeps_s()
        if self.settled_s < self.last_used_s + KEPT_S + TICK_S:
            due = min(due, self._looked_s + TICK_S)
        return max(due, self.settled_s)

    def _bill(self, now: float) -> None:
        self.gpu_seconds += self._gpu_seconds(self.settled_s, now)
        self.settled_s = max(self.settled_s, now)

    def _gpu_seconds(self, start: float, end: float) -> float:
        ready = (began + self.boot.ready_s for began in self.replicas)
        up = sum(max(0.0, end - max(start, since)) for since in ready)
        return up * self.fields["acceleratorCount"]

    def _sleeps_s(self) -> float:
        """When the last replica goes, if nobody asks until then."""
        if self._least or self.busy or not self.replicas:
            return math.inf
        # Not before anyone could have used it.
        idle_since = max(self.last_used_s, self.replicas[0] + self.boot.ready_s)
        return idle_since + self._window("scaleToZeroWindow")

    def _scale(self, now: float) -> None:
        self._looked_s = now
        if now >= self._sleeps_s():
            self.replicas.clear()
            return
        least = max(self._least, 1) if self.replicas else self._least
        wanted = min(max(self._load_wants(now), least), self._most)
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - self._window("scaleDownWindow"):
            self._wanted.popleft()
        if wanted > len(self.replicas):
            if self.replicas or self._least:  # at zero only a request wakes it
                self._grow(wanted, now)
        else:
            # Down only to what was wanted at every moment of the window.
            keep = max(count for _, count in self._wanted)
            del self.replicas[max(keep, least) :]

    def _load_wants(self, now: float) -> int:
        """Replicas that the load asks for: the most that any target asks for."""
        window = max(self._window("scaleUpWindow"), TICK_S)
        recent = list(takewhile(lambda c: c.at_s > now - window, reversed(self.calls)))
        rates = {
            "tokens_generated_per_second": sum(c.completion_tokens for c in recent),
            "prompt_tokens_per_second": sum(c.prompt_tokens for c in recent),
            "requests_per_second": len(recent),
            "concurrent_requests": sum(c.load_s for c in recent),
        }
        # Little's law: time spent in requests, per second, is how many run at once.
        rates["default"] = rates["concurrent_requests"] / CONCURRENT
        targets = self.fields["autoscalingPolicy"]["loadTargets"]
        return max(math.ceil(rates[k] / window / t) for k, t in targets.items())

    def _grow(self, count: int, now: float | None = None) -> None:
        began = self.settled_s if now is None else now
        self.replicas += [began] * (count - len(self.replicas))

    # Requests and orders come.

    def serves(self, now: float) -> bool:
        """Whether a request is answered; wakes the deployment if it sleeps."""
        self.settle(now)
        if self.deleted_s is not None:
            return False
        self.last_used_s = now
        if not self.replicas:
            self._grow(min(max(self._least, 1), self._most), now)
        return any(self._age(r, now) >= self.boot.route_s for r in self.replicas)

    def _age(self, began: float, now: float) -> float:
        """Seconds since this replica is ready; negative while it boots."""
        return now - began - self.boot.ready_s

    def note(self, call: Call) -> None:
        """Remember a call, for the autoscaler and the metrics."""
        self.settle(call.at_s)
        self.calls.append(call)
        self.last_used_s = call.at_s
        if call.status == 200:
            self.last_served_s = call.at_s

    def scale_to(self, count: int, now: float) -> None:
        """Have this many replicas at once; the autoscaler goes on from there.

        Raises:
            Refusal: it is outside of what the deployment allows.
        """
        self.settle(now)
        if not self._least <= count <= self._most:
            raise Refusal(
                INVALID_ARGUMENT,
                f"Expected replicaCount from {self._least} to {self._most}, found "
                f"{count}. Update minReplicaCount or maxReplicaCount first.",
            )
        del self.replicas[count:]
        self._grow(count, now)
        self._wanted.clear()

    def update(self, fields: dict[str, Any], now: float) -> None:
        """Take new settings; replicas follow at once."""
        self.settle(now)
        self.fields, self.updated_s = fields, now
        self._wanted.clear()
        del self.replicas[self._most :]
        if self._least > len(self.replicas):
            self._grow(self._least, now)

    def delete(self, now: float) -> None:
        """Stop everything and wait to be purged."""
        self.settle(now)
        self.replicas.clear()
        self.deleted_s = now

    def undelete(self, now: float) -> None:
        """Come back, without replicas unless some must be there."""
        self.settle(now)
        self.deleted_s, self.updated_s = None, now
        self._grow(self._least, now)

    # What the API shows.

    def resource(self, now: float) -> dict[str, Any]:
        """The deployment as its owner sees it."""
        self.settle(now)
        stages = self._stages(now)
        return {
            **self.fields,
            "name": self.name,
            "state": self._state(now),
            "createTime": moment(self.created_s),
            "updateTime": moment(self.updated_s),
            "desiredReplicaCount": len(self.replicas),
            "replicaCount": stages["readyReplicaCount"],
            "replicaStats": stages,
            "region": self._region(),
            "status": {"code": "OK", "message": "emulated: GPUs, region, boot times"},
            **self._end(),
        }

    def _state(self, now: float) -> str:
        if self.deleted_s is not None:
            return "DELETED"
        return "CREATING" if now < self.first_ready_s else "READY"

    def _region(self) -> str:
        placed = self.fields.get("placement") or {}
        area = REGIONS.get(placed.get("multiRegion", ""), "US_IOWA_1")
        return placed.get("region") or area

    def _end(self) -> dict[str, Any]:
        if self.deleted_s is None:
            return {}
        return {
            "deleteTime": moment(self.deleted_s),
            "purgeTime": moment(self.deleted_s + PURGE_S),
        }

    def _stages(self, now: float) -> dict[str, int]:
        names = ("pendingScheduling", "downloadingModel", "initializing", "ready")
        counts = dict.fromkeys(names, 0)
        for began in self.replicas:
            age = now - began
            passed = 0
            for stage_s in (
                self.boot.schedule_s,
                self.boot.download_s,
                self.boot.initialise_s,
            ):
                age -= stage_s
                passed += age >= 0
            counts[names[passed]] += 1
        return {f"{name}ReplicaCount": count for name, count in counts.items()}


def seconds(text: str, what: str) -> float:
    """A duration of the API: "300s", or "1.5s".

    Raises:
        Refusal: it is written in another way.
    """
    if not isinstance(text, str) or not re.fullmatch(r"\d+(\.\d+)?s", text):
        raise Refusal(
            INVALID_ARGUMENT,
            f'{what}: expected a duration in seconds such as "300s", found {text!r}.',
        )
    return float(text[:-1])


def complete(fields: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of what its owner sets about scaling.

    Raises:
        Refusal: counts or windows that the service does not take (code 3).
    """
    least = fields.get("minReplicaCount", 0)
    most = fields.get("maxReplicaCount", max(least, 1))
    if not 0 <= least <= most <= QUOTA:
        raise Refusal(
            INVALID_ARGUMENT,
            f"Expected 0 <= minReplicaCount <= maxReplicaCount <= {QUOTA}, found "
            f"{least} and {most}.",
        )
    policy = dict(fields.get("autoscalingPolicy") or {})
    for name, (default, low, high) in WINDOWS_S.items():
        policy.setdefault(name, f"{default:g}s")
        if not low <= seconds(policy[name], name) <= high:
            limits = f"at least {low:g}s" if low else f"at most {high:g}s"
            raise Refusal(
                INVALID_ARGUMENT, f"{name}: expected {limits}, found {policy[name]}."
            )
    policy["loadTargets"] = _targets(policy.get("loadTargets") or {"default": 0.8})
    return {
        **fields,
        "minReplicaCount": least,
        "maxReplicaCount": most,
        "autoscalingPolicy": policy,
    }


def _targets(targets: dict[str, float]) -> dict[str, float]:
    for name, value in targets.items():
        if name not in LOAD_TARGETS or not 0 < value < math.inf:
            raise Refusal(
                INVALID_ARGUMENT,
                f"loadTargets: expected numbers above 0 for any of "
                f"{', '.join(LOAD_TARGETS)}; found {name}={value}.",
            )
    return targets
