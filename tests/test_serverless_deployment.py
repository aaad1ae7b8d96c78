"""Lesson 3's pipeline: once for each document, whoever dies; the same code on AWS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import serverless_deployment as lesson
from course.lesson import Run
from deploy.functions import checks
from models import build, lean
from models.errors import BuildError

pytest.importorskip(
    "awslambdaric", reason="Linux only: pip install awslambdaric==4.2.2"
)

from local_cloud.functions import Platform, trials
from local_cloud.functions.bucket import Bucket
from local_cloud.functions.queue import Queue
from local_cloud.functions.storage import Storage

ROOT = Path(__file__).parent.parent
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
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with one bucket, which the function is told of."""
    (tmp_path / "documents").mkdir()
    monkeypatch.setenv("DATA", str(tmp_path))
    yield tmp_path
    lesson.storage().close()
    lesson.open_storage.cache_clear()


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
    # Each had begun a document, and left it so.
    assert counts["workers killed by kill -9 within a document"] == 2
    assert counts["messages that failed and came again"] >= 2 + lesson.MAX_RECEIVES
    with Queue(tmp_path / "dead") as dead:
        (letter,) = dead.receive()
        assert "blank.txt" in letter.body


def test_the_pipeline_obeys_the_rules_of_its_template():
    # What a dead worker had begun is free when its messages come again.
    assert lesson.TIMEOUT_S < lesson.VISIBILITY_S
    assert lesson.MAX_RECEIVES >= checks.LEAST_RECEIVES


def test_the_storage_is_opened_once_and_must_be_named(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    assert lesson.storage() is lesson.storage()
    with monkeypatch.context() as patch:
        patch.delenv("DATA")
        with pytest.raises(LookupError, match=r"IDEMPOTENCY_TABLE .* or DATA .*; set"):
            lesson.storage()


def test_a_snapshot_of_the_pipeline_has_its_libraries_and_storage(tmp_path: Path):
    """A clone that imported them would do so in its caller's time."""
    code = (
        "import sys, serverless_deployment as lesson\n"
        "lesson.initialise()\n"
        "lesson.before_snapshot()\n"
        "print({'aws_lambda_powertools.utilities.batch',"
        " 'aws_lambda_powertools.utilities.idempotency',"
        " 'local_cloud.functions.storage'} - set(sys.modules),"
        " lesson.open_storage.cache_info().currsize)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["set()", "1"]


def test_only_the_third_of_three_calls_is_thawed(monkeypatch: pytest.MonkeyPatch):
    with Platform() as cloud:
        cloud.deploy(trials.EMPTY)
        calls_before: list[int] = []
        wait = trials.freeze

        def freeze(cloud: Platform, name: str) -> None:
            (box,) = cloud.sandboxes(name)
            calls_before.append(box.invocations)
            wait(cloud, name)

        monkeypatch.setattr(trials, "freeze", freeze)
        told = trials.three_calls(cloud, trials.EMPTY.name, {})
    assert calls_before == [2]
    assert [one.cold for one in told.values()] == [True, False, False]


def test_boto3_gets_the_answer_from_this_platform():
    with Platform() as cloud:
        cloud.deploy(trials.EMPTY)
        assert trials.by_boto3(cloud, trials.EMPTY.name, {}) is None


def test_a_folder_that_cannot_be_written_is_read_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """As on Lambda, where the model lies in a read-only zip."""
    there = build.ensure("int4")
    for path in (there.graph, there.graph.with_suffix(".json"), there.tokenizer):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    read: list[str] = []
    digest = build.digest

    def refuse(folder: Path) -> None:
        raise BuildError(f"{folder}: read-only")

    monkeypatch.setattr(build, "digest", lambda p: read.append(p.name) or digest(p))
    monkeypatch.setattr(build, "workshop", refuse)
    assert lean.load().revision == there.revision
    assert read.count(there.graph.name) == 1


def test_the_same_code_on_s3_and_dynamodb(monkeypatch: pytest.MonkeyPatch):
    """boto3 for real, against moto's S3 and DynamoDB."""
    moto = pytest.importorskip("moto", reason="pip install moto[sqs]==5.2.5")
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
    lesson.open_storage.cache_clear()


def test_a_put_reaches_the_handler_as_the_bucket_tells_it(data: Path):
    queue = Queue(data / "queue")
    Bucket(data / "documents", queue).put("a b/tides.txt", TIDES.encode())
    (told,) = queue.receive()
    record = {**message(1, ""), "body": told.body}
    assert failed(lesson.summarise({"Records": [record]}, context())) == []
    assert [key for key, _ in Storage(data).summaries()] == ["a b/tides.txt"]
