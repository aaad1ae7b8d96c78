"""The Invoke API, asked by the SDK that everyone uses."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from course import process
from local_cloud.functions import Function, Platform, Report, invoke_url, trials
from local_cloud.functions.sandbox import ARN

pytest.importorskip("boto3", reason="pip install -r requirements.txt")
from botocore.exceptions import ClientError

DEADLINE_S = 60
HANDLERS = """
import os, time

def echo(event, context):
    print("y" * 5000)
    print("heard", event)
    return event

def raises(event, context):
    raise ValueError("on purpose")

def who(event, context):
    return context.client_context.custom

def waits(event, context):
    while not os.path.exists(event):
        time.sleep(0.01)

def writes(event, context):
    open(event, "w").close()
"""


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A platform with functions, and boto3's client for it."""
    code = tmp_path_factory.mktemp("code")
    (code / "handlers.py").write_text(HANDLERS)
    with Platform() as cloud, invoke_url.serve(cloud) as url:
        for name in ("echo", "raises", "who", "writes"):
            cloud.deploy(Function(name, f"handlers.{name}", Path(code)))
        settings = {"reserved": 1, "timeout_s": DEADLINE_S}
        cloud.deploy(Function("narrow", "handlers.waits", Path(code), **settings))
        with closing(trials.lambda_client(url)) as client:
            yield SimpleNamespace(client=client, cloud=cloud)


def refused(aws: SimpleNamespace, **request: Any) -> ClientError:
    with pytest.raises(ClientError) as caught:
        aws.client.invoke(**request)
    return caught.value


def test_synchronous_call_with_its_log(aws):
    told = aws.client.invoke(
        FunctionName="echo", Payload=b'{"a": "\xc3\x9c"}', LogType="Tail"
    )
    assert told["StatusCode"] == 200
    assert told["ExecutedVersion"] == "$LATEST"
    assert "FunctionError" not in told
    assert json.loads(told["Payload"].read()) == {"a": "Ü"}
    log = base64.b64decode(told["LogResult"])
    assert len(log) == 4096
    report = Report.parse(log.decode().splitlines()[-1])
    assert report.request_id == told["ResponseMetadata"]["RequestId"]


@pytest.mark.parametrize(
    "name",
    ["echo", "echo:$LATEST", f"{ARN}echo:$LATEST", "000000000000:function:echo"],
)
def test_all_forms_of_a_name(aws, name):
    assert aws.client.invoke(FunctionName=name)["Payload"].read() == b"{}"


def test_function_error_is_an_answer_with_a_header(aws):
    told = aws.client.invoke(FunctionName="raises")
    assert (told["StatusCode"], told["FunctionError"]) == (200, "Unhandled")
    error = json.loads(told["Payload"].read())
    assert error["errorType"] == "ValueError"
    assert error["errorMessage"] == "on purpose"


def test_client_context_reaches_the_handler(aws):
    context = base64.b64encode(b'{"custom": {"a": 1}}').decode()
    told = aws.client.invoke(FunctionName="who", ClientContext=context)
    assert json.loads(told["Payload"].read()) == {"a": 1}
    error = refused(aws, FunctionName="who", ClientContext="no base64!")
    assert error.response["Error"]["Code"] == "InvalidRequestContentException"


def test_event_is_accepted_and_done(aws, tmp_path):
    mark = tmp_path / "mark"
    told = aws.client.invoke(
        FunctionName="writes",
        InvocationType="Event",
        Payload=json.dumps(str(mark)).encode(),
    )
    assert told["StatusCode"] == 202
    assert told["Payload"].read() == b""
    process.wait_until(mark.exists, DEADLINE_S, "the event to be done")


def test_dry_run_runs_nothing(aws):
    told = aws.client.invoke(FunctionName="narrow", InvocationType="DryRun")
    assert (told["StatusCode"], told["Payload"].read()) == (204, b"")
    assert aws.cloud.sandboxes("narrow") == []


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        ({"FunctionName": "nowhere"}, 404, "ResourceNotFoundException"),
        ({"FunctionName": "echo", "Qualifier": "7"}, 404, "ResourceNotFoundException"),
        ({"FunctionName": "echo:live"}, 404, "ResourceNotFoundException"),
        (
            {"FunctionName": "echo", "Payload": b"{"},
            400,
            "InvalidRequestContentException",
        ),
        (
            {"FunctionName": "echo", "Payload": b"[" * 100_000},
            400,
            "InvalidRequestContentException",
        ),
        (
            {"FunctionName": "echo", "Payload": b'"%s"' % (b"x" * 7_000_000)},
            413,
            "RequestTooLargeException",
        ),
        (
            {
                "FunctionName": "echo",
                "Payload": b'"%s"' % (b"x" * 2**20),
                "InvocationType": "Event",
            },
            413,
            "RequestTooLargeException",
        ),
        (
            {"FunctionName": "echo", "InvocationType": "Perhaps"},
            400,
            "InvalidParameterValueException",
        ),
    ],
)
def test_refusals_become_boto3s_exceptions(aws, request_, status, code):
    error = refused(aws, **request_)
    assert type(error).__name__ in (code, "ClientError")
    assert isinstance(error, getattr(aws.client.exceptions, code))
    assert error.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert error.response["Error"]["Message"]


@pytest.mark.parametrize("length", ["many", "-1", "9" * 5000])
def test_length_that_is_none_is_refused(aws, length):
    host = urlsplit(aws.client.meta.endpoint_url).netloc
    with closing(http.client.HTTPConnection(host, timeout=DEADLINE_S)) as api:
        api.putrequest("POST", "/2015-03-31/functions/echo/invocations")
        api.putheader("Content-Length", length)
        api.endheaders()
        answer = api.getresponse()
        told = json.loads(answer.read())
    assert answer.status == 400
    assert "Expected Content-Length to be a number of bytes" in told["Message"]


def test_what_the_platform_did_not_expect_is_answered_and_logged(
    aws, monkeypatch, caplog
):
    def fail(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(aws.cloud, "invoke", fail)
    error = refused(aws, FunctionName="echo")
    assert isinstance(error, aws.client.exceptions.ServiceException)
    assert "can't start new thread" in caplog.text


def test_throttling_becomes_too_many_requests(aws, tmp_path):
    file = tmp_path / "go"
    with ThreadPoolExecutor(1) as caller:
        under_way = caller.submit(
            aws.client.invoke,
            FunctionName="narrow",
            Payload=json.dumps(str(file)).encode(),
        )

        def at_work() -> bool:
            return any(box.invocations for box in aws.cloud.sandboxes("narrow"))

        process.wait_until(at_work, DEADLINE_S, "the first call")
        error = refused(aws, FunctionName="narrow", Payload=b"0")
        file.touch()
        assert under_way.result()["Payload"].read() == b"null"
    assert isinstance(error, aws.client.exceptions.TooManyRequestsException)
    assert error.response["Reason"].startswith("ReservedFunctionConcurrent")
