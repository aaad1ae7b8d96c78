"""The functions platform: the real runtime client in real, limited processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from course import process
from local_cloud.functions import (
    Function,
    FunctionError,
    InvalidRequestContent,
    NotFound,
    Platform,
    PlatformClosed,
    Report,
    RequestTooLarge,
    Result,
    TooManyRequests,
    asynchronous,
    cgroup,
    pool,
    sandbox,
)

ROOT = Path(__file__).parent.parent
NOBODY = 65534
DEADLINE_S = 60
LINUX = sys.platform.startswith("linux")
pytestmark = pytest.mark.skipif(
    not LINUX, reason="the client's transport has wheels for Linux only; use Linux"
)

HANDLERS = """
import http.client, os, sys, threading, time

def echo(event, context):
    return event

def tell(event, context):
    print("heard", event)
    client = context.client_context
    return {
        "pid": os.getpid(),
        "id": context.aws_request_id,
        "arn": context.invoked_function_arn,
        "left_ms": context.get_remaining_time_in_millis(),
        "custom": client.custom if client else None,
        "env": dict(os.environ),
        "cwd": os.getcwd(),
    }

def raises(event, context):
    raise KeyError("no such thing")

def unmarshalled(event, context):
    return {1, 2}

def leaves(event, context):
    os._exit(event)

def dies(event, context):
    os.kill(os.getpid(), event)

def long_answer(event, context):
    return "x" * event

def sleeps(event, context):
    time.sleep(event)
    return os.getpid()

def waits(event, context):
    while not os.path.exists(event):
        time.sleep(0.01)
    return os.getpid()

def takes(event, context):
    held = bytearray(event * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    return len(held)

def burns(event, context):
    begin, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - begin < event:
        pass
    return time.process_time() - cpu

def ticks(event, context):
    global count
    if event == "start":
        count = 0
        def tick():
            global count
            while True:
                count += 1
                time.sleep(0.001)
        threading.Thread(target=tick, daemon=True).start()
    return count

def escapes(event, context):
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)
        os._exit(0)
    return os.getpid()

def misuses(event, context):
    api = http.client.HTTPConnection(os.environ["AWS_LAMBDA_RUNTIME_API"])
    told = []
    for path in event:
        api.request("POST", path, b"{}")
        answer = api.getresponse()
        answer.read()
        told.append(answer.status)
    return told

def writes(event, context):
    with open(event, "a") as file:
        file.write("tried\\n")
    raise RuntimeError("again")
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "handlers.py").write_text(HANDLERS)
    (folder / "broken.py").write_text("import not_there\n")
    (folder / "wrong.py").write_text("def handler(:\n")
    (folder / "leaving.py").write_text("raise SystemExit(7)\n")
    slow = "import os, time\nwhile os.path.exists(os.environ['MARK']) != {}:\n"
    slow += "    time.sleep(0.01)\ndef handler(event, context): return 1\n"
    (folder / "slow.py").write_text(slow.format(True))  # until the mark is there
    (folder / "stuck.py").write_text(slow.format(False))  # as long as it is there
    return folder


@pytest.fixture(params=["kernel", "watched"])
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to enforce limits; without root only the second is there."""
    if request.param == "watched":
        monkeypatch.setattr(cgroup, "_bases_v1", list)
        monkeypatch.setattr(cgroup, "_bases_v2", list)
    else:
        trial = cgroup.Parent("functions-trial")
        trial.close()
        if not trial.folders:
            pytest.skip("no control groups may be made here; run as root")
    return request.param


@pytest.fixture
def cloud() -> Iterator[Platform]:
    """A platform; fails the test after which anything of it is left."""
    with Platform() as platform:
        yield platform
    assert_gone(platform)


def assert_gone(platform: Platform) -> None:
    left = [str(folder) for folder in platform.host.groups.folders if folder.exists()]
    assert not left
    assert not platform.host.root.exists()


@pytest.fixture
def deploy(cloud: Platform, code: Path) -> Callable[..., str]:
    """Deploys a handler of `HANDLERS`; gives the function's name."""

    def deployed(handler: str, **settings: object) -> str:
        name = handler.replace(".", "-")
        where = handler if "." in handler else f"handlers.{handler}"
        cloud.deploy(Function(name, where, code, **settings))  # pyright: ignore
        return name

    return deployed


