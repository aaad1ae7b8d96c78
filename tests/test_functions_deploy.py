"""What one would really deploy: the zip, the images, Google and Azure, as they run.

The AWS template has a file of its own: test_functions_template.py.
"""

from __future__ import annotations

import http.client
import importlib.util
import itertools
import json
import queue
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from azure.functions.http import HttpRequestConverter, HttpResponseConverter
from azure.functions.meta import Datum
from azure.functions.queue import QueueMessageInConverter

import serverless_deployment
from course import process
from deploy.functions import instance, package
from deploy.functions.instance import Context
from local_cloud.containers import dockerfile, engine, packages
from local_cloud.containers.engine import Engine
from local_cloud.functions import trials
from local_cloud.functions.runtime_api import Call, Endpoint, RuntimeApi

ROOT = Path(__file__).parent.parent
FUNCTIONS = ROOT / "deploy/functions"
QUESTION = {"prompt": "Explain gravity in one sentence.", "max_tokens": 12}
DEADLINE_S = 60.0


def about_gravity(result: Any) -> bool:
    """Whether the real model has answered the question."""
    return "gravity is" in json.dumps(result).lower()


# -- the zip


@pytest.mark.parametrize("folder", ["", "google"])
def test_the_locks_are_whole_and_agree_with_the_servers(folder: str):
    lock = FUNCTIONS / folder / "requirements.lock"
    _, locked, hashes, without = packages.lock_row(lock)
    assert locked >= 10
    assert hashes >= locked
    assert without == 0
    assert "://" not in lock.read_text()
    server = pins(ROOT / "requirements-serve.lock")
    shared = {name: v for name, v in pins(lock).items() if name in server}
    assert {"numpy", "onnxruntime", "tokenizers"} <= set(shared)
    assert shared == {name: server[name] for name in shared}


def pins(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", lock.read_text()))


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, package.Weight]:
    """The zip's folder, for the Python that runs here."""
    folder = tmp_path_factory.mktemp("zip") / "function"
    try:
        return folder, package.package(folder, package.HERE)
    except package.PackageError as problem:
        pytest.skip(str(problem))


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's wheels")


def test_the_zip_fits_what_lambda_unzips_because_it_is_pruned(
    packed: tuple[Path, package.Weight],
):
    folder, weight = packed
    assert weight.fits
    assert weight.unpruned + weight.model + weight.code > package.BUDGET_BYTES
    assert not list(folder.glob("awslambdaric*"))  # the runtime has its own


ALONE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import serverless_deployment
from deploy.functions.instance import Context
event = json.loads(sys.argv[2])
print(json.dumps(serverless_deployment.handler(event, Context("1", 30.0))))
"""


@linux_only
def test_the_handler_runs_from_the_zip_alone(packed: tuple[Path, package.Weight]):
    folder, _ = packed
    # Isolated and without site-packages: what is not in the folder is not there.
    told = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ALONE, str(folder), json.dumps(QUESTION)],
        env={"MODEL_DIR": str(folder / "model"), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert told.returncode == 0, told.stderr
    assert about_gravity(json.loads(told.stdout.splitlines()[-1]))


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(package.PackageError, match="to be empty, found files"):
        package.package(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_context_knows_the_time_left():
    assert 29_000 < Context("1", 30.0).get_remaining_time_in_millis() <= 30_000
    over = Context("1", 30.0, began=time.monotonic() - 31)
    assert over.get_remaining_time_in_millis() == 0


def test_the_handler_stops_at_the_deadline_and_the_engine_with_it(
    loaded: dict, monkeypatch: pytest.MonkeyPatch
):
    long = {"prompt": "Tell a long story about a dragon.", "max_tokens": 500}
    left_ms = itertools.chain([30_000] * 20, itertools.repeat(0))
    look = lambda _: next(left_ms)  # noqa: E731
    monkeypatch.setattr(Context, "get_remaining_time_in_millis", look)
    told = instance.answer(long, "1", timeout_s=30)
    assert told["finish_reason"] == "deadline"
    assert 0 < told["tokens"] < 500
    snapshot = loaded["model"]._model.engine.snapshot
    idle = lambda: not snapshot().active  # noqa: E731
    process.wait_until(idle, DEADLINE_S, "the engine to be idle")


# -- the images


@pytest.mark.parametrize("target", ["lambda", "google"])
def test_the_dockerfile_passes_all_checks_but_the_one_nobody_asks(target: str):
    name = "deploy/functions/Dockerfile"
    ignore = "\n".join(engine.ignored(ROOT, name))
    found = dockerfile.audit(dockerfile.read(ROOT / name), target, ignore)
    # Lambda and Cloud Run ignore HEALTHCHECK: the one watches its protocol, the other
    # has the probe of service.yaml.
    assert [f.check for f in found if not f.good] == ["has a HEALTHCHECK"]


def built(docker: Engine, target: str) -> str:
    """An image of ours, on the model of the API's own; its name."""
    docker.build("model-api:distroless", target="distroless")
    tag, file = f"model-function:{target}", "deploy/functions/Dockerfile"
    docker.build(tag, dockerfile=file, target=target)
    return tag


