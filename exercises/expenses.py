"""What exercise 4 is tried on: notes asked for real, and a day of them replayed.

`asking` sends requests by the SDK to the stand-in and tells what came as a `Reply`.
`replay` lets a day's notes come to a deployment, the stand-in's own: how it boots,
scales, sleeps and is billed. What is put in here is what a replica does with a note:
so many at once, so many seconds each, first come, first served.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

# What needs the SDK or the stand-in is imported when it is used: that takes a second,
# and a saved file is to be checked in less.
if TYPE_CHECKING:
    from local_cloud.fireworks.app import Served
    from local_cloud.fireworks.deployments import Deployment

MODEL = "accounts/fireworks/models/smollm2-135m-instruct"  # paid by the token
FALLBACK = "local"  # on a machine of ours: always there, and knows no forms
DAY_S = 86_400.0


@dataclass(frozen=True)
class Reply:
    """What came of asking once."""

    status: int  # of HTTP
    text: str = ""
    finish_reason: str | None = None  # None: the stream was cut
    retry_after_s: float | None = None  # None: not told


@dataclass(frozen=True)
class Replica:
    """What was measured of one replica, and its price."""

    slots: int  # notes at once
    answer_s: float  # seconds of one note, with all slots busy
    usd_per_hour: float

    @property
    def per_hour(self) -> float:
        """Notes an hour, if it never waits."""
        return 3600 * self.slots / self.answer_s


@contextlib.contextmanager
def asking() -> Iterator[tuple[Callable[[str, Mapping[str, Any]], Reply], Served]]:
    """`ask(model, request)`, by the SDK, and the stand-in that it asks."""
    from fireworks_deployment import stand_in
    from local_cloud.fireworks import trials

    with trials.cloud("cpu") as cloud, stand_in(cloud.url) as client:

        def ask(model: str, request: Mapping[str, Any]) -> Reply:
            if model == FALLBACK:
                return _local(cloud, request)
            return _sent(client, model, request)

        yield ask, cloud


def _sent(client: Any, model: str, request: Mapping[str, Any]) -> Reply:
    from local_cloud.fireworks.asking import attempt

    reading = attempt(client, 20.0, {"model": model, **request})
    response = getattr(reading.problem, "response", None)
    if response is None:  # whole, or cut
        reason = None if reading.problem else reading.finish_reason
        return Reply(200, reading.text, reason)
    told = response.headers.get("retry-after")
    return Reply(response.status_code, retry_after_s=float(told) if told else None)


def _local(cloud: Served, request: Mapping[str, Any]) -> Reply:
    from models import Sampling

    assert cloud.state.engine is not None
    sampling = Sampling(max_tokens=request["max_tokens"])
    told = cloud.state.engine.generate(list(request["messages"]), sampling)
    return Reply(200, told.text, told.finish_reason)


@dataclass
class Replayed:
    """What came of a day: the seconds that each note took, waits included."""

    latencies_s: list[float] = field(default_factory=list)
    usd: float = 0.0
    most_replicas: int = 0

    def share_within(self, seconds: float) -> float:
        """The share of the notes that were answered in so many seconds."""
        return sum(x <= seconds for x in self.latencies_s) / len(self.latencies_s)

    def __str__(self) -> str:
        return (
            f"{self.share_within(10):.1%} of {len(self.latencies_s):,} notes within "
            f"10 s, {self.usd:.0f} dollars, at most {self.most_replicas} replicas"
        )


def replay(
    times: Sequence[float], arguments: Mapping[str, Any], replica: Replica
) -> Replayed:
    """Let notes come at these seconds of a day to a deployment made with `arguments`.

    `arguments` are those of `deployments.create`: min_replica_count,
    max_replica_count, autoscaling_policy. A note that finds it asleep waits.

    Raises:
        Refusal: the service does not take these arguments.
    """
    from local_cloud.fireworks.deployments import Call, Deployment, complete

    fields = {**camel_case(arguments), "acceleratorCount": 1}
    deployment = Deployment("day", complete(fields), created_s=0.0)
    waiting: deque[float] = deque()  # when each came
    at_work: deque[tuple[float, float]] = deque()  # when each will end, and came
    told = Replayed()

    def begin(now: float) -> None:
        """Put waiting notes into free slots."""
        serving = sum(
            _serves_s(deployment, i) <= now for i in range(len(deployment.replicas))
        )
        told.most_replicas = max(told.most_replicas, serving)
        for _ in range(min(serving * replica.slots - len(at_work), len(waiting))):
            at_work.append((now + replica.answer_s, waiting.popleft()))

    def until(now: float) -> None:
        """Let all end that does by `now`; where all wait, the boot they wait for."""
        while at_work or waiting:
            if not at_work and not deployment.replicas:  # none is allowed
                return
            end = at_work[0][0] if at_work else _serves_s(deployment, 0)
            if end > now:
                return
            if at_work:
                _, came = at_work.popleft()
                deployment.busy -= 1
                deployment.note(Call(end, load_s=end - came))
                told.latencies_s.append(end - came)
            if waiting:
                begin(end)

    for now in times:
        until(now)
        if not deployment.busy:  # else it is awake
            deployment.serves(now)  # and so it will be
        deployment.busy += 1
        waiting.append(now)
        begin(now)
    until(2 * DAY_S)
    told.latencies_s += [math.inf] * len(waiting)
    deployment.settle(DAY_S)
    told.usd = deployment.gpu_seconds / 3600 * replica.usd_per_hour
    return told


def _serves_s(deployment: Deployment, number: int) -> float:
    """From when on this replica works on notes."""
    boot = deployment.boot
    return deployment.replicas[number] + boot.ready_s + boot.route_s


def camel_case(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The SDK's names as the service's: min_replica_count becomes minReplicaCount."""
    made = {}
    for name, value in arguments.items():
        first, *rest = name.split("_")
        nested = isinstance(value, Mapping) and name != "load_targets"
        key = "".join([first, *(word.capitalize() for word in rest)])
        made[key] = camel_case(value) if nested else value
    return made
