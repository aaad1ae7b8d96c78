"""Objects, batches and schedules: shapes, partial failures, kills, jumping clocks."""

from __future__ import annotations

import hashlib
import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import pytest

from course.process import wait_until
from local_cloud.functions.bucket import Bucket, BucketError
from local_cloud.functions.errors import (
    NotFound,
    PlatformClosed,
    PlatformError,
    RequestTooLarge,
    TooManyRequests,
)
from local_cloud.functions.events import EventError, Mapping, Schedule
from local_cloud.functions.queue import Queue
from tests.clock import Clock

ROOT = Path(__file__).parent.parent
DEADLINE_S = 60


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with (
        Queue(tmp_path / "dead") as dead,
        Queue(
            tmp_path / "queue", visibility_s=60, max_receives=2, dead_letters=dead
        ) as opened,
    ):
        yield opened


@pytest.fixture
def bucket(tmp_path: Path, queue: Queue) -> Iterator[Bucket]:
    with Bucket(tmp_path / "documents", queue) as opened:
        yield opened


def records(queue: Queue) -> list[dict[str, Any]]:
    """What the queue was told, all of it."""
    told = []
    while messages := queue.receive(10):
        told += [r for m in messages for r in json.loads(m.body)["Records"]]
    return told


# ## Objects


def test_an_object_put_is_told_as_s3_does(bucket: Bucket, queue: Queue):
    bucket.put("inbox/a b+\u00fc.txt", b"three short words")
    (record,) = records(queue)
    assert (record["eventSource"], record["eventName"]) == (
        "aws:s3",
        "ObjectCreated:Put",
    )
    datetime.strptime(record["eventTime"], "%Y-%m-%dT%H:%M:%S.%fZ")
    assert record["s3"]["bucket"]["name"] == "documents"
    thing = record["s3"]["object"]
    assert thing["key"] == "inbox/a+b%2B%C3%BC.txt"
    assert thing["size"] == 17
    assert thing["eTag"] == hashlib.md5(b"three short words").hexdigest()
    assert bucket.get(unquote_plus(thing["key"])) == b"three short words"
    assert bucket.keys() == ["inbox/a b+\u00fc.txt"]


def test_powertools_reads_the_events(bucket: Bucket, queue: Queue):
    data_classes = pytest.importorskip("aws_lambda_powertools.utilities.data_classes")
    bucket.put("inbox/a b.txt", b"x")
    seen: list[dict[str, Any]] = []
    run_batch(queue, lambda event: seen.append(event))
    (message,) = data_classes.SQSEvent(seen[0]).records
    (record,) = message.decoded_nested_s3_event.records
    assert record.s3.get_object.key == "inbox/a+b.txt"
    assert record.event_name == "ObjectCreated:Put"
    assert message.attributes.approximate_receive_count == "1"


def test_a_later_put_has_a_greater_sequencer(bucket: Bucket, queue: Queue):
    for n in range(20):
        bucket.put("same", b"%d" % n)
    told = [record["s3"]["object"]["sequencer"] for record in records(queue)]
    assert told == sorted(set(told))
    assert len({len(sequencer) for sequencer in told}) == 1
    assert bucket.get("same") == b"19"


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/./b", "a/", ".bucket/outbox",
     "a\\b", "a\0b", "x" * 256, "y/" * 600 + "y", "link/x"],
)  # fmt: skip
def test_no_key_leaves_the_folder(bucket: Bucket, queue: Queue, key: str):
    (bucket.folder / "link").symlink_to("/tmp")
    with pytest.raises(BucketError, match="Expected a key"):
        bucket.put(key, b"x")
    with pytest.raises(BucketError, match="Expected a key"):
        bucket.get(key)
    assert queue.counts().total == 0
    assert {path.name for path in bucket.folder.iterdir()} == {".bucket", "link"}
    assert not list((bucket.folder / ".bucket").glob("?" * 32))