@pytest.fixture
def runtime_api() -> Iterator[Endpoint]:
    api = RuntimeApi()
    endpoint = api.open()
    yield endpoint
    api.shut(endpoint)
    api.close()


@pytest.mark.docker
def test_the_image_answers_through_the_runtime_api(
    docker: Engine, runtime_api: Endpoint
):
    # As Lambda runs it: nobody's user, nothing to write but /tmp.
    limits = {"read_only": True, "cap_drop": ["ALL"], "mem_limit": "1769m"}
    variables = {"AWS_LAMBDA_RUNTIME_API": runtime_api.address}
    with docker.container(
        built(docker, "lambda"),
        network_mode="host",
        environment=variables,
        tmpfs={"/tmp": "size=512m"},
        **limits,
    ) as box:
        for request in ("first", "second"):
            call = heard(runtime_api, box)
            assert call.kind == "next", call.body
            assert call.connection
            deadline = str(round(1000 * (time.time() + 30)))
            runtime_api.mailbox.request_id = request
            headers = {
                "Lambda-Runtime-Aws-Request-Id": request,
                "Lambda-Runtime-Deadline-Ms": deadline,
                "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:::function:x",
            }
            call.connection.answer(200, json.dumps(QUESTION).encode(), headers)
            call = heard(runtime_api, box)
            assert call.kind == "response", call.body
            assert about_gravity(json.loads(call.body))


def heard(runtime_api: Endpoint, box: engine.Container) -> Call:
    try:
        return runtime_api.mailbox.calls.get(timeout=DEADLINE_S)
    except queue.Empty:
        raise AssertionError(f"It never called; it wrote:\n{box.logs()}") from None


# -- Google


