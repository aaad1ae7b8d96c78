"""Alerts without Prometheus: the same rule groups, evaluated in this process.

    with Evaluator(groups, {"api": "127.0.0.1:8000"}, [webhook, mailbox]) as evaluator:
        evaluator.alerts()

It takes the place of `stack.Stack`: it scrapes, records, evaluates and notifies as
Prometheus and Alertmanager do, as far as the alerts of one service need it. It has no
storage, silences or grouping, and it dies with the machine it watches.

Its time follows the monotonic clock. When the wall clock is set, the windows of
Prometheus shift with it; here they do not, and the rule `ClockStep` sees it.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from typing import Any, Self, TypeVar

from course.process import wait_until
from local_cloud.monitoring.alerting import Alert, Rules
from local_cloud.monitoring.notify import Outbox, outboxes, payload, utc
from local_cloud.monitoring.objectives import INTERVAL_S
from local_cloud.monitoring.promql import Query
from local_cloud.monitoring.samples import Labels, Samples, Target
from local_cloud.monitoring.stack import BEAT_S, WATCHDOG, Group, Receiver, StackError

KEEP_S = 900.0  # of samples at least, for pictures
MOST_BYTES = 8 << 20  # of one scrape
RETRY_S, LONGEST_RETRY_S = 0.5, 10.0
NOTICE_S = 0.05  # between looks into an empty outbox

T = TypeVar("T")


class Evaluator:
    """A running evaluator in a thread of its own; it takes the place of a `Stack`.

    Args:
        groups: rule groups, as the dicts that Prometheus reads.
        targets: job to "host:port"; their `/metrics` is scraped.
        receivers: with a `config()`, as Alertmanager reads it.
        scale: 1 in production, 60 where a minute passes in a second.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        targets: Mapping[str, str],
        receivers: Sequence[Receiver] = (),
        *,
        scale: float = 60.0,
    ) -> None:
        self.scale, self.interval_s = scale, INTERVAL_S / scale
        self.rules = Rules(groups)
        self.samples = Samples(max(KEEP_S, self.rules.reach_s + 2 * self.interval_s))
        self.outboxes = outboxes(receivers)
        self._targets = [
            Target(self.samples, {"job": job, "instance": address}, self.rules.names)
            for job, address in targets.items()
        ]
        self._told: dict[Labels, Alert] = {}
        self._beat_at = -math.inf
        self._started = time.time() - time.monotonic()

    def now(self) -> float:
        """Seconds since 1970 by the clock of the start, whatever was set since."""
        return self._started + time.monotonic()

    def __enter__(self) -> Self:
        running = threading.Event()
        run = self._run(running)
        self._thread = threading.Thread(target=asyncio.run, args=(run,))
        self._thread.start()
        wait_until(running.is_set, 10, "the evaluator to run")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):  # it has ended by itself, and has said why
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def await_scraped(self, deadline_s: float = 20.0) -> None:
        """Waits until every target was asked once."""
        asked = len(self._targets)
        wait_until(lambda: len(self.query("up")) == asked, deadline_s, "scrapes")

    def alerts(self) -> list[dict[str, Any]]:
        """What is pending or firing, as Prometheus tells it; without the watchdog."""
        told = [vars(a) for a in self._ask(self.rules.alerts) if a.name != WATCHDOG]
        return [{**alert, "activeAt": utc(alert["active_at"])} for alert in told]

    def query(self, expr: str, at: float | None = None) -> list[dict[str, Any]]:
        """Series and their value now: `[{"metric": {...}, "value": [at, "1"]}]`."""
        moment, query = self.now() if at is None else at, Query(expr)
        found = self._ask(lambda: query.vector(self.samples, moment))
        return [
            {"metric": dict(labels), "value": [moment, repr(value)]}
            for labels, value in found.items()
        ]

    def query_range(
        self, expr: str, start: float, end: float, step_s: float
    ) -> list[dict[str, Any]]:
        """Series and their values from start to end, in seconds since 1970."""
        times = [start + i * step_s for i in range(int((end - start) / step_s) + 1)]
        series: dict[Labels, list[Any]] = {}
        for at in times:
            found = self._ask(lambda at=at: Query(expr).vector(self.samples, at))
            for labels, value in found.items():
                series.setdefault(labels, []).append([at, repr(value)])
        return [{"metric": dict(of), "values": values} for of, values in series.items()]

    def _ask(self, what: Callable[[], T]) -> T:
        """Runs in the loop's thread, where nobody else is at the samples."""
        if not self._thread.is_alive():
            raise StackError(
                "Expected the evaluator to run, found that it ended: nothing is "
                "watched. Leave the block and start anew."
            )

        async def answer() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result(30)

    async def _run(self, running: threading.Event) -> None:
        import httpx

        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        half = self.interval_s / 2  # evaluate what the last scrape brought
        async with (
            httpx.AsyncClient(trust_env=False, timeout=60) as self._client,
            asyncio.TaskGroup() as group,
        ):
            work = [self._every(0, self._scrape, target) for target in self._targets]
            work += [self._every(half, self._evaluate)]
            work += [self._notify(outbox) for outbox in self.outboxes]
            tasks = [group.create_task(one) for one in work]
            running.set()
            await self._over.wait()
            for task in tasks:
                task.cancel()

    async def _every(
        self, offset_s: float, what: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        """Keeps the beat: what is late skips beats, it does not shift them."""
        due = self.now() + offset_s
        while True:
            await asyncio.sleep(due - self.now())
            await what(due, *args)
            behind = (self.now() - due) / self.interval_s
            due += self.interval_s * max(1, math.ceil(behind))

    async def _scrape(self, at: float, target: Target) -> None:
        import httpx

        text = None  # the target is down, and `up` says so
        with suppress(httpx.HTTPError, TimeoutError, ValueError):
            # At a drill's pace the interval is too short for an answer on a busy
            # machine; `_every` skips the beats that one late scrape takes.
            async with asyncio.timeout(min(10.0, max(0.5, self.interval_s))):
                text = await self._get(f"http://{target.labels['instance']}/metrics")
        target.take(at, text)

    async def _get(self, url: str) -> str:
        body = bytearray()
        async with self._client.stream("GET", url) as response:
            response.raise_for_status()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise ValueError(f"expected {MOST_BYTES:,} bytes at most")
        return body.decode()

    async def _evaluate(self, at: float) -> None:
        self.rules.evaluate(self.samples, at)
        for alert in self.rules.alerts():
            if alert.state == "firing":
                self._fired(alert, at)
        for key, alert in [*self._told.items()]:
            if alert.state == "inactive":
                del self._told[key]
                self._tell(alert)
        self.samples.forget(at - self.samples.keep_s)

    def _fired(self, alert: Alert, at: float) -> None:
        """Tell of it once; of the watchdog again and again; of a ticket under a page
        not at all."""
        if alert.name == WATCHDOG:
            if at - self._beat_at >= BEAT_S / self.scale:
                self._beat_at = at
                self._tell(alert)
            return
        key = frozenset(alert.labels.items())
        page = {**alert.labels, "severity": "page"}
        covered = alert.labels.get("severity") == "ticket" and any(
            other.state == "firing" and other.labels == page
            for other in self.rules.alerts()
        )
        if key not in self._told and not covered:
            self._told[key] = alert
            self._tell(alert)

    def _tell(self, alert: Alert) -> None:
        for outbox in self.outboxes:
            # A beat that is late says nothing: it must push out no alert that waits.
            if alert.name == WATCHDOG and (outbox.waiting or not outbox.beats):
                continue
            outbox.waiting.append(payload(alert))

    async def _notify(self, outbox: Outbox) -> None:
        """Delivers one after the other, each until it is taken."""
        pause_s = RETRY_S
        while True:
            if not outbox.waiting:
                await asyncio.sleep(NOTICE_S)
                continue
            first = outbox.waiting[0]
            try:
                await asyncio.to_thread(outbox.deliver, first)
            except (OSError, HTTPException) as error:  # SMTP's are OSErrors
                outbox.failures += 1
                outbox.last_error = f"{type(error).__name__}: {error}"
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_RETRY_S)
                continue
            pause_s = RETRY_S
            if outbox.waiting[0] is first:  # else it was too old, and dropped
                outbox.waiting.popleft()