def test_a_key_is_a_file_or_a_folder(bucket: Bucket):
    bucket.put("a/b", b"x")
    with pytest.raises(BucketError, match="names a file"):
        bucket.put("a", b"x")
    with pytest.raises(BucketError, match="names a file"):
        bucket.put("a/b/c", b"x")
    with pytest.raises(BucketError, match="found none under 'c'"):
        bucket.get("c")


def test_many_threads_put_at_once(bucket: Bucket, queue: Queue):
    def put(start: int) -> None:
        for n in range(start, start + 10):
            bucket.put(f"{n}", b"%d" % n)

    threads = [threading.Thread(target=put, args=(10 * n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    told = [record["s3"]["object"]["key"] for record in records(queue)]
    assert sorted(told, key=int) == [str(n) for n in range(60)]
    assert len(bucket.keys()) == 60


KILLED = """
import os, signal, sys
from local_cloud.functions import bucket as room
from local_cloud.functions.queue import Queue

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

write, send = room._write, Queue.send
with Queue(sys.argv[1] + "/queue") as queue:
    bucket = room.Bucket(sys.argv[1] + "/documents", queue)
    aside = bucket.folder / ".bucket"
    match sys.argv[2]:
        case "in the middle of writing":
            room._write = lambda path, data: (write(path, data[:3]), die())
        case "before the row":
            room._sync_folder = die
        case "after the row":
            bucket.publish = die
        case "after the name":
            sync = room._sync_folder
            room._sync_folder = lambda *f: sync(*f) if f == (aside,) else die()
        case "after the event":
            Queue.send = lambda self, body: (send(self, body), die())
    bucket.put("a.txt", b"a document")
"""


@pytest.mark.parametrize(
    ("moment", "events"),
    [
        ("in the middle of writing", 0),
        ("before the row", 0),
        ("after the row", 1),
        ("after the name", 1),
        ("after the event", 2),  # at least once
    ],
)
def test_a_put_killed_is_done_or_never_was(tmp_path: Path, moment: str, events: int):
    argv = [sys.executable, "-c", KILLED, str(tmp_path), moment]
    done = subprocess.run(argv, cwd=ROOT, timeout=DEADLINE_S, check=False)
    assert done.returncode == -signal.SIGKILL
    with (
        Queue(tmp_path / "queue") as queue,
        Bucket(tmp_path / "documents", queue) as bucket,
    ):
        told = records(queue)
        assert [record["s3"]["object"]["key"] for record in told] == ["a.txt"] * events
        assert len({record["s3"]["object"]["sequencer"] for record in told}) <= 1
        assert bucket.keys() == (["a.txt"] if events else [])
        if events:
            assert bucket.get("a.txt") == b"a document"


# ## Batches


@dataclass
class Answer:
    payload: bytes = b"null"
    error: str | None = None


class Local:
    """Functions in this process: the least that a mapping needs."""

    def __init__(self, function: Callable[[dict[str, Any]], Any]) -> None:
        self.function = function

    def invoke(self, name: str, payload: Any) -> Answer:
        assert name == "function"
        answer = self.function(payload)
        if isinstance(answer, Answer):
            return answer
        return Answer(json.dumps(answer).encode())


def run_batch(queue: Queue, function: Callable[..., Any], **options: Any) -> Mapping:
    """Runs a mapping until something was invoked."""
    with Mapping(queue, Local(function), "function", **options) as mapping:
        wait_until(lambda: mapping.tally.invocations, DEADLINE_S, "an invocation")
    return mapping


def failing(*ids: str | None) -> dict[str, Any]:
    return {"batchItemFailures": [{"itemIdentifier": each} for each in ids]}


def test_a_batch_has_the_shape_of_sqs(queue: Queue):
    seen: list[dict[str, Any]] = []
    sent = queue.send("hello", attributes={"lang": "en"})
    run_batch(queue, seen.append)
    (record,) = seen[0]["Records"]
    attributes, typed = record.pop("attributes"), record.pop("messageAttributes")
    assert record.pop("receiptHandle")
    assert record == {
        "messageId": sent,
        "body": "hello",
        "md5OfBody": hashlib.md5(b"hello").hexdigest(),
        "eventSource": "aws:sqs",
        "eventSourceARN": "arn:aws:sqs:us-east-1:123456789012:queue",
        "awsRegion": "us-east-1",
    }
    assert attributes["ApproximateReceiveCount"] == "1"
    assert abs(int(attributes["SentTimestamp"]) / 1000 - time.time()) < DEADLINE_S
    assert typed["lang"]["stringValue"] == "en"
    assert typed["lang"]["dataType"] == "String"


def test_what_was_done_is_deleted(queue: Queue):
    queue.send_batch([str(n) for n in range(10)])
    mapping = run_batch(queue, lambda event: None)
    assert (mapping.tally.done, mapping.tally.failed) == (10, 0)
    assert queue.counts().total == 0


def test_only_what_failed_comes_again_and_then_is_dead(tmp_path: Path):
    clock, seen = Clock(), []
    dead = Queue(tmp_path / "dead", clock=clock)
    options = {"max_receives": 2, "dead_letters": dead, "clock": clock}
    queue = Queue(tmp_path / "queue", visibility_s=60, **options)
    good = queue.send_batch(["good"] * 5)
    bad = queue.send("bad")

    def function(event: dict[str, Any]) -> dict[str, Any]:
        found = event["Records"]
        seen.extend(record["messageId"] for record in found)
        return failing(*[r["messageId"] for r in found if r["body"] == "bad"])

    with dead, queue, Mapping(queue, Local(function), "function") as mapping:
        for times in (1, 2):
            failed = lambda n=times: mapping.tally.failed == n  # noqa: E731
            wait_until(failed, DEADLINE_S, "a failure")
            clock.ahead_s += 60
        wait_until(lambda: dead.counts().ready, DEADLINE_S, "a dead letter")
        assert sorted(seen) == sorted([*good, bad, bad])
        assert [letter.id for letter in dead.receive(10)] == [bad]
        assert queue.counts().total == 0


@pytest.mark.parametrize(
    ("answer", "done"),
    [
        (None, 3),
        ({}, 3),
        ({"batchItemFailures": []}, 3),
        ({"batchItemFailures": None}, 3),
        ({"counted": 3}, 3),
        (Answer(b""), 3),
        (Answer(b"{not JSON"), 0),
        (Answer(b'{"errorMessage": "no"}', "Unhandled"), 0),
        (Answer(b'{"batchItemFailures": []}', "Unhandled"), 0),
        (failing(""), 0),
        (failing(None), 0),
        (failing("a stranger"), 0),
        ({"batchItemFailures": [{"id": "x"}]}, 0),
        ({"batchItemFailures": ["x"]}, 0),
        ({"batchItemFailures": [{"itemIdentifier": {}}]}, 0),
    ],
)
def test_answers_are_read_as_lambda_reads_them(queue: Queue, answer: Any, done: int):
    queue.send_batch(["a", "b", "c"])
    tally = run_batch(queue, lambda event: answer).tally
    assert (tally.done, tally.failed) == (done, 3 - done)
    assert queue.counts().in_flight == 3 - done


def test_a_window_gathers_one_batch(queue: Queue):
    sizes: list[int] = []

    def send() -> None:
        for n in range(15):
            queue.send(str(n))
            time.sleep(0.01)

    sender = threading.Thread(target=send)
    options = {"batch_size": 12, "window_s": 20, "concurrency": 1}
    function = lambda event: sizes.append(len(event["Records"]))  # noqa: E731
    with Mapping(queue, Local(function), "function", **options):
        sender.start()
        wait_until(lambda: sizes, DEADLINE_S, "a batch")
        sender.join()
    assert sizes[0] == 12
    assert sum(sizes) == 15 - queue.counts().total


def test_a_batch_fits_one_invocation(queue: Queue):
    sizes: list[int] = []
    for _ in range(10):
        queue.send("x" * 1_000_000)
    function = lambda event: sizes.append(len(json.dumps(event)))  # noqa: E731
    with Mapping(queue, Local(function), "function", concurrency=1) as mapping:
        wait_until(lambda: mapping.tally.done == 10, DEADLINE_S, "all done")
    assert max(sizes) < 6_000_000


def test_as_many_at_once_as_allowed(queue: Queue):
    queue.send_batch([str(n) for n in range(10)])
    together = threading.Barrier(3)  # opens when three are inside
    function = lambda event: together.wait(DEADLINE_S) and None  # noqa: E731
    options = {"concurrency": 3, "batch_size": 1}
    with Mapping(queue, Local(function), "function", **options) as mapping:
        wait_until(lambda: mapping.tally.done >= 3, DEADLINE_S, "three at once")
        queue.send_batch(["x", "y"])  # ten are not a multiple of three
        wait_until(lambda: mapping.tally.done == 12, DEADLINE_S, "all done")


def test_leaving_the_block_finishes_the_batch_under_way(queue: Queue):
    queue.send("work")
    begun, finish = threading.Event(), threading.Event()

    def function(event: dict[str, Any]) -> None:
        begun.set()
        assert finish.wait(DEADLINE_S)

    with Mapping(queue, Local(function), "function") as mapping:
        assert begun.wait(DEADLINE_S)
        threading.Timer(0.3, finish.set).start()
    assert mapping.tally.done == 1
    assert queue.counts().total == 0


def test_a_throttled_batch_is_tried_again(queue: Queue):
    queue.send("work")
    refusals = iter([TooManyRequests("no", "x"), TooManyRequests("no", "x")])

    def function(event: dict[str, Any]) -> None:
        if refusal := next(refusals, None):
            raise refusal

    mapping = run_batch(queue, function)
    assert (mapping.tally.done, mapping.tally.failed) == (1, 0)


@pytest.mark.parametrize("refusal", [NotFound("where?"), RequestTooLarge("large")])
def test_a_refused_batch_is_a_failed_one(queue: Queue, refusal: PlatformError):
    queue.send("refused")
    refusals = iter([refusal])

    def function(event: dict[str, Any]) -> None:
        if refusal := next(refusals, None):
            raise refusal

    with Mapping(queue, Local(function), "function", concurrency=1) as mapping:
        wait_until(lambda: mapping.tally.failed == 1, DEADLINE_S, "the refusal")
        queue.send("taken")
        wait_until(lambda: mapping.tally.done == 1, DEADLINE_S, "the next")
    assert queue.counts().in_flight == 1


@pytest.mark.parametrize("problem", [ZeroDivisionError(), PlatformClosed("over")])
def test_what_goes_wrong_in_a_mapping_is_told(queue: Queue, problem: Exception):
    queue.send("work")
    raised = threading.Event()

    def function(event: dict[str, Any]) -> None:
        raised.set()
        raise problem

    mapping = Mapping(queue, Local(function), "function", concurrency=1)
    with pytest.raises(type(problem)), mapping:
        assert raised.wait(DEADLINE_S)
    assert queue.counts().in_flight == 1


def wait_in_vain(raised: threading.Event) -> None:
    """As a block does that waits for what will not come any more."""
    assert raised.wait(DEADLINE_S)
    raise TimeoutError("Expected something to be done, found: not.")


def test_who_waits_in_vain_for_a_mapping_is_told_why(queue: Queue):
    queue.send("work")
    raised = threading.Event()

    def function(event: dict[str, Any]) -> None:
        raised.set()
        raise ZeroDivisionError

    mapping = Mapping(queue, Local(function), "function", concurrency=1)
    with pytest.raises(TimeoutError) as caught, mapping:
        wait_in_vain(raised)
    assert "ZeroDivisionError" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"batch_size": 11}, {"batch_size": 10_001, "window_s": 1},
     {"window_s": -1}, {"window_s": 301}, {"concurrency": 0}],
)  # fmt: skip
def test_impossible_mappings_are_refused(queue: Queue, options: dict[str, Any]):
    with pytest.raises(EventError, match="Choose within"):
        Mapping(queue, Local(lambda event: None), "function", **options)


