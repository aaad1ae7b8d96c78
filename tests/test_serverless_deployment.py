"""Lesson 3's pipeline: once for each document, whoever dies; the same code on AWS."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import serverless_deployment as lesson
from course.lesson import Run

pytest.importorskip(
    "awslambdaric", reason="Linux only: pip install awslambdaric==4.2.2"
)

from local_cloud.functions import Platform, trials
from local_cloud.functions.bucket import Bucket
from local_cloud.functions.queue import Queue
from local_cloud.functions.storage import Storage

TIDES = trials.DOCUMENTS["tides.txt"]


def context(remaining_ms: float = 60_000) -> Any:
    return SimpleNamespace(
        get_remaining_time_in_millis=lambda: remaining_ms,
        aws_request_id="1",
        function_name="summarise",
        invoked_function_arn="arn:aws:lambda:us-east-1:000000000000:function:summarise",
    )


def message(number: int, key: str, bucket: str = "documents") -> dict[str, Any]:
    """A message of one object put, as SQS hands it to a function."""
    thing = {"key": key, "sequencer": f"{number:018X}"}
    record = {"s3": {"bucket": {"name": bucket}, "object": thing}}
    return {
        "messageId": str(number),
        "receiptHandle": str(number),
        "body": json.dumps({"Records": [record]}),
        "attributes": {},
        "messageAttributes": {},
        "md5OfBody": "",
        "eventSource": "aws:sqs",
        "eventSourceARN": "arn:aws:sqs:us-east-1:000000000000:uploads",
        "awsRegion": "us-east-1",
    }


def failed(answer: dict[str, Any]) -> list[str]:
    return [item["itemIdentifier"] for item in answer["batchItemFailures"]]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one bucket, which the function is told of."""
    (tmp_path / "documents").mkdir()
    monkeypatch.setenv("DATA", str(tmp_path))
    return tmp_path


def test_a_batch_names_only_the_message_that_failed(data: Path):
    (data / "documents/tides & more.txt").write_text(TIDES)
    (data / "documents/blank.txt").write_text(" ")
    batch = [message(1, "tides+%26+more.txt"), message(2, "blank.txt")]
    assert failed(lesson.summarise({"Records": batch}, context())) == ["2"]
    ((key, text),) = Storage(data).summaries()
    assert key == "tides & more.txt"
    assert text.strip()


def test_a_message_that_comes_twice_is_summarised_once(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    (data / "documents/tides.txt").write_text(TIDES)
    calls: list[Any] = []
    answer = lesson.handler
    monkeypatch.setattr(
        lesson, "handler", lambda *given: calls.append(given) or answer(*given)
    )
    for _ in range(2):
        batch = {"Records": [message(1, "tides.txt")]}
        assert failed(lesson.summarise(batch, context())) == []
    assert len(calls) == 1
    assert len(Storage(data).summaries()) == 1
    # A new version of the document is new work.
    assert (
        failed(lesson.summarise({"Records": [message(2, "tides.txt")]}, context()))
        == []
    )
    assert len(calls) == 2


def test_half_a_summary_is_none(data: Path):
    (data / "documents/tides.txt").write_text(TIDES)
    batch = {"Records": [message(1, "tides.txt")]}
    assert failed(lesson.summarise(batch, context(remaining_ms=10))) == ["1"]
    assert Storage(data).summaries() == []
    assert failed(lesson.summarise(batch, context())) == []  # it comes again


def test_workers_die_and_each_document_is_summarised_once(tmp_path: Path):
    run = Run(quick=True)
    with Platform() as cloud:
        lesson.pipeline(run, cloud, tmp_path)
    (table,) = [event for event in run.events if event["kind"] == "table"]
    counts = {row[0]: row[1] for row in table["rows"]}
    documents = len(trials.DOCUMENTS) - 1  # without the blank one
    assert counts["documents with a summary"] == documents
    assert counts["summaries written twice"] == 0
    assert counts["dead letters (the blank document)"] == 1
    assert counts["workers killed by kill -9 while at work"] == 2
    with Queue(tmp_path / "dead") as dead:
        (letter,) = dead.receive()
        assert "blank.txt" in letter.body


def test_the_same_code_on_s3_and_dynamodb(monkeypatch: pytest.MonkeyPatch):
    """boto3 for real, against moto's S3 and DynamoDB."""
    moto = pytest.importorskip("moto", reason="pip install moto==5.2.5")
    boto3 = pytest.importorskip("boto3")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "IDEMPOTENCY_TABLE": "done",
    }.items():
        monkeypatch.setenv(name, value)
    with moto.mock_aws():
        boto3.client("dynamodb").create_table(
            TableName="done",
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )
        s3 = boto3.client("s3")
        s3.create_bucket(Bucket="texts")
        s3.put_object(Bucket="texts", Key="uploads/tides.txt", Body=TIDES.encode())
        batch = [message(1, "uploads/tides.txt", "texts")]
        batch.append(message(2, "uploads/gone.txt", "texts"))
        for _ in range(2):
            assert failed(lesson.summarise({"Records": batch}, context())) == ["2"]
        found = s3.get_object(Bucket="texts", Key="summaries/tides.txt")
        assert found["Body"].read().strip()
        assert boto3.client("dynamodb").scan(TableName="done")["Count"] == 1


def test_a_put_reaches_the_handler_as_the_bucket_tells_it(data: Path):
    queue = Queue(data / "queue")
    Bucket(data / "documents", queue).put("a b/tides.txt", TIDES.encode())
    (told,) = queue.receive()
    record = {**message(1, ""), "body": told.body}
    assert failed(lesson.summarise({"Records": [record]}, context())) == []
    assert [key for key, _ in Storage(data).summaries()] == ["a b/tides.txt"]
