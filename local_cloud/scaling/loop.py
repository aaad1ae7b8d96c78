"""The control loop: look at the replicas, ask a policy, scale, remember, again.

    with ControlLoop(HPA(...), replicas, balancer, every_s=1.0) as loop:
        ...
    draw(loop.history)

The policy is the same object that the simulator runs; only the facts are real here.
All times are the monotonic clock's, so that a clock set forward or back by hand or by
NTP changes nothing; a late tick moves those after it instead of making them hurry.
"""

from __future__ import annotations

import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Self

from local_cloud.scaling.balancer import Balancer, BalancerError, Traffic, checked
from local_cloud.scaling.policies import Autoscaler, Load
from local_cloud.scaling.replicas import Replica, ReplicaSet

SAMPLE_S = 0.1  # between two looks at the balancer; a tick sees their mean
SCRAPE_S = 1.0  # a replica may take to show its metrics

Measure = Callable[[Replica], float | None]  # None: it did not say


@dataclass(frozen=True)
class Tick:
    """What the loop saw and did at one tick."""

    load: Load
    desired: int  # as the policy says
    size: int  # as the set allows
    rate_per_s: float  # of answers since the last tick
    latency_s: float | None  # mean time in the system, by Little's law

    @property
    def time_s(self) -> float:
        """Seconds since the loop began."""
        return self.load.time_s


def scraped(metric: str) -> Measure:
    """Reads a metric without labels from each replica's `/metrics`."""
    line = re.compile(rf"^{re.escape(metric)}(?:\{{[^}}]*\}})? (\S+)", re.MULTILINE)

    def read(replica: Replica) -> float | None:
        open_url = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        try:
            with open_url(f"{replica.url}/metrics", timeout=SCRAPE_S) as response:
                found = line.findall(response.read().decode())
            return sum(map(float, found)) if found else None
        except (OSError, HTTPException, ValueError):
            return None

    return read


class ControlLoop:
    """Scales a set as a policy says, until the block ends; then raises what failed.

    Args:
        autoscaler: the policy.
        replicas: what it scales.
        balancer: where the requests are counted.
        every_s: seconds from tick to tick.
        measure: a replica's metric; None: requests in the system over ready replicas.
        on_tick: called with each tick, in the loop's thread.

    If the policy fails, the replicas stay as they are and go on serving. A look that
    the balancer does not answer is left out and counted in `missed`; if a tick has no
    other, it waits for one.
    """

    def __init__(
        self,
        autoscaler: Autoscaler,
        replicas: ReplicaSet,
        balancer: Balancer,
        *,
        every_s: float = 2.0,
        measure: Measure | None = None,
        on_tick: Callable[[Tick], None] | None = None,
    ):
        checked("every_s", every_s, 0.05, 3600)
        self.autoscaler, self.replicas, self.balancer = autoscaler, replicas, balancer
        self.every_s, self.measure, self.on_tick = every_s, measure, on_tick
        self.history: list[Tick] = []
        self.failure: Exception | None = None
        self.missed = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self.failure and kind is None:
            raise self.failure

    def _run(self) -> None:
        try:
            last, since = self._look(), time.monotonic()
            while seen := self._sampled():
                now = time.monotonic()
                self._tick(now - self._began, now - since, seen, last or seen[0])
                last, since = seen[-1], now
        except Exception as error:  # shown where the block ends
            self.failure = error

    def _sampled(self) -> list[Traffic]:
        """What the balancer looked like until the next tick; empty at the end."""
        due, seen = time.monotonic() + self.every_s, []
        while (left_s := due - time.monotonic()) > 0 or not seen:
            if self._end.wait(min(SAMPLE_S, left_s) if left_s > 0 else SAMPLE_S):
                return []
            if look := self._look():
                seen.append(look)
        return seen

    def _look(self) -> Traffic | None:
        """The balancer now; None if it does not say."""
        try:
            return self.balancer.stats()
        except BalancerError:
            self.missed += 1
            return None

    def _tick(
        self, time_s: float, took_s: float, seen: list[Traffic], last: Traffic
    ) -> None:
        load = self._load(time_s, seen)
        desired = self.autoscaler.desired(load)
        checked(f"replicas from {self.autoscaler!r}", desired, 0, 1_000_000)
        rate = (seen[-1].answered - last.answered) / took_s
        inside = load.concurrency
        size = self.replicas.scale(desired)
        tick = Tick(load, desired, size, rate, inside / rate if rate else None)
        self.history.append(tick)
        if self.on_tick:
            self.on_tick(tick)

    def _load(self, time_s: float, seen: list[Traffic]) -> Load:
        inside = sum(one.in_flight + one.queue for one in seen) / len(seen)
        ready = self.replicas.ready()
        told: list[float] = []
        if self.measure:
            answers = [self.measure(replica) for replica in ready]
            told = [value for value in answers if value is not None]
            metric = sum(told) / len(told) if told else None
        else:
            metric = inside / len(ready) if ready else None
        return Load(
            time_s=time_s,
            ready=len(ready),
            starting=max(0, self.replicas.size - len(ready)),
            metric=metric,
            missing=len(ready) - len(told) if self.measure else 0,
            queue=seen[-1].queue,
            concurrency=inside,
        )