# ## Schedules


class Watch:
    """A clock that stands where it is set."""

    def __init__(self, text: str) -> None:
        self.set(text)

    def set(self, text: str) -> None:
        self.now = datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()

    def __call__(self) -> float:
        return self.now


def fired(schedule: Schedule, watch: Watch, *times: str) -> list[str]:
    """The planned times of the events that are due as the clock shows these times."""
    told = []
    for text in times:
        watch.set(text)
        if event := schedule.due():
            told.append(event["time"])
    return told


def schedule(expression: str, watch: Watch) -> Schedule:
    return Schedule(expression, lambda event: None, name="nightly", clock=watch)


def test_a_scheduled_event_has_the_shape_of_eventbridge():
    watch = Watch("2026-11-24 09:00")
    planned = schedule("rate(1 minute)", watch)
    watch.set("2026-11-24 09:01:30")
    event = planned.due()
    assert event
    assert len(event.pop("id")) == 36
    assert event == {
        "version": "0",
        "detail-type": "Scheduled Event",
        "source": "aws.events",
        "account": "123456789012",
        "time": "2026-11-24T09:01:00Z",
        "region": "us-east-1",
        "resources": ["arn:aws:events:us-east-1:123456789012:rule/nightly"],
        "detail": {},
    }


def test_a_rate_counts_from_the_start():
    watch = Watch("2026-11-24 09:00:20")
    planned = schedule("rate(5 minutes)", watch)
    times = [f"2026-11-24 09:{minute:02}:20" for minute in range(16)]
    assert fired(planned, watch, *times, *times[-1:]) == [
        "2026-11-24T09:05:20Z",
        "2026-11-24T09:10:20Z",
        "2026-11-24T09:15:20Z",
    ]