def running(pid: int) -> bool:
    """Whether a process lives (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def at_work(cloud: Platform, name: str, count: int = 1) -> None:
    """Waits until so many of a function's sandboxes have an invocation."""

    def begun() -> bool:
        return sum(box.invocations for box in cloud.sandboxes(name)) >= count

    process.wait_until(begun, DEADLINE_S, f"{name} to be at work")


def error_of(result: Result) -> dict:
    assert result.error == "Unhandled"
    return json.loads(result.payload)


# -- invocation


def test_first_call_is_cold_second_is_warm_in_the_same_process(cloud, deploy):
    name = deploy("tell")
    first, second = cloud.invoke(name, {"a": 1}), cloud.invoke(name, {"a": 2})
    assert (first.cold, second.cold) == (True, False)
    assert json.loads(first.payload)["pid"] == json.loads(second.payload)["pid"]
    assert first.report.init_ms
    assert second.report.init_ms is None
    assert first.report.billed_ms >= first.report.init_ms + first.report.duration_ms
    assert second.report.billed_ms - 1 < second.report.duration_ms


def test_handler_sees_what_lambda_shows(cloud, deploy, code, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_PLATFORM", "no function's business")
    name = deploy("tell", environment={"MODE": "tiny"}, memory_mb=256, timeout_s=30)
    context = {"custom": {"who": "Ünï"}}
    result = cloud.invoke(name, {}, client_context=context)
    told = json.loads(result.payload)
    assert told["id"] == result.request_id
    assert told["arn"].endswith(":function:tell")
    assert 20_000 < told["left_ms"] <= 30_000
    assert told["custom"] == {"who": "Ünï"}
    assert told["cwd"] == str(code) == told["env"]["LAMBDA_TASK_ROOT"]
    assert told["env"]["MODE"] == "tiny"
    assert told["env"]["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"] == "256"
    assert Path(told["env"]["TMPDIR"]).is_relative_to(cloud.host.root)
    assert "SECRET_OF_THE_PLATFORM" not in told["env"]


def test_log_of_each_invocation_stands_alone(cloud, deploy):
    name = deploy("tell")
    cloud.invoke(name, "one")
    result = cloud.invoke(name, "two")
    start, heard, end, report = result.log.splitlines()
    assert start == f"START RequestId: {result.request_id} Version: $LATEST"
    assert heard == "heard two"
    assert end == f"END RequestId: {result.request_id}"
    assert Report.parse(report).request_id == result.request_id


def test_largest_request_and_result_pass(cloud, deploy):
    text = "x" * (6 * 2**20 - 2)
    assert json.loads(cloud.invoke(deploy("echo"), text).payload) == text


NESTED: list = []
for _ in range(100_000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("payload", "refusal"),
    [
        ("x" * 6 * 2**20, RequestTooLarge),
        (b"{", InvalidRequestContent),
        (b"[" * 100_000, InvalidRequestContent),
        (NESTED, InvalidRequestContent),
        ({1}, InvalidRequestContent),
    ],
)
def test_what_is_refused_never_reaches_the_function(cloud, deploy, payload, refusal):
    name = deploy("echo")
    with pytest.raises(refusal):
        cloud.invoke(name, payload)
    with pytest.raises(refusal):
        cloud.send(name, payload)
    assert cloud.sandboxes(name) == []


def test_event_may_have_one_megabyte(cloud, deploy):
    name = deploy("echo")
    cloud.send(name, "x" * (2**20 - 2))
    with pytest.raises(RequestTooLarge, match="Event"):
        cloud.send(name, "x" * (2**20 - 1))


def test_unknown_function(cloud):
    with pytest.raises(NotFound, match="function:nowhere"):
        cloud.invoke("nowhere", {})


def test_runtime_api_refuses_what_no_runtime_should_say(cloud, deploy):
    paths = ["/", "/2018-06-01/runtime/nothing", "/2018-06-01/runtime/invocation/x/y"]
    paths += ["/2018-06-01/runtime/invocation/another-id/response"]
    told = cloud.invoke(deploy("misuses"), paths)
    assert json.loads(told.payload) == [404, 404, 404, 400]


# -- what goes wrong in a function


@pytest.mark.parametrize(
    ("handler", "event", "kind", "words"),
    [
        ("raises", {}, "KeyError", "'no such thing'"),
        ("unmarshalled", {}, "Runtime.MarshalError", "not JSON serializable"),
        ("broken.handler", {}, "Runtime.ImportModuleError", "not_there"),
        ("wrong.handler", {}, "Runtime.UserCodeSyntaxError", "Syntax error"),
        ("handlers.none", {}, "Runtime.HandlerNotFound", "'none' missing"),
        ("leaving.handler", {}, "Runtime.ExitError", "exit status 7"),
        ("leaves", 3, "Runtime.ExitError", "Runtime exited with error: exit status 3"),
        ("leaves", 0, "Runtime.ExitError", "Runtime exited without providing a reason"),
        ("dies", 9, "Runtime.ExitError", "Runtime exited with error: signal: killed"),
        ("long_answer", 7 * 2**20, "Function.ResponseSizeTooLarge", "6291556"),
    ],
)
def test_failures_have_lambdas_shape(cloud, deploy, handler, event, kind, words):
    name = deploy(handler)
    for _ in range(2):  # and the next caller is served again, with the same
        result = cloud.invoke(name, event)
        error = error_of(result)
        assert error["errorType"] == kind
        assert words in error["errorMessage"]
        assert result.log.endswith(f"{result.report}\t\n")


def test_exception_leaves_the_sandbox_warm_and_comes_with_its_trace(cloud, deploy):
    name = deploy("raises")
    cloud.invoke(name, {})
    result = cloud.invoke(name, {})
    assert not result.cold
    assert result.report.status == "success"
    assert "in raises" in error_of(result)["stackTrace"][0]
    assert "[ERROR] KeyError: 'no such thing'" in result.log


def test_handler_that_hangs_is_killed_at_the_deadline(cloud, deploy):
    name = deploy("sleeps", timeout_s=1.5)
    pid = int(cloud.invoke(name, 0).payload)
    result = cloud.invoke(name, 60)
    error = error_of(result)
    assert error["errorType"] == "Sandbox.Timedout"
    assert error["errorMessage"] == (
        f"RequestId: {result.request_id} Error: Task timed out after 1.50 seconds"
    )
    assert "Task timed out after 1.50 seconds" in result.log
    assert result.report.status == "timeout"
    assert 1500 <= result.report.duration_ms < 30_000
    assert not running(pid)
    assert cloud.invoke(name, 0).cold


def test_out_of_memory_is_a_kill_and_is_reported(limits, cloud, deploy):
    name = deploy("takes", memory_mb=128, timeout_s=30)
    assert cloud.invoke(name, 20).report.max_memory_mb >= 20
    result = cloud.invoke(name, 500)
    error = error_of(result)
    assert error["errorType"] == "Runtime.OutOfMemory"
    assert error["errorMessage"].endswith("Runtime exited with error: signal: killed")
    assert result.report.max_memory_mb >= 115
    assert result.report.error_type == "Runtime.OutOfMemory"
    assert cloud.invoke(name, 20).cold


def test_report_tells_what_was_held(limits, cloud, deploy):
    name = deploy("takes", memory_mb=512, timeout_s=30)
    some, more = (cloud.invoke(name, mb).report.max_memory_mb for mb in (100, 300))
    assert more - some == pytest.approx(200, rel=0.05)


def test_cpu_is_shared_out_by_memory(limits, cloud, deploy):
    name = deploy("burns", memory_mb=256, timeout_s=30)
    used_s = json.loads(cloud.invoke(name, 1.0).payload)
    assert used_s < 2 * 256 / 1769
    assert cloud.kind.startswith("cgroup" if limits == "kernel" else "SIGSTOP")


def test_init_over_its_limit_is_tried_again_in_the_invocation(
    cloud, deploy, tmp_path, monkeypatch
):
    monkeypatch.setattr(sandbox, "INIT_LIMIT_S", 0.5)
    mark, start = tmp_path / "mark", sandbox.Sandbox.start

    def let_the_second_pass(self, how="on-demand", again_s=None):
        if again_s is not None:
            mark.touch()
        return start(self, how, again_s)

    monkeypatch.setattr(sandbox.Sandbox, "start", let_the_second_pass)
    settings = {"environment": {"MARK": str(mark)}, "timeout_s": DEADLINE_S}
    result = cloud.invoke(deploy("slow.handler", **settings), {})
    assert result.payload == b"1"
    line = next(x for x in result.log.splitlines() if x.startswith("INIT_REPORT"))
    assert "Phase: init\tStatus: timeout" in line
    assert result.report.init_ms is None
    assert result.report.billed_ms >= 500 + result.report.duration_ms


def test_init_that_nobody_waits_for_has_longer(cloud, deploy, monkeypatch):
    monkeypatch.setattr(sandbox, "INIT_LIMIT_S", 0.001)
    assert cloud.warm(deploy("echo", provisioned=1)) == 1


def test_what_a_handler_started_ends_with_it(cloud, deploy):
    name = deploy("escapes")
    if not cloud.host.groups.folders:
        pytest.skip("only a control group finds who left the group; run as root")
    cloud.invoke(name, {})
    procs = (Path(cloud.sandboxes(name)[0].limits.doors[0])).read_text().split()
    assert len(procs) == 2
    cloud.__exit__()
    assert not any(running(int(pid)) for pid in procs)


# -- sandboxes: how many, how long


def test_one_request_a_sandbox(cloud, deploy, tmp_path):
    name, file = deploy("waits", timeout_s=DEADLINE_S), tmp_path / "go"
    with ThreadPoolExecutor(3) as callers:
        calls = [callers.submit(cloud.invoke, name, str(file)) for _ in range(3)]
        at_work(cloud, name, 3)
        file.touch()
        results = [call.result() for call in calls]
    assert len({result.payload for result in results}) == 3
    assert cloud.warm(name) == 3
    assert not cloud.invoke(name, str(file)).cold


def test_reserved_concurrency_bounds_one_and_spares_the_others(code, tmp_path):
    file, settings = tmp_path / "go", {"timeout_s": DEADLINE_S}
    with Platform(concurrency=2) as cloud:
        cloud.deploy(Function("one", "handlers.waits", code, reserved=1, **settings))
        cloud.deploy(Function("two", "handlers.waits", code, **settings))
        cloud.deploy(Function("off", "handlers.waits", code, reserved=0))
        with ThreadPoolExecutor(2) as callers:
            names = ("one", "two")
            under_way = [callers.submit(cloud.invoke, n, str(file)) for n in names]
            for name in names:
                at_work(cloud, name)
            with pytest.raises(TooManyRequests) as reserved:
                cloud.invoke("one", 0)
            with pytest.raises(TooManyRequests) as shared:
                cloud.invoke("two", 0)
            file.touch()
            assert all(call.result().error is None for call in under_way)
        assert str(reserved.value.reason).startswith("Reserved")
        assert shared.value.reason == "ConcurrentInvocationLimitExceeded"
        with pytest.raises(TooManyRequests):
            cloud.invoke("off", 0)
        with pytest.raises(FunctionError, match="at most 1 reserved"):
            cloud.deploy(Function("three", "handlers.sleeps", code, reserved=2))


def test_provisioned_sandboxes_are_ready_and_replaced(cloud, deploy):
    name = deploy("tell", provisioned=2, keep_alive_s=0)
    assert cloud.warm(name) == 2
    result = cloud.invoke(name, {})
    assert not result.cold
    told = json.loads(result.payload)
    kind = told["env"]["AWS_LAMBDA_INITIALIZATION_TYPE"]
    assert kind == "provisioned-concurrency"
    os.kill(told["pid"], signal.SIGKILL)
    process.wait_until(
        lambda: (
            len(all_ := cloud.sandboxes(name)) == 2
            and told["pid"] not in {box.pid for box in all_}
            and cloud.warm(name) == 2
        ),
        DEADLINE_S,
        "the lost sandbox to be replaced",
    )


def test_failure_to_replace_one_sandbox_stops_neither_others_nor_the_keeper(
    cloud, deploy, monkeypatch
):
    monkeypatch.setattr(pool, "PROVISION_S", 0.1)
    start, failures = sandbox.Sandbox.start, []

    def fail_once(self, how="on-demand", again_s=None):
        if not failures:
            failures.append(self)
            raise OSError("no room for one more process")
        return start(self, how, again_s)

    name, other = deploy("tell", provisioned=2), deploy("echo")
    cloud.invoke(other, 1)
    lost = {box.pid for box in cloud.sandboxes(name)}
    monkeypatch.setattr(sandbox.Sandbox, "start", fail_once)
    for pid in lost:
        os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        found = {box.pid for box in cloud.sandboxes(name)}
        return len(found) == cloud.warm(name) == 2 and not found & lost

    process.wait_until(replaced, DEADLINE_S, "both to be replaced")
    assert failures
    box = cloud.sandboxes(other)[0]
    process.wait_until(lambda: box.frozen, DEADLINE_S, "the other to be frozen")


def test_init_that_hangs_in_a_replacement_holds_up_no_other_function(
    cloud, deploy, tmp_path
):
    mark = tmp_path / "mark"
    settings = {"environment": {"MARK": str(mark)}, "timeout_s": DEADLINE_S}
    name, other = deploy("stuck.handler", provisioned=1, **settings), deploy("echo")
    (lost,) = cloud.sandboxes(name)
    mark.touch()
    os.kill(lost.pid, signal.SIGKILL)

    def replacing() -> list[sandbox.Sandbox]:
        return [b for b in cloud.sandboxes(name) if b.pid and b is not lost]

    starting = process.wait_until(replacing, DEADLINE_S, "a new one")
    cloud.invoke(other, 1)
    box = cloud.sandboxes(other)[0]
    process.wait_until(lambda: box.frozen, DEADLINE_S, "the other to be frozen")
    assert starting[0] in cloud.sandboxes(name)  # still in its init


def test_provisioned_sandboxes_that_cannot_start_fail_the_deployment(cloud, deploy):
    with pytest.raises(FunctionError, match="provisioned"):
        deploy("broken.handler", provisioned=1)


def test_idle_sandbox_ends_after_its_keep_alive(cloud, deploy):
    name = deploy("sleeps", keep_alive_s=0.2)
    pid = int(cloud.invoke(name, 0).payload)
    process.wait_until(lambda: not cloud.sandboxes(name), DEADLINE_S, "the end")
    assert not running(pid)
    assert cloud.invoke(name, 0).cold


def test_sandbox_that_died_idle_costs_a_cold_start_and_no_error(cloud, deploy):
    name = deploy("echo")
    cloud.invoke(name, 1)
    pid = cloud.sandboxes(name)[0].pid
    os.kill(pid, signal.SIGKILL)
    process.wait_until(lambda: not running(pid), DEADLINE_S, "its end", every_s=0.001)
    result = cloud.invoke(name, 2)
    assert (result.payload, result.cold) == (b"2", True)


def test_idle_sandbox_is_frozen_and_thawed(limits, cloud, deploy):
    name = deploy("ticks")
    cloud.invoke(name, "start")
    box = cloud.sandboxes(name)[0]
    process.wait_until(lambda: box.frozen, DEADLINE_S, "the sandbox to be frozen")
    process.wait_until(lambda: stopped(box.pid), DEADLINE_S, "all threads to stop")
    used = time.clock_gettime((~box.pid << 3) | 2)
    time.sleep(0.3)
    assert time.clock_gettime((~box.pid << 3) | 2) == used
    before = json.loads(cloud.invoke(name, "").payload)

    def goes_on() -> bool:
        return json.loads(cloud.invoke(name, "").payload) > before

    process.wait_until(goes_on, DEADLINE_S, "its thread to go on")


def stopped(pid: int) -> bool:
    """Whether every thread of a process has stopped: a signal takes its time."""
    stats = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def test_new_deployment_takes_over_and_lets_the_old_one_finish(
    cloud, deploy, code, tmp_path
):
    name, file = deploy("waits", timeout_s=DEADLINE_S), tmp_path / "go"
    with ThreadPoolExecutor(1) as caller:
        old = caller.submit(cloud.invoke, name, str(file))
        at_work(cloud, name)
        (box,) = cloud.sandboxes(name)
        cloud.deploy(Function(name, "handlers.echo", code))
        assert cloud.invoke(name, "new").payload == b'"new"'
        file.touch()
        assert old.result().payload == str(box.pid).encode()
    assert not running(box.pid)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "no/name"},
        {"handler": "handler"},
        {"code": Path("/nowhere/at/all")},
        {"memory_mb": 64},
        {"memory_mb": 20_000},
        {"timeout_s": 0},
        {"timeout_s": 901},
        {"reserved": -1},
        {"reserved": 1, "provisioned": 2},
        {"snapshot": True, "provisioned": 1},
        {"retries": 3},
        {"environment": {"AWS_LAMBDA_RUNTIME_API": "evil:1"}},
    ],
)
def test_impossible_functions_are_refused(wrong):
    good = {"name": "echo", "handler": "handlers.echo", "code": ROOT}
    with pytest.raises(FunctionError, match=r"Expected .* found .* Change"):
        Function(**{**good, **wrong})


