"""Cold starts: the lean model, its packed files, and clones of a snapshot."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import models
import serverless_deployment as lesson
from course.process import wait_until
from models import Sampling, build, lean, packed
from models.errors import BuildError, PromptTooLong
from models.runtime import Runtime

pytest.importorskip(
    "awslambdaric", reason="Linux only: pip install awslambdaric==4.2.2"
)

from local_cloud.functions import Function, FunctionError, Platform, cold_starts
from tests.test_functions import running

ROOT = Path(__file__).parents[1]
HANDLER = "serverless_deployment.handler"
GREEDY = {"prompt": "Explain gravity in one sentence.", "max_tokens": 12}
RANDOM = {"prompt": "Tell me a story.", "max_tokens": 12, "temperature": 1.0}
DEADLINE_S = 60.0

needs_fork = pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="snapshots need Linux"
)


@pytest.fixture(scope="module")
def light() -> lean.Lean:
    return lean.load()


@pytest.fixture(scope="module")
def cloud() -> Iterator[Platform]:
    with Platform() as cloud:
        yield cloud


def function(name: str, **settings) -> Function:
    settings = {"handler": HANDLER, "environment": lesson.ENVIRONMENT, **settings}
    return Function(name, memory_mb=1769, timeout_s=30, **settings)


def module(folder: Path, source: str) -> dict:
    """Settings of a function whose handler is this source, beside the course's code."""
    (folder / "written.py").write_text(source)
    path = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return {
        "handler": "written.handler",
        "code": folder,
        "environment": {**lesson.ENVIRONMENT, **path},
    }


def text(model: lean.Lean, prompt: str, sampling: Sampling) -> str:
    pieces = model.stream(model.prompt(prompt), sampling)
    return "".join(piece.text for piece in pieces if piece)


# The lean model answers as the engine does.


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        ("Hi", Sampling(max_tokens=16)),
        ("Tell me a story.", Sampling(max_tokens=24, temperature=1.0, seed=7)),
        ("word " * 300, Sampling(max_tokens=8)),
        ("Count to ten.", Sampling(max_tokens=32, stop=("three", "3"))),
        ("Say yes.", Sampling(max_tokens=16, frequency_penalty=1.0, top_p=0.9)),
    ],
)
def test_lean_and_engine_give_the_same_text(
    model: models.Model, light: lean.Lean, prompt: str, sampling: Sampling, warm: bool
):
    if warm:
        light.warm_up()
    assert text(light, prompt, sampling) == model.generate(prompt, sampling).text


def test_packed_logits_are_the_same_to_the_last_bit():
    plain = Runtime(build.ensure().graph, rows=1, context=64, threads=2)
    tuned = lean.PackedRuntime(packed.ensure().graph, rows=1, context=64, threads=1)
    told = [
        (one.prefill(0, range(20, 30), 0, True), one.decode([5], [10])[0])
        for one in (plain, tuned)
    ]
    for mine, theirs in zip(*told, strict=True):
        assert np.array_equal(mine, theirs)


def test_only_what_all_prompts_begin_with_is_kept(light: lean.Lean):
    light.warm_up()
    known = len(light._known)
    secret = light.prompt("A" * 400)
    assert 16 < known < 64
    list(light.stream(secret, Sampling(max_tokens=1)))
    assert len(light._known) == known  # nothing of the caller's words
    list(light.stream([5, 6, 7], Sampling(max_tokens=1)))
    assert len(light._known) == 0  # overwritten, and known to be


def test_an_answer_left_early_does_not_disturb_the_next(light: lean.Lean):
    expected = text(light, "Hi", Sampling(max_tokens=8))
    for _ in zip(range(3), light.stream(light.prompt("word " * 200)), strict=False):
        pass
    assert text(light, "Hi", Sampling(max_tokens=8)) == expected


@pytest.mark.parametrize("count", [0, lean.CONTEXT, 10 * lean.CONTEXT])
def test_a_prompt_that_does_not_fit_is_refused(light: lean.Lean, count: int):
    with pytest.raises(PromptTooLong, match=f"expected 1 to .* found {count}"):
        light.stream([5] * count)


def test_the_answer_ends_where_the_context_does():
    short = lean.load(context=48)
    ids = short.prompt("Tell me a long story.")
    pieces = [piece for piece in short.stream(ids, Sampling(max_tokens=500)) if piece]
    assert len(ids) + len(pieces) == 48
    assert pieces[-1].finish_reason == "length"