@pytest.mark.parametrize(
    ("expression", "before", "planned"),
    [
        ("cron(0 10 * * ? *)", "2026-11-24 09:59", "2026-11-24T10:00:00Z"),
        ("cron(0/15 * * * ? *)", "2026-11-24 09:14", "2026-11-24T09:15:00Z"),
        ("cron(0 18 ? * MON-FRI *)", "2026-11-27 17:59", "2026-11-27T18:00:00Z"),
        ("cron( 0 8 1  * ? * )", "2026-11-30 23:59", "2026-12-01T08:00:00Z"),
        ("cron(0 0 29 2 ? *)", "2028-02-28 23:59", "2028-02-29T00:00:00Z"),
        ("cron(0 0 L * ? *)", "2026-11-29 23:59", "2026-11-30T00:00:00Z"),
        ("cron(0 0 3W * ? *)", "2026-10-01 23:59", "2026-10-02T00:00:00Z"),
        ("cron(0 0 ? * 3#2 *)", "2026-12-07 23:59", "2026-12-08T00:00:00Z"),
        ("cron(0 0 ? * 6L *)", "2026-11-26 23:59", "2026-11-27T00:00:00Z"),
    ],
)
def test_crons_as_eventbridge_reads_them(expression: str, before: str, planned: str):
    watch = Watch(before)
    rule = schedule(expression, watch)
    end = planned.removesuffix("Z")
    assert fired(rule, watch, before, end, end) == [planned]


