"""One contract for our queue and moto's SQS, called through boto3.

Both go by the same clock, which a test sets ahead: what they do when is compared, and
no test waits for a timeout. Where moto differs from SQS, test_queue.py has the test:
moto deletes with an older receipt, counts characters for bytes, and takes any text
and a negative delay.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from local_cloud.functions.queue import MAX_BYTES, Counts, Message, Queue, QueueError
from tests.clock import Clock

DEAD = "arn:aws:sqs:us-east-1:123456789012:dead"


@pytest.fixture
def clock() -> Clock:
    return Clock()


# ## Both under one set of names


class Refused(Exception):
    """Either queue says no."""


class Side(Protocol):
    """What both can do, in the terms of ours."""

    dead: Any

    def send(self, body: str, **options: Any) -> str: ...
    def send_batch(self, bodies: Sequence[str]) -> list[str]: ...
    def receive(self, most: int = 1, **options: Any) -> list[Message]: ...
    def delete(self, receipt: str) -> None: ...
    def delete_batch(self, receipts: Sequence[str]) -> None: ...
    def change_visibility(self, receipt: str, seconds: int) -> None: ...
    def counts(self) -> Counts: ...
    def purge(self) -> None: ...


class Ours:
    """Our queue, its error under the common name."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.dead = Ours(queue.dead_letters) if queue.dead_letters else None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            try:
                return getattr(self.queue, name)(*values, **options)
            except QueueError as error:
                raise Refused(str(error)) from error

        return call


class Moto:
    """moto's SQS through boto3."""

    def __init__(self, client: Any, url: str, dead: Moto | None = None) -> None:
        self.client, self.url, self.dead = client, url, dead

    def call(self, operation: str, **options: Any) -> dict[str, Any]:
        from botocore.exceptions import ClientError, ParamValidationError

        try:
            return getattr(self.client, operation)(QueueUrl=self.url, **options)
        except (ClientError, ParamValidationError) as error:
            raise Refused(str(error)) from error

    def send(
        self, body: str, delay_s: int = 0, attributes: Mapping[str, str] | None = None
    ) -> str:
        typed = {
            name: {"DataType": "String", "StringValue": value}
            for name, value in (attributes or {}).items()
        }
        options = {"DelaySeconds": delay_s, "MessageAttributes": typed}
        return self.call("send_message", MessageBody=body, **options)["MessageId"]

    def send_batch(self, bodies: Sequence[str]) -> list[str]:
        entries = [{"Id": str(n), "MessageBody": body} for n, body in enumerate(bodies)]
        answer = self.call("send_message_batch", Entries=entries)
        return [sent["MessageId"] for sent in answer["Successful"]]

    def receive(
        self, most: int = 1, visibility_s: int | None = None, wait_s: int = 0
    ) -> list[Message]:
        hidden = {} if visibility_s is None else {"VisibilityTimeout": visibility_s}
        answer = self.call(
            "receive_message",
            MaxNumberOfMessages=most,
            WaitTimeSeconds=wait_s,
            MessageSystemAttributeNames=["All"],
            MessageAttributeNames=["All"],
            **hidden,
        )
        return [self._message(found) for found in answer.get("Messages", [])]

    @staticmethod
    def _message(found: dict[str, Any]) -> Message:
        system = found["Attributes"]
        typed = found.get("MessageAttributes", {})
        return Message(
            id=found["MessageId"],
            receipt=found["ReceiptHandle"],
            body=found["Body"],
            receive_count=int(system["ApproximateReceiveCount"]),
            sent_at=int(system["SentTimestamp"]) / 1000,
            first_received_at=int(system["ApproximateFirstReceiveTimestamp"]) / 1000,
            attributes={name: value["StringValue"] for name, value in typed.items()},
        )

    def delete(self, receipt: str) -> None:
        self.call("delete_message", ReceiptHandle=receipt)

    def delete_batch(self, receipts: Sequence[str]) -> None:
        pairs = enumerate(receipts)
        entries = [{"Id": str(n), "ReceiptHandle": receipt} for n, receipt in pairs]
        if self.call("delete_message_batch", Entries=entries).get("Failed"):
            raise Refused("one of the batch")

    def change_visibility(self, receipt: str, seconds: int) -> None:
        hidden = {"ReceiptHandle": receipt, "VisibilityTimeout": seconds}
        self.call("change_message_visibility", **hidden)

    def counts(self) -> Counts:
        names = ["", "NotVisible", "Delayed"]
        asked = [f"ApproximateNumberOfMessages{name}" for name in names]
        found = self.call("get_queue_attributes", AttributeNames=asked)["Attributes"]
        return Counts(*(int(found[name]) for name in asked))

    def purge(self) -> None:
        self.call("purge_queue")