# Packed files: right for this machine, whole, or made anew.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with the int4 graph and nothing packed."""
    there = build.ensure().graph.parent
    for name in (f"{packed.NAME}.onnx", f"{packed.NAME}.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(there / name)
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    return tmp_path


def places(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*-packed-*")}


def test_files_of_another_runtime_are_made_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    assert packed.find() is None
    first = packed.ensure()
    assert first == packed.find()
    assert packed.verify()
    record = json.loads((first.graph.parent / packed.RECORD).read_text())
    assert record["cpu"] == packed.cpu()
    assert record["onnxruntime"] == packed.onnxruntime.__version__
    monkeypatch.setattr(packed.onnxruntime, "__version__", "0.0.1")
    assert packed.find() is None
    second = packed.ensure()
    assert places(folder) == {second.graph.parent.name}  # in place of the first
    assert not list(folder.glob(f"{build.WORKSHOP}*"))


def test_files_of_another_cpu_stay_beside_ours(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(packed, "cpu", lambda: "another")
        theirs = packed.ensure()
    ours = packed.ensure()
    assert places(folder) == {theirs.graph.parent.name, ours.graph.parent.name}


def test_a_truncated_file_is_made_anew_and_a_changed_one_is_found(folder: Path):
    weights = packed.ensure().graph.parent / packed.WEIGHTS
    size = weights.stat().st_size
    with open(weights, "r+b") as file:
        file.write(b"damaged")
    assert packed.find()
    assert not packed.verify()
    os.truncate(weights, size // 2)
    assert packed.find() is None
    assert packed.ensure().graph.parent == weights.parent
    assert packed.verify()


def test_without_packed_files_it_says_so_and_answers(
    light: lean.Lean, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse() -> None:
        raise BuildError("read-only")

    monkeypatch.setattr(packed, "ensure", refuse)
    with caplog.at_level(logging.WARNING):
        plain = lean.load()
    assert "unpacked: read-only" in caplog.text
    sampling = Sampling(max_tokens=8)
    assert text(plain, "Hi", sampling) == text(light, "Hi", sampling)


def test_the_cpu_is_known_by_its_extensions(tmp_path: Path):
    info = tmp_path / "cpuinfo"
    info.write_text(
        "model\t: X\nflags\t\t: fpu avx2 sse2 ht avx512_vnni\nflags\t: avx\n"
    )
    assert packed.cpu(info).endswith(" avx2 avx512_vnni sse2")
    assert packed.cpu(tmp_path / "missing")


# The handler.


def test_importing_the_function_imports_nothing_dear():
    code = (
        "import sys, serverless_deployment; "
        "dear = {'numpy', 'onnxruntime', 'course', 'local_cloud', 'models', 'fastapi',"
        "'asyncio', 'rich'}; print(sorted(dear & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("event", "named"),
    [
        (None, "event"),
        ([], "event"),
        ({}, "event"),
        ({"prompt": ""}, "event"),
        ({"prompt": "a", "text": "b"}, "event"),
        ({"prompt": 5}, "event"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 513}, "max_tokens"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "seed": "x"}, "seed"),
        ({"prompt": "\ud800"}, "text"),
        ({"text": "word " * 3000}, "prompt"),
    ],
)
def test_a_wrong_event_gets_a_result_that_says_what_to_send(
    light: lean.Lean, monkeypatch: pytest.MonkeyPatch, event: object, named: str
):
    kept = {"model": light, "random": random.Random()}
    monkeypatch.setattr(lesson, "LOADED", kept)
    told = lesson.handler(event, context(30_000))
    assert told.keys() == {"error"}
    assert told["error"].startswith(named)
    assert "expected" in told["error"]
    assert "found" in told["error"]
    json.dumps(told)


def context(remaining_ms: float) -> SimpleNamespace:
    return SimpleNamespace(get_remaining_time_in_millis=lambda: remaining_ms)


def steps_of(clock: list[float], step_ms: list[float]) -> Iterator:
    """Steps that take so long each, on a clock that is turned by them alone."""
    for place, took in enumerate(step_ms):
        clock[0] -= took
        last = place == len(step_ms) - 1
        yield models.Piece("x", finish_reason="stop" if last else None)


def test_the_answer_stops_before_the_deadline_even_if_steps_grow_slower():
    clock = [1000.0]
    told = lesson.answer_in_time(
        steps_of(clock, [10.0 + 2 * n for n in range(100)]), lambda: clock[0]
    )
    assert told.finish_reason == "deadline"
    assert clock[0] > lesson.HAND_OVER_MS
    assert told.text == "x" * told.tokens
    assert told.tokens > 20


def test_with_no_time_at_all_nothing_is_begun():
    told = lesson.answer_in_time(iter(()), lambda: lesson.HAND_OVER_MS / 2)
    assert told == ("", "deadline", 0, None)


def test_with_time_enough_the_answer_ends_by_itself():
    clock = [1000.0]
    told = lesson.answer_in_time(steps_of(clock, [5.0] * 10), lambda: clock[0])
    assert told == ("x" * 10, "stop", 10, 200.0)


def test_in_a_sandbox_the_half_of_an_answer_comes_before_the_kill(cloud: Platform):
    late = Function(
        "late",
        handler=HANDLER,
        environment=lesson.ENVIRONMENT,
        memory_mb=384,  # a fifth of a CPU: nobody writes 400 tokens with it in time
        timeout_s=3.0,
    )
    cloud.deploy(late)
    event = {"prompt": "Tell a long story about a dragon.", "max_tokens": 512}
    result = cloud.invoke("late", event)
    answer = json.loads(result.payload)
    assert result.report.status == "success", result.log
    assert answer["finish_reason"] == "deadline"
    assert answer["tokens"] > 0
    assert cloud.warm("late") == 1  # the sandbox lived on


def test_the_naive_function_gives_the_same_answer(cloud: Platform):
    cloud.deploy(function("tuned"))
    cloud.deploy(function("naive", handler="deploy.functions.naive.handler"))
    told = [
        json.loads(cloud.invoke(name, GREEDY).payload) for name in ("tuned", "naive")
    ]
    assert told[0]["text"] == told[1]["text"]


# Clones of a snapshot.


@pytest.fixture(scope="module")
def snapshot(cloud: Platform) -> Platform:
    cloud.deploy(function("snapshot", snapshot=True))
    return cloud


@needs_fork
def test_clones_that_work_at_once_do_not_disturb_each_other(
    snapshot: Platform, light: lean.Lean
):
    _, calls = cold_starts.burst(snapshot, "snapshot", GREEDY, 6)
    assert sum(call.cold for call in calls) > 1
    alone = text(light, GREEDY["prompt"], Sampling(max_tokens=12))
    assert {call.answer["text"] for call in calls} == {alone}


ONCE = {"snapshot": True, "keep_alive_s": 0.0}  # a clone for each call


@needs_fork
def test_two_clones_at_temperature_one_tell_different_stories(cloud: Platform):
    assert len(stories(cloud, function("hooked", **ONCE))) == 2


@needs_fork
def test_without_the_hook_two_clones_tell_the_same_story(
    cloud: Platform, tmp_path: Path
):
    source = (
        "import snapshot_restore_py\n"
        "from serverless_deployment import handler\n"
        "snapshot_restore_py.get_after_restore().clear()\n"
    )
    naive = function("unhooked", **ONCE, **module(tmp_path, source))
    assert len(stories(cloud, naive)) == 1


def stories(cloud: Platform, function: Function) -> set[str]:
    """What two clones say first."""
    told = cold_starts.first_calls(cloud, [function], RANDOM, turns=2)
    assert all(call.cold for call in told[function.name])
    return {call.answer["text"] for call in told[function.name]}


@needs_fork
def test_a_fresh_clone_has_little_memory_of_its_own(cloud: Platform):
    with cold_starts.clones(cloud, function("small"), 2) as fresh:
        sizes = [cold_starts.private_mb(sandbox.pid) for sandbox in fresh]
        agents = {sandbox.id for sandbox in fresh}
    assert len(sizes) == len(agents) == 2
    assert max(sizes) <= 6


@needs_fork
def test_a_model_with_an_engine_thread_does_not_survive_the_fork(cloud: Platform):
    naive = Function(
        "forked-engine",
        handler="deploy.functions.naive.handler",
        snapshot=True,
        timeout_s=2.0,
        memory_mb=1769,
    )
    cloud.deploy(naive)
    assert cloud.invoke("forked-engine", GREEDY).report.status == "timeout"


@needs_fork
def test_an_init_that_fails_refuses_the_snapshot(cloud: Platform, tmp_path: Path):
    broken = function(
        "broken", snapshot=True, **module(tmp_path, "raise KeyError('no such thing')")
    )
    with pytest.raises(FunctionError, match="no such thing"):
        cloud.deploy(broken)


@needs_fork
def test_a_hook_that_fails_after_restore_is_reported(cloud: Platform, tmp_path: Path):
    source = (
        "import snapshot_restore_py as s\n"
        "@s.register_after_restore\n"
        "def fail(): raise KeyError('hook')\n"
        "def handler(event, context): return 1\n"
    )
    cloud.deploy(function("hook", snapshot=True, **module(tmp_path, source)))
    result = cloud.invoke("hook", {})
    assert result.error == "Unhandled"
    assert b"hook" in result.payload


@needs_fork
def test_a_restore_that_succeeds_the_second_time_is_billed_once(
    cloud: Platform, tmp_path: Path
):
    source = (
        "import os, snapshot_restore_py as s, time\n"
        "@s.register_after_restore\n"
        "def fail_once():\n"
        "    time.sleep(0.3)\n"
        "    if not os.path.exists('mark'):\n"
        "        open('mark', 'w').close()\n"
        "        raise KeyError('hook')\n"
        "def handler(event, context): return 1\n"
    )
    cloud.deploy(function("again", snapshot=True, **module(tmp_path, source)))
    result = cloud.invoke("again", {})
    assert result.payload == b"1"
    (lost_ms,) = re.findall(r"INIT_REPORT Init Duration: (\S+) ms", result.log)
    took_ms = float(lost_ms) + result.report.duration_ms
    assert result.report.billed_ms == pytest.approx(took_ms, abs=1.5)


SMALL = (
    "import os, sys, tempfile\n"
    "tempfile.gettempdir()\n"
    "def handler(event, context):\n"
    "    print('from', os.getpid())\n"
    "    if event == 'exit': os._exit(7)\n"
    "    return [os.getpid(), os.getppid(), tempfile.gettempdir()]\n"
)


@needs_fork
def test_a_clone_is_a_sandbox_with_a_log_and_a_folder_of_its_own(
    cloud: Platform, tmp_path: Path
):
    cloud.deploy(function("apart", snapshot=True, **module(tmp_path, SMALL)))
    pid, parent, folder = json.loads((result := cloud.invoke("apart", 0)).payload)
    (sandbox,) = cloud.sandboxes("apart")
    assert sandbox.pid == pid != parent
    assert f"from {pid}" in result.log
    assert folder == str(sandbox.tmp)
    assert result.report.restore_ms is not None
    assert result.report.init_ms is None


@needs_fork
def test_a_clone_that_exits_is_reported_and_replaced(cloud: Platform, tmp_path: Path):
    cloud.deploy(function("exits", snapshot=True, **module(tmp_path, SMALL)))
    assert b"exit status 7" in cloud.invoke("exits", "exit").payload
    assert cloud.invoke("exits", 0).error is None


@needs_fork
def test_nothing_is_left_when_the_template_is_killed(tmp_path: Path):
    with Platform() as cloud:
        cloud.deploy(function("gone", snapshot=True, **module(tmp_path, SMALL)))
        pid, template, _ = json.loads(cloud.invoke("gone", 0).payload)
        os.kill(template, signal.SIGKILL)
        again, *_ = json.loads(cloud.invoke("gone", 0).payload)
        assert again == pid  # what was restored lives on
    wait_until(lambda: not running(pid), DEADLINE_S, "the clone to end")


# The measurements that the lesson draws.


def test_a_composition_names_every_phase_once():
    for kind, only in (("naive", "web framework"), ("tuned", "own code")):
        phases = cold_starts.composition(kind, repeats=1)
        names = [phase.name for phase in phases]
        assert len(set(names)) == len(names)
        assert (names[0], names[-1]) == ("interpreter", "first token")
        assert only in names
        assert all(phase.wall_ms > 0 for phase in phases)


def test_first_calls_are_cold_unless_sandboxes_are_provisioned(cloud: Platform):
    functions = [
        function("cold", keep_alive_s=0.0),
        function("waiting", keep_alive_s=0.0, provisioned=1),
    ]
    told = cold_starts.first_calls(cloud, functions, GREEDY, turns=2)
    assert [call.cold for call in told["cold"]] == [True, True]
    assert [call.cold for call in told["waiting"]] == [False, False]
    assert len({c.answer["text"] for calls in told.values() for c in calls}) == 1
