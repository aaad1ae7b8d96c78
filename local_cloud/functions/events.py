"""What calls functions: objects put into a bucket, messages in a queue, the clock.

`Bucket` tells a queue of every object put, `Mapping` reads a queue in batches and
invokes a function with each, `Schedule` fires at planned times. Events have the shapes
that S3, SQS and EventBridge give a Lambda function: a handler cannot tell.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from local_cloud.functions.bucket import Bucket
from local_cloud.functions.errors import (
    PlatformClosed,
    PlatformError,
    TooManyRequests,
)
from local_cloud.functions.queue import MAX_BATCH, Message, Queue

REGION, ACCOUNT = "us-east-1", "123456789012"
MAX_EVENT_BYTES = 6_000_000  # of a batch: what one invocation may be given
MAX_BATCH_SIZE = 10_000
POLL_S = 0.2  # how soon a mapping or schedule notices that its block has ended

log = logging.getLogger(__name__)

__all__ = ["Bucket", "EventError", "Mapping", "Schedule", "Tally", "failures"]


class EventError(Exception):
    """A key, mapping or expression that cannot be used: expected, found, do."""


# ## Messages


class Outcome(Protocol):
    """What an invocation gives: its answer, and None or the kind of its error."""

    @property
    def payload(self) -> bytes: ...

    @property
    def error(self) -> str | None: ...


class Invoker(Protocol):
    """Where functions run: `Platform`, or anything with its `invoke`."""

    def invoke(self, name: str, payload: Any, /) -> Outcome: ...


@dataclass
class Tally:
    """What a mapping has done: invocations, messages done and failed."""

    invocations: int = 0
    done: int = 0
    failed: int = 0


Part = tuple[list[Message], list[dict[str, Any]]]  # messages and their records


class Mapping:
    """Reads a queue in batches and invokes a function with each, while its block runs.

    A message is deleted when the function has done it. Of a failed invocation (error,
    timeout, refusal) all messages stay, of one that answers with `batchItemFailures`
    those that it names. What stays comes again when its visibility timeout is over, and
    goes to the dead letters after `max_receives`. Leaving the block finishes the
    batches under way.

    Pitfall: a batch is done twice at once, because the function runs longer than the
    messages are hidden. Cure: the queue's visibility_s at 6 times the timeout or more.

    Args:
        queue: what is read.
        cloud: where the function runs.
        function: its name.
        batch_size: most messages a batch; over 10 needs a window.
        window_s: how long a batch may gather (0 to 300) before it is handed over.
        concurrency: most invocations at once.
    """

    def __init__(
        self,
        queue: Queue,
        cloud: Invoker,
        function: str,
        *,
        batch_size: int = MAX_BATCH,
        window_s: float = 0.0,
        concurrency: int = 2,
    ) -> None:
        largest = MAX_BATCH_SIZE if window_s else MAX_BATCH
        _check("batch_size", batch_size, 1, largest)
        _check("window_s", window_s, 0, 300)
        _check("concurrency", concurrency, 1, 1000)
        self.queue, self.cloud, self.function = queue, cloud, function
        self.batch_size, self.window_s = batch_size, window_s
        self.tally = Tally()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._problems: list[Exception] = []
        self._pollers = [
            threading.Thread(target=self._poll, name=f"{function}-poller-{number}")
            for number in range(concurrency)
        ]

    def __enter__(self) -> Mapping:
        for poller in self._pollers:
            poller.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        self._ending.set()
        for poller in self._pollers:
            poller.join()
        _tell(self._problems, error)

    def _poll(self) -> None:
        try:
            while not self._ending.is_set():
                for part in self._parts(self._gather()):
                    self._hand_over(*part)
        except Exception as problem:  # told when the block ends; the others go on
            self._problems.append(problem)

    def _gather(self) -> list[Message]:
        """A batch: full, or as large as the window let it grow."""
        batch = self.queue.receive(min(self.batch_size, MAX_BATCH), wait_s=POLL_S)
        end = time.monotonic() + self.window_s
        while batch and (left := end - time.monotonic()) > 0:
            room = min(self.batch_size - len(batch), MAX_BATCH)
            large = sum(len(message.body) for message in batch) > MAX_EVENT_BYTES
            if not room or large or self._ending.is_set():
                break
            batch += self.queue.receive(room, wait_s=min(left, POLL_S))
        return batch

    def _parts(self, batch: list[Message]) -> Iterator[Part]:
        """The batch with its records, divided where one event could not take it."""
        messages, records, size = [], [], 0
        for message in batch:
            record = _record(self.queue, message)
            length = len(json.dumps(record)) + 2  # and what stands between two
            if messages and size + length > MAX_EVENT_BYTES:
                yield messages, records
                messages, records, size = [], [], 0
            messages.append(message)
            records.append(record)
            size += length
        if messages:
            yield messages, records

    def _hand_over(self, batch: list[Message], records: list[dict[str, Any]]) -> None:
        ids = {message.id for message in batch}
        outcome = self._invoke({"Records": records})
        failed = ids if outcome is None else failures(outcome, ids)
        receipts = [m.receipt for m in batch if m.id not in failed]
        for start in range(0, len(receipts), MAX_BATCH):
            self.queue.delete_batch(receipts[start : start + MAX_BATCH])
        with self._lock:
            self.tally.invocations += 1
            self.tally.done += len(receipts)
            self.tally.failed += len(failed)

    def _invoke(self, event: dict[str, Any]) -> Outcome | None:
        """Invokes; throttled, tries again until the messages are about to return."""
        end, pause_s = time.monotonic() + self.queue.visibility_s, POLL_S / 4
        while True:
            try:
                return self.cloud.invoke(self.function, event)
            except TooManyRequests:
                if time.monotonic() + pause_s > end or self._ending.wait(pause_s):
                    return None
            except PlatformClosed:  # for good: nothing will ever be done here
                raise
            except PlatformError as refusal:
                log.warning("%s refused a batch: %s", self.function, refusal)
                return None
            pause_s *= 2


def failures(outcome: Outcome, ids: set[str]) -> set[str]:
    """Which messages of a batch failed, by Lambda's rules for batch responses.

    All, if the function failed, its answer is not JSON, or it names what is not in the
    batch. None, if it answers with nothing or without failures.
    """
    if outcome.error is not None:
        return ids
    try:
        answer = json.loads(outcome.payload or b"null")
        if not answer:
            return set()
        named = {item["itemIdentifier"] for item in answer["batchItemFailures"] or []}
    except KeyError as missing:
        # An answer about something else is a success; a failure without id is not.
        return set() if missing.args == ("batchItemFailures",) else ids
    except (ValueError, TypeError, RecursionError):
        return ids
    return named if named <= ids else ids


def _record(queue: Queue, message: Message) -> dict[str, Any]:
    """A message as SQS shows it to a function."""
    first = message.first_received_at
    return {
        "messageId": message.id,
        "receiptHandle": message.receipt,
        "body": message.body,
        "attributes": {
            "ApproximateReceiveCount": str(message.receive_count),
            "SentTimestamp": str(int(1000 * message.sent_at)),
            "SenderId": "LOCAL",
            "ApproximateFirstReceiveTimestamp": str(int(1000 * first)),
        },
        "messageAttributes": {
            name: {
                "stringValue": value,
                "stringListValues": [],
                "binaryListValues": [],
                "dataType": "String",
            }
            for name, value in message.attributes.items()
        },
        "md5OfBody": hashlib.md5(
            message.body.encode(), usedforsecurity=False
        ).hexdigest(),
        "eventSource": "aws:sqs",
        "eventSourceARN": f"arn:aws:sqs:{REGION}:{ACCOUNT}:{queue.path.stem}",
        "awsRegion": REGION,
    }


# ## The clock

_RATE = re.compile(r"rate\(\s*([1-9]\d*)\s+(minute|hour|day)(s?)\s*\)")


class Schedule:
    """Calls `target` with a scheduled event at planned times, while its block runs.

    `rate(5 minutes)` counts from the start; `cron(0 10 ? * MON-FRI *)` has the six
    fields of EventBridge and is in UTC. The clock may jump. Forward, over several
    planned times: one event, for the latest. Backward: no time fires twice; silence
    until the clock is past the last one fired.

    Args:
        expression: `rate(...)` or `cron(...)`.
        target: takes the event; `lambda event: cloud.send("function", event)`.
        name: the rule's, which the event carries.
        clock: gives epoch seconds.
    """

    def __init__(
        self,
        expression: str,
        target: Callable[[dict[str, Any]], object],
        *,
        name: str = "schedule",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.target, self.name, self._clock = target, name, clock
        start = self._now()
        self._plan = _plan(expression, start)
        self._last = start  # everything up to here is settled
        self._ending = threading.Event()
        self._problems: list[Exception] = []
        self._thread = threading.Thread(target=self._watch, name=f"{name}-schedule")

    def due(self) -> dict[str, Any] | None:
        """The event that is due now, once; None if there is none."""
        now = self._now()
        planned = self._plan(now)
        if planned is None or planned <= self._last:
            return None
        self._last = planned
        return {
            "version": "0",
            "id": str(uuid.uuid4()),
            "detail-type": "Scheduled Event",
            "source": "aws.events",
            "account": ACCOUNT,
            "time": f"{planned:%Y-%m-%dT%H:%M:%SZ}",
            "region": REGION,
            "resources": [f"arn:aws:events:{REGION}:{ACCOUNT}:rule/{self.name}"],
            "detail": {},
        }

    def __enter__(self) -> Schedule:
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        self._ending.set()
        self._thread.join()
        _tell(self._problems, error)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)

    def _watch(self) -> None:
        try:
            # Looks, rather than sleeping until the next time: the clock may jump.
            while not self._ending.wait(POLL_S):
                if event := self.due():
                    self.target(event)
        except Exception as problem:  # told when the block ends
            self._problems.append(problem)


Plan = Callable[[datetime], datetime | None]  # the latest planned time up to a moment


def _plan(expression: str, start: datetime) -> Plan:
    """The plan that an expression describes."""
    from aws_croniter import AwsCroniter

    if found := _RATE.fullmatch(expression):
        number, unit, plural = int(found[1]), found[2], bool(found[3])
        if plural == (number > 1):
            step = timedelta(**{f"{unit}s": number})
            return lambda now: start + (now - start) // step * step
    elif expression.startswith("cron(") and expression.endswith(")"):
        with suppress(ValueError):
            cron = AwsCroniter(" ".join(expression[5:-1].split()))
            return lambda now: cron.occurrence(now).prev(inclusive=True)
    raise EventError(
        "Expected 'rate(1 minute)', 'rate(5 minutes)' (or hours, days), or a cron with "
        "six fields, one of the days a ?, such as 'cron(0 10 ? * MON-FRI *)', "
        f"found {expression!r:.80}. Write one of these."
    )


def _tell(problems: list[Exception], error: BaseException | None) -> None:
    """Raises a thread's problem; if the block fails, often of it, adds it there."""
    for problem in problems:
        if error is None:
            raise problem
        error.add_note("".join(traceback.format_exception(problem)))


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise EventError(
            f"Expected {name} from {low} to {high:,}, found {value}. Choose within."
        )