@pytest.fixture
def make_ours(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Side]]:
    opened: list[Queue] = []

    def make(**options: Any) -> Ours:
        with_dead = "max_receives" in options
        dead = Queue(tmp_path / "dead", clock=clock) if with_dead else None
        queue = Queue(tmp_path / "queue", dead_letters=dead, clock=clock, **options)
        opened.extend(q for q in (queue, dead) if q)
        return Ours(queue)

    yield make
    for queue in opened:
        queue.close()


@pytest.fixture(scope="module")
def sqs() -> Iterator[Any]:
    """A real client of boto3, answered by moto in this process."""
    boto3 = pytest.importorskip("boto3", reason="pip install -r requirements.txt")
    moto = pytest.importorskip("moto", reason="pip install -r requirements.txt")
    with moto.mock_aws():
        keys = {"aws_access_key_id": "none", "aws_secret_access_key": "none"}
        client = boto3.client("sqs", region_name="us-east-1", **keys)
        yield client
        client.close()


@pytest.fixture
def make_moto(
    sqs: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Side]]:
    monkeypatch.setattr("moto.sqs.models.unix_time", clock)
    monkeypatch.setattr("moto.sqs.models.unix_time_millis", clock.millis)

    def make(
        visibility_s: int = 30, max_receives: int = 0, retention_s: int = 345_600
    ) -> Moto:
        settings = {
            "VisibilityTimeout": str(visibility_s),
            "MessageRetentionPeriod": str(retention_s),
        }
        dead = None
        if max_receives:
            dead = Moto(sqs, sqs.create_queue(QueueName="dead")["QueueUrl"])
            policy = {"deadLetterTargetArn": DEAD, "maxReceiveCount": max_receives}
            settings["RedrivePolicy"] = json.dumps(policy)
        made = sqs.create_queue(QueueName="queue", Attributes=settings)
        return Moto(sqs, made["QueueUrl"], dead)

    yield make
    for url in sqs.list_queues().get("QueueUrls", []):
        sqs.delete_queue(QueueUrl=url)


@pytest.fixture(params=["ours", "moto"])
def make(request: pytest.FixtureRequest) -> Callable[..., Side]:
    """Makes a queue, with dead letters where `max_receives` is given."""
    return request.getfixturevalue(f"make_{request.param}")


# ## The contract


def test_a_message_comes_as_it_was_sent(make: Callable[..., Side], clock: Clock):
    queue, before = make(), clock()
    text = 'a line\nanother\t\u00fcber \u6f22\u5b57 \U0001f680 "quoted" <&>'
    sent = queue.send(text, attributes={"lang": "de", "kind": "greeting"})
    (message,) = queue.receive()
    assert (message.id, message.body, message.receive_count) == (sent, text, 1)
    assert message.attributes == {"lang": "de", "kind": "greeting"}
    assert before - 0.01 <= message.sent_at <= message.first_received_at <= clock()


def test_an_empty_queue_gives_nothing(make: Callable[..., Side]):
    assert make().receive(10) == []


def test_a_received_message_is_hidden_until_its_timeout(
    make: Callable[..., Side], clock: Clock
):
    queue = make(visibility_s=30)
    queue.send("work")
    (first,) = queue.receive()
    assert queue.receive() == []
    clock.ahead_s += 29
    assert queue.receive() == []
    clock.ahead_s += 1.5
    (second,) = queue.receive()
    assert (second.id, second.receive_count) == (first.id, 2)
    assert second.receipt != first.receipt
    assert second.first_received_at == pytest.approx(first.first_received_at, abs=0.01)