# -- asynchronous invocation


def test_event_is_accepted_at_once_and_done_later(cloud, deploy, tmp_path):
    records: list[dict] = []
    tried = tmp_path / "tried"
    settings = {"on_failure": records.append, "retry_delay_s": 0.05}
    name = deploy("writes", **settings)
    request_id = cloud.send(name, str(tried))
    process.wait_until(lambda: records, DEADLINE_S, "the dead letter")
    assert tried.read_text() == "tried\n" * 3
    (record,) = records
    assert record["requestContext"] == {
        "requestId": request_id,
        "functionArn": f"{sandbox.ARN}writes:$LATEST",
        "condition": "RetriesExhausted",
        "approximateInvokeCount": 3,
    }
    assert record["requestPayload"] == str(tried)
    assert record["responseContext"]["functionError"] == "Unhandled"
    assert record["responsePayload"]["errorMessage"] == "again"


def test_throttled_events_wait_and_none_is_lost(cloud, deploy, tmp_path, monkeypatch):
    monkeypatch.setattr(asynchronous, "FIRST_BACKOFF_S", 0.05)
    done = tmp_path / "done"
    settings = {"reserved": 1, "retries": 0, "on_failure": lambda _: None}
    name = deploy("writes", **settings)
    for _ in range(5):
        cloud.send(name, str(done))
    process.wait_until(
        lambda: done.exists() and len(done.read_text().splitlines()) == 5,
        DEADLINE_S,
        "five events to be done by one sandbox",
    )