def test_a_cron_of_the_past_never_fires():
    watch = Watch("2026-11-24 09:00")
    rule = schedule("cron(0 0 1 1 ? 2020)", watch)
    assert fired(rule, watch, "2026-11-24 10:00", "2036-11-24 10:00") == []


@pytest.mark.parametrize("expression", ["rate(1 minute)", "cron(* * * * ? *)"])
def test_a_clock_that_jumps(expression: str):
    watch = Watch("2026-11-24 09:00")
    told = fired(
        schedule(expression, watch),
        watch,
        "2026-11-24 09:01",
        "2026-11-24 12:30:10",  # forward: one event, not 209
        "2026-11-24 12:30:40",
        "2026-11-24 12:28",  # backward: what was fired stays fired
        "2026-11-24 12:29",
        "2026-11-24 12:30",
        "2026-11-24 12:31",
    )
    clock = [text[11:16] for text in told]
    assert clock == ["09:01", "12:30", "12:31"]


@pytest.mark.parametrize(
    "expression",
    ["", "rate(0 minutes)", "rate(1 minutes)", "rate(5 minute)", "rate(5 seconds)",
     "rate(-1 minutes)", "rate 5 minutes", "cron(0 10 * * *)", "cron(0 10 * * * *)",
     "cron(60 * * * ? *)", "cron(0 0 1 * 1 *)", "cron(0 0 ? * 3#1,6#3 *)", "at(now)",
     "* * * * *"],
)  # fmt: skip
def test_what_eventbridge_refuses_is_refused(expression: str):
    with pytest.raises(EventError, match="Write one of these"):
        Schedule(expression, lambda event: None)