def test_a_receive_may_choose_its_own_timeout(make: Callable[..., Side], clock: Clock):
    queue = make(visibility_s=30)
    queue.send("work")
    queue.receive(visibility_s=5)
    clock.ahead_s += 6
    assert queue.receive()


def test_a_deleted_message_does_not_come_back(make: Callable[..., Side], clock: Clock):
    queue = make()
    queue.send("work")
    (message,) = queue.receive()
    queue.delete(message.receipt)
    clock.ahead_s += 60
    assert queue.receive() == []
    assert queue.counts() == Counts(0, 0, 0)


def test_deleting_twice_is_no_error(make: Callable[..., Side]):
    queue = make()
    queue.send("work")
    (message,) = queue.receive()
    queue.delete(message.receipt)
    queue.delete(message.receipt)


def test_a_message_whose_timeout_is_over_can_still_be_deleted(
    make: Callable[..., Side], clock: Clock
):
    queue = make()
    queue.send("work")
    (message,) = queue.receive()
    clock.ahead_s += 60
    queue.delete(message.receipt)
    assert queue.receive() == []


def test_an_older_receipt_is_no_error(make: Callable[..., Side], clock: Clock):
    # SQS: "the request succeeds, but the message might not be deleted".
    queue = make()
    queue.send("work")
    (first,) = queue.receive()
    clock.ahead_s += 60
    queue.receive()
    queue.delete(first.receipt)


@pytest.mark.parametrize("receipt", ["nonsense", "1.2", "\u00e9"])
def test_what_is_no_receipt_is_refused(make: Callable[..., Side], receipt: str):
    queue = make()
    queue.send("work")
    with pytest.raises(Refused):
        queue.delete(receipt)
    with pytest.raises(Refused):
        queue.delete_batch([receipt])
    with pytest.raises(Refused):
        queue.change_visibility(receipt, 5)


def test_more_time_can_be_taken(make: Callable[..., Side], clock: Clock):
    queue = make(visibility_s=10)
    queue.send("long work")
    (message,) = queue.receive()
    clock.ahead_s += 8
    queue.change_visibility(message.receipt, 30)
    clock.ahead_s += 25
    assert queue.receive() == []
    clock.ahead_s += 6
    assert queue.receive()


def test_a_message_can_be_given_back(make: Callable[..., Side], clock: Clock):
    queue = make()
    queue.send("work")
    (message,) = queue.receive()
    queue.change_visibility(message.receipt, 0)
    clock.ahead_s += 0.1
    assert [again.id for again in queue.receive()] == [message.id]


def test_no_time_can_be_taken_for_a_deleted_message(make: Callable[..., Side]):
    queue = make()
    queue.send("work")
    (message,) = queue.receive()
    queue.delete(message.receipt)
    with pytest.raises(Refused):
        queue.change_visibility(message.receipt, 5)


def test_a_delayed_message_comes_later(make: Callable[..., Side], clock: Clock):
    queue = make()
    queue.send("later", delay_s=10)
    assert queue.receive() == []
    assert queue.counts() == Counts(ready=0, in_flight=0, delayed=1)
    clock.ahead_s += 11
    assert [message.body for message in queue.receive()] == ["later"]


def test_a_message_received_too_often_is_a_dead_letter(
    make: Callable[..., Side], clock: Clock
):
    queue = make(max_receives=3)
    sent = queue.send("poison", attributes={"kind": "bad"})
    for count in (1, 2, 3):
        (message,) = queue.receive()
        assert message.receive_count == count
        assert queue.dead.counts().total == 0
        clock.ahead_s += 60
    assert queue.receive() == []
    assert queue.counts().total == 0
    (letter,) = queue.dead.receive()
    assert (letter.id, letter.body) == (sent, "poison")
    assert letter.attributes == {"kind": "bad"}
    assert letter.sent_at == pytest.approx(message.sent_at, abs=0.01)