@pytest.fixture(scope="session")
def google() -> Iterator[int]:
    """The port of functions-framework, serving the handler as Cloud Run would."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in service_variables().items():
            patch.setenv(name, value)
        with trials.google() as (port, _):
            yield port


def service() -> dict[str, Any]:
    return yaml.safe_load((FUNCTIONS / "google/service.yaml").read_text())


def service_variables() -> dict[str, str]:
    (container,) = service()["spec"]["template"]["spec"]["containers"]
    return {pair["name"]: pair["value"] for pair in container["env"]}


def post(port: int, headers: dict[str, str], body: bytes) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request("POST", "/", body, headers)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, response.read()
    finally:
        connection.close()


BINARY = {
    "ce-specversion": "1.0",
    "ce-type": "course.question.v1",
    "ce-source": "/tests",
    "ce-id": "17",
    "content-type": "application/json",
}


def test_a_cloudevent_in_binary_mode_is_answered_by_one(google: int):
    status, headers, body = post(google, BINARY, json.dumps(QUESTION).encode())
    assert status == 200, body
    assert headers["ce-type"] == "course.answer.v1"
    assert headers["ce-subject"] == "17"
    assert about_gravity(json.loads(body))


def test_a_cloudevent_in_structured_mode_is_answered_alike(google: int):
    event = {name.removeprefix("ce-"): v for name, v in BINARY.items() if "ce-" in name}
    body = json.dumps(
        {**event, "datacontenttype": "application/json", "data": QUESTION}
    )
    kind = {"content-type": "application/cloudevents+json"}
    status, headers, structured = post(google, kind, body.encode())
    assert status == 200, structured
    assert headers["ce-type"] == "course.answer.v1"
    again = post(google, BINARY, json.dumps(QUESTION).encode())[2]
    assert json.loads(structured)["text"] == json.loads(again)["text"]


@pytest.mark.parametrize(
    ("headers", "body", "says"),
    [
        ({}, b"{}", "Expected a CloudEvent of type"),
        ({**BINARY, "ce-type": "other"}, b"{}", "found: other with dict"),
        (BINARY, b'"text"', "found: course.question.v1 with str"),
        (BINARY, b"{", "found: course.question.v1 with bytes"),
        (BINARY, b"{}", "expected one of"),
    ],
)
def test_what_is_no_question_is_refused(google: int, headers: dict, body: bytes, says):
    status, _, told = post(google, headers, body)
    assert status == 400
    assert says in told.decode()


def test_one_instance_answers_many_at_once(google: int):
    """Where Lambda would have started eight sandboxes."""
    body = json.dumps(QUESTION).encode()
    with ThreadPoolExecutor(8) as callers:
        told = list(callers.map(lambda _: post(google, BINARY, body), range(8)))
    assert [status for status, _, _ in told] == [200] * 8
    assert all(about_gravity(json.loads(answer)) for _, _, answer in told)


def test_the_cloud_run_service_is_of_one_mind():
    template = service()["spec"]["template"]
    notes, spec = template["metadata"]["annotations"], template["spec"]
    at_once = str(spec["containerConcurrency"])
    variables = service_variables()
    # As many let in as arrive, as many rows as let in: else callers queue unseen.
    assert variables["THREADS"] == variables["ROWS"] == at_once
    # The handler must know the deadline at which the caller is given up.
    assert variables["CLOUD_RUN_TIMEOUT_SECONDS"] == str(spec["timeoutSeconds"])
    assert notes["run.googleapis.com/startup-cpu-boost"] == "true"
    least, most = (notes[f"autoscaling.knative.dev/{x}Scale"] for x in ("min", "max"))
    assert 0 <= int(least) <= int(most)
    assert all(isinstance(value, str) for value in notes.values())  # or it is refused
    (container,) = spec["containers"]
    assert set(container["resources"]["limits"]) == {"cpu", "memory"}
    (port,) = container["ports"]
    assert container["startupProbe"]["tcpSocket"]["port"] == port["containerPort"]


@pytest.mark.docker
def test_the_google_image_answers_as_the_service_would_run_it(docker: Engine):
    image, variables = built(docker, "google"), service_variables()
    more: dict[str, Any] = {"environment": variables, "mem_limit": "1g"}
    with docker.container(image, port=8080, **more) as box:
        port = int(box.url.rpartition(":")[2])

        def answers() -> bool:
            try:
                return post(port, BINARY, json.dumps(QUESTION).encode())[0] == 200
            except OSError:  # not listening yet
                return False

        process.wait_until(answers, DEADLINE_S, "an answer of the container")
        assert box.state["OOMKilled"] is False


# -- Azure


@pytest.fixture(scope="module")
def loaded() -> Iterator[dict[str, Any]]:
    """What the handler keeps; emptied before, and given back after these tests."""
    kept = serverless_deployment.LOADED
    before = dict(kept)
    kept.clear()
    yield kept
    if "model" in kept:
        kept["model"].close()
    kept.clear()
    kept.update(before)


@pytest.fixture(scope="module")
def function_app(loaded: dict[str, Any]) -> ModuleType:
    """function_app.py, loaded as the worker loads it: by path."""
    path = FUNCTIONS / "azure/function_app.py"
    spec = importlib.util.spec_from_file_location("function_app", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def azure(function_app: ModuleType) -> dict[str, Any]:
    """The functions by name, as the worker finds them in the app."""
    return {f.get_function_name(): f for f in function_app.app.get_functions()}


def over_http(body: bytes) -> Any:
    """A request as the worker decodes it from the host's message."""
    fields = {"method": "POST", "url": "https://x.test/api/answer"}
    value: dict[str, Any] = {k: Datum(v, "string") for k, v in fields.items()}
    value |= {"headers": {}, "query": {}, "params": {}, "body": Datum(body, "bytes")}
    return HttpRequestConverter.decode(Datum(value, "http"), trigger_metadata={})