def test_a_schedule_calls_its_target_while_its_block_runs():
    watch, told = Watch("2026-11-24 09:00"), []
    with Schedule("rate(1 hour)", told.append, clock=watch):
        watch.set("2026-11-24 10:00")
        wait_until(lambda: told, DEADLINE_S, "an event")
        watch.set("2026-11-24 11:00")
        wait_until(lambda: len(told) == 2, DEADLINE_S, "another")
    watch.set("2026-11-24 12:00")
    assert [event["time"][11:13] for event in told] == ["10", "11"]
    assert not [t for t in threading.enumerate() if t.name.endswith("-schedule")]


def test_what_goes_wrong_in_a_target_is_told():
    watch, called = Watch("2026-11-24 09:00"), threading.Event()

    def target(event: dict[str, Any]) -> None:
        called.set()
        raise ZeroDivisionError

    failing = Schedule("rate(1 hour)", target, clock=watch)
    watch.set("2026-11-24 10:00")
    with pytest.raises(ZeroDivisionError), failing:
        assert called.wait(DEADLINE_S)

    again = Schedule("rate(1 hour)", target, clock=watch)
    watch.set("2026-11-24 11:00")
    called.clear()
    with pytest.raises(TimeoutError) as caught, again:
        wait_in_vain(called)
    assert "ZeroDivisionError" in "".join(caught.value.__notes__)


# ## The whole way


def test_powertools_remembers_in_a_file(tmp_path: Path):
    pytest.importorskip("boto3", reason="pip install -r requirements.txt")
    idempotency = pytest.importorskip("aws_lambda_powertools.utilities.idempotency")
    from local_cloud.functions.idempotency import SQLitePersistenceLayer

    class Context:
        left_ms = 60_000

        def get_remaining_time_in_millis(self) -> int:
            return self.left_ms

    store, calls = SQLitePersistenceLayer(tmp_path / "done"), []
    config, context = idempotency.IdempotencyConfig(), Context()
    config.register_lambda_context(context)

    @idempotency.idempotent_function(
        data_keyword_argument="work", persistence_store=store, config=config
    )
    def do(*, work: str) -> str:
        calls.append(work)
        if work == "fails" and len(calls) == 2:
            raise ZeroDivisionError
        if work == "dies":
            raise KeyboardInterrupt  # as good as dead: no record of an end
        return work.upper()

    assert [do(work="a"), do(work="a")] == ["A", "A"]
    with pytest.raises(ZeroDivisionError):
        do(work="fails")
    assert do(work="fails") == "FAILS"  # what failed is done again
    with pytest.raises(KeyboardInterrupt):
        do(work="dies")
    begun = idempotency.exceptions.IdempotencyAlreadyInProgressError
    with pytest.raises(begun):
        do(work="dies")
    store.file.close()
    assert calls == ["a", "fails", "fails", "dies"]