def test_a_dead_letter_does_not_hold_up_the_others(
    make: Callable[..., Side], clock: Clock
):
    queue = make(max_receives=1)
    queue.send("poison")
    queue.receive()
    clock.ahead_s += 60
    queue.send("good")
    assert [message.body for message in queue.receive(10)] == ["good"]
    assert [letter.body for letter in queue.dead.receive(10)] == ["poison"]


def test_batches_of_ten(make: Callable[..., Side]):
    queue = make()
    bodies = [f"message {n}" for n in range(10)]
    ids = queue.send_batch(bodies)
    assert len(set(ids)) == 10
    messages = queue.receive(10)
    assert sorted(message.body for message in messages) == bodies
    assert {message.id for message in messages} == set(ids)
    queue.delete_batch([message.receipt for message in messages])
    assert queue.counts() == Counts(0, 0, 0)


def test_a_receive_gives_no_more_than_asked(make: Callable[..., Side]):
    queue = make()
    queue.send_batch([str(n) for n in range(5)])
    assert len(queue.receive(3)) == 3
    assert len(queue.receive(3)) == 2
    assert queue.counts() == Counts(ready=0, in_flight=5, delayed=0)


@pytest.mark.parametrize("count", [0, 11])
def test_batches_of_none_and_eleven_are_refused(make: Callable[..., Side], count: int):
    queue = make()
    with pytest.raises(Refused):
        queue.send_batch(["x"] * count)
    with pytest.raises(Refused):
        queue.receive(count)
    with pytest.raises(Refused):
        queue.delete_batch(["x"] * count)
    assert queue.counts().total == 0


def test_a_message_of_a_mebibyte_is_taken_and_one_byte_more_refused(
    make: Callable[..., Side],
):
    queue = make()
    queue.send("x" * MAX_BYTES)
    with pytest.raises(Refused):
        queue.send("x" * (MAX_BYTES + 1))
    assert [len(message.body) for message in queue.receive(10)] == [MAX_BYTES]


def test_a_batch_of_more_than_a_mebibyte_is_refused_whole(make: Callable[..., Side]):
    queue = make()
    with pytest.raises(Refused):
        queue.send_batch(["x" * (MAX_BYTES // 2)] * 3)
    assert queue.counts().total == 0


@pytest.mark.parametrize(
    ("call", "options"),
    [
        ("send", {"delay_s": 901}),
        ("receive", {"wait_s": 21}),
        ("receive", {"visibility_s": 43_201}),
    ],
)
def test_numbers_out_of_range_are_refused(
    make: Callable[..., Side], call: str, options: dict[str, int]
):
    queue, value = make(), "x" if call == "send" else 1
    with pytest.raises(Refused):
        getattr(queue, call)(value, **options)


def test_a_message_over_its_age_is_gone(make: Callable[..., Side], clock: Clock):
    queue = make(retention_s=60)
    queue.send("old")
    clock.ahead_s += 61
    assert queue.receive() == []


def test_purging_deletes_all(make: Callable[..., Side], clock: Clock):
    queue = make()
    queue.send_batch(["a", "b"])
    queue.receive()
    queue.send("c", delay_s=5)
    queue.purge()
    assert queue.counts() == Counts(0, 0, 0)
    clock.ahead_s += 60
    assert queue.receive(10) == []


def test_a_long_poll_gets_what_comes_meanwhile(make: Callable[..., Side]):
    queue = make()
    sender = threading.Timer(0.2, queue.send, ["at last"])
    sender.start()
    assert [message.body for message in queue.receive(wait_s=20)] == ["at last"]
    sender.join()


def test_a_long_poll_gets_what_becomes_visible(make: Callable[..., Side]):
    queue = make()
    queue.send("again")
    queue.receive(visibility_s=1)
    assert [message.receive_count for message in queue.receive(wait_s=20)] == [2]


def test_a_long_poll_ends_empty(make: Callable[..., Side]):
    assert make().receive(wait_s=1) == []