def test_events_that_are_too_old_or_left_over_are_handed_back(code):
    records: list[dict] = []
    settings = {"reserved": 0, "on_failure": records.append}
    with Platform() as cloud:
        old = Function("old", "handlers.echo", code, max_event_age_s=0.5, **settings)
        cloud.deploy(old)
        cloud.deploy(Function("waiting", "handlers.echo", code, **settings))
        cloud.send("old", 1)
        process.wait_until(lambda: records, DEADLINE_S, "the event to be too old")
        cloud.send("waiting", 2)
    told = [(r["requestPayload"], r["requestContext"]["condition"]) for r in records]
    assert told == [(1, "EventAgeExceeded"), (2, "PlatformClosed")]


def test_event_on_which_the_platform_fails_is_handed_back(
    cloud, deploy, monkeypatch, caplog
):
    def fail(self, *_):
        raise RuntimeError("can't start new thread")

    records: list[dict] = []
    name = deploy("echo", on_failure=records.append)
    monkeypatch.setattr(sandbox.Sandbox, "start", fail)
    cloud.send(name, 1)
    process.wait_until(lambda: records, DEADLINE_S, "the event")
    assert records[0]["requestPayload"] == 1
    assert records[0]["requestContext"]["condition"] == "PlatformFailed"
    assert "can't start new thread" in caplog.text


