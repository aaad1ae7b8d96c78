"""Asynchronous invocation: events that are accepted now and worked off in time.

The caller gets a request id and nothing else. So the platform owns what happens next,
and does what Lambda does: an error of the function is tried again after a while,
twice; throttling is waited out, as often as it takes, until the event is too old. What
could not be done goes to the function's `on_failure`, as a record in Lambda's shape.

Events wait in memory here. Lambda keeps them on disk; who needs that on this machine
takes a `Queue`. Two conditions are ours and not Lambda's: "PlatformClosed", of what
still waits when the platform closes, and "PlatformFailed", where the platform itself
went wrong.
"""

from __future__ import annotations

import heapq
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from local_cloud.functions.errors import PlatformClosed, TooManyRequests
from local_cloud.functions.sandbox import ARN

if TYPE_CHECKING:
    from local_cloud.functions.platform import Function, Result

FIRST_BACKOFF_S, MOST_BACKOFF_S = 1.0, 300.0  # after throttling, doubling in between

Run = Callable[["Function", bytes, str], "Result"]
log = logging.getLogger(__name__)


@dataclass
class Event:
    """One accepted event and what has become of it so far."""

    function: Function
    payload: bytes
    request_id: str
    accepted: float = field(default_factory=time.monotonic)
    attempts: int = 0
    throttled: int = 0
    last: Result | None = None

    @property
    def too_old(self) -> bool:
        return time.monotonic() - self.accepted > self.function.max_event_age_s


class Events:
    """The events of a platform; `run` invokes a function with a payload and an id."""

    def __init__(self, run: Run, workers: int):
        self._run = run
        self._heap: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._change = threading.Condition()
        self._closed = False
        self._workers = ThreadPoolExecutor(workers, "event")
        self._thread = threading.Thread(
            target=self._dispatch, name="events", daemon=True
        )
        self._thread.start()

    def accept(self, function: Function, payload: bytes, request_id: str) -> None:
        self._put(Event(function, payload, request_id), 0.0)

    def close(self) -> None:
        """Waits for attempts under way; gives up the events that wait, and says so."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join()
        self._workers.shutdown()
        for _, _, event in sorted(self._heap):
            give_up(event, "PlatformClosed")

    def _put(self, event: Event, delay_s: float) -> None:
        with self._change:
            due = time.monotonic() + delay_s
            heapq.heappush(self._heap, (due, next(self._order), event))
            self._change.notify()

    def _dispatch(self) -> None:
        with self._change:
            while not self._closed:
                left = self._heap[0][0] - time.monotonic() if self._heap else None
                if left is None or left > 0:
                    self._change.wait(left)
                else:
                    _, _, event = heapq.heappop(self._heap)
                    self._workers.submit(self._attempt, event)

    def _attempt(self, event: Event) -> None:
        function = event.function
        if event.too_old:
            give_up(event, "EventAgeExceeded")
            return
        try:
            result = self._run(function, event.payload, event.request_id)
        except (TooManyRequests, OSError):  # no room: wait until there is some
            wait = FIRST_BACKOFF_S * 2**event.throttled
            event.throttled += 1
            self._put(event, min(wait, MOST_BACKOFF_S))
            return
        except PlatformClosed:
            self._put(event, 0.0)
            return
        except Exception:  # ours: nobody looks into this thread's future
            log.exception("%s of %s failed", event.request_id, function.name)
            give_up(event, "PlatformFailed")
            return
        event.attempts += 1
        event.last = result
        if result.error is None:
            return
        if event.attempts > function.retries:
            give_up(event, "RetriesExhausted")
        else:  # after one minute, then after two
            self._put(event, function.retry_delay_s * event.attempts)


def give_up(event: Event, condition: str) -> None:
    """Hands the event to the function's destination, or says that it is lost."""
    if not event.function.on_failure:
        name = event.function.name
        log.warning("%s of %s is dropped: %s", event.request_id, name, condition)
        return
    try:
        event.function.on_failure(record(event, condition))
    except Exception:  # the destination is the caller's code: its failure is told
        log.exception("on_failure of %s failed", event.function.name)


def record(event: Event, condition: str) -> dict[str, Any]:
    """What a failure destination gets, in Lambda's shape (version 1.0)."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    told: dict[str, Any] = {
        "version": "1.0",
        "timestamp": now,
        "requestContext": {
            "requestId": event.request_id,
            "functionArn": f"{ARN}{event.function.name}:$LATEST",
            "condition": condition,
            "approximateInvokeCount": event.attempts,
        },
        "requestPayload": json.loads(event.payload),
    }
    if event.last:
        told["responseContext"] = {
            "statusCode": 200,
            "executedVersion": "$LATEST",
            "functionError": event.last.error,
        }
        told["responsePayload"] = json.loads(event.last.payload)
    return told