def test_azure_answers_over_http(azure: dict[str, Any]):
    function = azure["answer"].get_user_function()
    request = over_http(json.dumps(QUESTION).encode())
    response = function(request, SimpleNamespace(invocation_id="17"))
    # And back, as the worker hands it to the host.
    told = HttpResponseConverter.encode(response, expected_type=None).value
    assert told["status_code"].value == "200"
    assert told["headers"]["content-type"].value == "application/json"
    assert about_gravity(json.loads(told["body"].value))


def test_azure_refuses_what_is_not_json(azure: dict[str, Any]):
    function = azure["answer"].get_user_function()
    response = function(over_http(b"{"), SimpleNamespace(invocation_id="17"))
    assert response.status_code == 400
    assert response.get_body().startswith(b"Expected a JSON object, found")


class Out:
    """What the worker gives for an output binding."""

    def set(self, value: str) -> None:
        self.value = value


def test_azure_passes_on_what_the_handler_refuses(azure: dict[str, Any]):
    function = azure["answer"].get_user_function()
    response = function(over_http(b"{}"), SimpleNamespace(invocation_id="17"))
    assert response.status_code == 400
    assert "expected one of" in json.loads(response.get_body())["error"]


def test_azure_answers_a_message_of_a_queue(azure: dict[str, Any]):
    function = azure["answer_queued"].get_user_function()
    metadata = {"Id": Datum("17", "string"), "DequeueCount": Datum("1", "string")}
    body = Datum(json.dumps(QUESTION), "string")
    message = QueueMessageInConverter.decode(body, trigger_metadata=metadata)
    function(message, out := Out())
    told = json.loads(out.value)
    assert told["question"] == "17"
    assert about_gravity(told["answer"])


def test_the_bindings_of_azure_are_what_the_host_would_read(azure: dict[str, Any]):
    bound = azure["answer"].get_dict_repr()["bindings"]
    assert {b["type"] for b in bound} == {"httpTrigger", "http"}
    (trigger,) = [b for b in bound if b["type"] == "httpTrigger"]
    assert trigger["authLevel"].name == "FUNCTION"  # not open to everyone
    bound = azure["answer_queued"].get_dict_repr()["bindings"]
    assert {b["type"]: b["queueName"] for b in bound} == {
        "queueTrigger": "questions",
        "queue": "answers",
    }
    settings = json.loads((FUNCTIONS / "azure/local.settings.example.json").read_text())
    assert {b["connection"] for b in bound} <= set(settings["Values"])


def test_the_settings_of_azure_are_of_one_mind(function_app: ModuleType):
    host = json.loads((FUNCTIONS / "azure/host.json").read_text())
    settings = json.loads((FUNCTIONS / "azure/local.settings.example.json").read_text())
    hours, minutes, seconds = map(int, host["functionTimeout"].split(":"))
    assert 3600 * hours + 60 * minutes + seconds == function_app.TIMEOUT_S
    queues, web = host["extensions"]["queues"], host["extensions"]["http"]
    at_once = str(web["maxConcurrentRequests"])
    assert settings["Values"]["ROWS"] == at_once
    assert settings["Values"]["PYTHON_THREADPOOL_THREAD_COUNT"] == at_once
    # The host fetches the next batch while as many are still worked on.
    assert queues["batchSize"] + queues["newBatchThreshold"] <= int(at_once)
    assert settings["IsEncrypted"] is False