def test_work_whose_deadline_is_over_is_begun_again(tmp_path: Path):
    pytest.importorskip("boto3", reason="pip install -r requirements.txt")
    idempotency = pytest.importorskip("aws_lambda_powertools.utilities.idempotency")
    from local_cloud.functions.idempotency import SQLitePersistenceLayer

    now, store = time.time(), SQLitePersistenceLayer(tmp_path / "done")

    def begin(deadline: float) -> None:
        record = idempotency.base.DataRecord(
            "key",
            "INPROGRESS",
            expiry_timestamp=int(now + 3600),
            in_progress_expiry_timestamp=int(1000 * deadline),
        )
        store._put_record(record)

    begin(now - 1)
    begin(now + 60)
    with pytest.raises(idempotency.exceptions.IdempotencyItemAlreadyExistsError):
        begin(now + 60)
    store.file.close()


def test_every_document_is_counted_exactly_once(tmp_path: Path):
    """Object, queue, batch, partial failure, dead letters; two workers are killed."""
    for needed in ("awslambdaric", "aws_lambda_powertools", "boto3"):
        pytest.importorskip(needed, reason="pip install -r requirements.txt")
    from local_cloud.functions import Function, Platform

    counts = tmp_path / "counts"
    db = sqlite3.connect(counts)
    db.execute("CREATE TABLE counted (key, sequencer, PRIMARY KEY (key, sequencer))")
    db.execute("CREATE TABLE total (documents INTEGER, words INTEGER)")
    with db:
        db.execute("INSERT INTO total VALUES (0, 0)")
    function = Function(
        "wordcount",
        "tests.wordcount.handler",
        memory_mb=1769,
        timeout_s=3.0,
        environment={"BUCKET": str(tmp_path / "documents"), "COUNTS": str(counts)},
    )
    # Far apart: in two batches of the first round.
    documents = {"late.txt": "after a kill"}
    documents |= {f"{n}.txt": "word " * n for n in range(1, 31)}
    documents |= {"early.txt": "before a kill"}
    clock, receives = Clock(), 10
    options = {"visibility_s": 3.5, "max_receives": receives, "clock": clock}
    with (
        Queue(tmp_path / "dead", clock=clock) as dead,
        Queue(tmp_path / "queue", dead_letters=dead, **options) as queue,
        Bucket(tmp_path / "documents", queue) as bucket,
        Platform() as cloud,
    ):
        cloud.deploy(function)
        for key, text in documents.items():
            bucket.put(key, text.encode())
        bucket.put("bad.txt", b"poison")
        with Mapping(queue, cloud, "wordcount") as mapping:
            alone = lambda: queue.counts().total == 1  # noqa: E731
            wait_until(alone, DEADLINE_S, "all but the poison to be done")

            def buried() -> bool:
                clock.ahead_s += 3.5  # what is left needs no time
                return not queue.counts().total

            wait_until(buried, DEADLINE_S, "an empty queue", every_s=0.2)
        letters = [json.loads(letter.body) for letter in dead.receive(10)]
    told = [letter["Records"][0]["s3"]["object"]["key"] for letter in letters]
    assert told == ["bad.txt"]
    total = db.execute("SELECT * FROM total").fetchone()
    db.close()
    words = sum(len(text.split()) for text in documents.values())
    assert total == (len(documents), words)
    assert (tmp_path / "counts-before").exists()
    assert (tmp_path / "counts-after").exists()
    # The poison each time, and what was in a killed batch.
    assert mapping.tally.failed > receives