# -- the end


def test_closing_ends_what_is_under_way(cloud, deploy):
    name = deploy("sleeps", timeout_s=60)
    failed: list[BaseException] = []

    def call() -> None:
        try:
            cloud.invoke(name, 60)
        except PlatformClosed as closed:
            failed.append(closed)

    caller = threading.Thread(target=call)
    caller.start()
    at_work(cloud, name)
    pid = cloud.sandboxes(name)[0].pid
    cloud.__exit__()
    caller.join(DEADLINE_S)
    assert failed
    assert not running(pid)
    with pytest.raises(PlatformClosed):
        cloud.invoke(name, 0)


PROGRAM = """
import sys, threading, time
from pathlib import Path
from local_cloud.functions import Function, Platform
with Platform() as cloud:
    for name, wait in (("busy", 600), ("frozen", 0)):
        code = Path(sys.argv[1])
        cloud.deploy(Function(name, "handlers.sleeps", code, timeout_s=900))
        call = threading.Thread(target=cloud.invoke, args=(name, wait), daemon=True)
        call.start()
        if not wait:
            call.join()
    while not cloud.sandboxes("frozen")[0].frozen or not cloud.sandboxes("busy"):
        time.sleep(0.01)
    boxes = cloud.sandboxes("busy") + cloud.sandboxes("frozen")
    folders = [cloud.host.root, *cloud.host.groups.folders]
    print(cloud.kind)
    print(*(box.pid for box in boxes), flush=True)
    print(*folders, flush=True)
    if sys.argv[2] == "exception":
        raise RuntimeError("on purpose")
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["exception", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_outlives_the_platform_however_it_ends(code, how):
    argv = [sys.executable, "-c", PROGRAM, str(code), how]
    with subprocess.Popen(
        argv,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as platform:
        assert platform.stdout
        platform.stdout.readline()
        pids = [int(pid) for pid in platform.stdout.readline().split()]
        folders = [Path(name) for name in platform.stdout.readline().split()]
        assert len(pids) == 2
        if how != "exception":
            platform.send_signal(getattr(signal, how))
        platform.wait(DEADLINE_S)
    process.wait_until(
        lambda: not any(map(running, pids)) and not any(f.exists() for f in folders),
        DEADLINE_S,
        "every process and folder to be gone",
    )


@pytest.fixture
def as_nobody() -> list[str]:
    """The beginning of a command that is not root's, where this process is."""
    setpriv = shutil.which("setpriv")
    if os.getuid() != 0 or not setpriv:
        pytest.skip("needs root to give it up, and setpriv: apt-get install util-linux")
    # Not root, but allowed to read the interpreter wherever it is installed.
    as_nobody = [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    for which in ("--inh-caps", "--ambient-caps"):
        as_nobody.append(f"{which}=-all,+dac_read_search")
    return as_nobody


def test_works_without_root(code, as_nobody):
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from local_cloud.functions import Function, Platform
        with Platform() as cloud:
            settings = {"memory_mb": 128, "timeout_s": 30}
            function = Function("f", "handlers.takes", Path(sys.argv[1]), **settings)
            cloud.deploy(function)
            print(cloud.kind)
            print(cloud.invoke("f", 10).payload.decode())
            print(cloud.invoke("f", 500).report.error_type)
    """)
    argv = [*as_nobody, sys.executable, "-c", program, str(code)]
    for folder in (code, *code.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    told = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert told.stdout.splitlines() == [
        "SIGSTOP and RSS watch",
        str(10 * 2**20),
        "Runtime.OutOfMemory",
    ], told.stderr


def test_lesson_works_without_root_and_says_what_enforces_the_limits(as_nobody):
    argv = [*as_nobody, sys.executable, "serverless_deployment.py", "1", "--quick"]
    told = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    fact = "limits are enforced by: SIGSTOP and RSS watch"
    assert fact in told.stdout, told.stdout + told.stderr
    assert "1 section in" in told.stdout, told.stdout + told.stderr


# -- the REPORT line


def test_report_line_is_lambdas_and_reads_back():
    report = Report("id", 1.234, 50, 512, 77, 48.5, None, "error", "Runtime.ExitError")
    line = str(report)
    assert line == (
        "REPORT RequestId: id\tDuration: 1.23 ms\tBilled Duration: 50 ms\t"
        "Memory Size: 512 MB\tMax Memory Used: 77 MB\tInit Duration: 48.50 ms\t"
        "Status: error\tError Type: Runtime.ExitError"
    )
    assert str(Report.parse(line)) == line
    restored = str(Report("id", 2.0, 6, 128, 5, None, 3.1))
    assert restored.endswith("Restore Duration: 3.10 ms\tBilled Restore Duration: 4 ms")
    assert str(Report.parse(restored + "\t\n")) == restored


def test_what_is_no_report_is_refused():
    with pytest.raises(ValueError, match="Expected a line such as"):
        Report.parse("END RequestId: 1")
