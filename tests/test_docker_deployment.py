"""Lesson 1, as it is run and by its effects: real images, containers and stacks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest

import docker_deployment
from course import process
from course.lesson import Failure, Run, Skip
from docker_deployment import DEVICE, EDGE, HARDENED, SMALL, STARVED, serving
from local_cloud.containers import compose, packages, scanners, trials
from local_cloud.containers.demo import plainly
from local_cloud.containers.engine import Container, Engine, NoEngine
from tests.container_fixtures import BASE, program

ROOT = Path(__file__).parent.parent
needs_docker = pytest.mark.docker


# -- figures and files: no engine needed


def test_limits_leave_room_above_what_was_measured():
    limits = docker_deployment.recommend(
        400 * 2**20, SMALL, cpu_s_per_token=0.0123, threads=20, rate=100
    )
    # 500 MiB, and (8 rows + 16 kept prompts) x 256 tokens x 46,080 bytes = 270 MiB.
    assert limits == docker_deployment.Limits(memory_mib=832, cpus=1.3, pids=64)


def test_what_is_set_holds_a_full_cache():
    for place in docker_deployment.PLACES.values():
        if place.memory_mib:
            assert place.cache_bytes < place.memory_mib * 2**20


def test_every_package_has_a_wheel_for_arm():
    assert all(packages.on_arm()[kind] for kind in ("pure Python", "compiled"))
    assert packages.on_arm()["none"] == []


@pytest.mark.parametrize("name", docker_deployment.LOCKS)
def test_the_locks_have_a_hash_for_every_package_and_no_address(name: str):
    _, count, hashes, without = packages.lock_row(ROOT / name)
    assert count > 5
    assert hashes >= count
    assert without == 0
    pins = [x for x in (ROOT / name).read_text().splitlines() if x[:1] not in "# "]
    assert not [x for x in pins if "://" in x or x.startswith("-")]


def test_a_build_argument_needs_a_name_and_an_equals_sign(capsys):
    with pytest.raises(SystemExit) as end:
        docker_deployment.main(["--build-arg", "BASE"])
    assert end.value.code == 2
    assert "expected NAME=VALUE, found 'BASE'" in capsys.readouterr().err


# -- the lesson where there is no engine


def lesson(
    *words: str, before: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """The lesson as anyone would run it; `before` is a program that runs it."""
    return subprocess.run(
        [*before, sys.executable, str(ROOT / "docker_deployment.py"), *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_an_engine_the_lesson_checks_and_says_what_it_skips(tmp_path: Path):
    nowhere = {
        "DOCKER_HOST": f"unix://{tmp_path}/no.sock",
        "REPORTS_DIR": str(tmp_path),
    }
    told = lesson("--quick", "--json", str(tmp_path / "all.json"), **nowhere)
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""
    sections = json.loads((tmp_path / "all.json").read_text())["sections"]
    outcomes = [section["outcome"] for section in sections]
    assert outcomes == ["done", "skipped", "skipped", "skipped"]
    for section in sections[1:]:
        (skip,) = [e for e in section["events"] if e["kind"] == "skipped"]
        assert "found none that answers" in skip["text"]
        assert skip["command"]
    figures = [e for s in sections[2:] for e in s["events"] if e["kind"] == "table"]
    assert figures == []  # nothing invented
    assert "SKIPPED" in told.stdout


# -- what an image must be, and must not hold


CONFIGS = {
    "runtime": ["structure-test.yaml"],
    "distroless": ["structure-test.yaml", "structure-test.distroless.yaml"],
}


@needs_docker
@pytest.mark.parametrize("name", CONFIGS)
def test_the_images_hold_what_serves_and_nothing_else(
    docker: Engine, name: str, request: pytest.FixtureRequest
):
    fixture = {"distroless": "image", "runtime": "runtime_image"}[name]
    passed, failed = structure(docker, request.getfixturevalue(fixture), name)
    assert failed == 0
    assert passed > 20


@needs_docker
def test_another_image_does_not_pass_as_ours(docker: Engine, small: str):
    _, failed = structure(docker, small, "distroless")
    assert failed > 10  # a shell, pip, no model, root, another command


def structure(docker: Engine, tag: str, name: str) -> tuple[int, int]:
    files = [ROOT / "deploy" / file for file in CONFIGS[name]]
    return scanners.structure(program("container-structure-test"), docker, tag, files)


def test_the_workflow_checks_the_same():
    workflow = (ROOT / ".github/workflows/image.yml").read_text()
    named = re.findall(r"--config (\S+)", workflow)
    assert named == [f"deploy/{name}" for name in CONFIGS["distroless"]]


# -- the API in its container


KEY = "a-key-for-tests-0123456789"
COLOURS: Any = [{"role": "user", "content": "Name three colours."}]


def stream(url: str, key: str, tokens: int = 12) -> tuple[str, int]:
    """What the `openai` package gets from a streamed chat: the text and its tokens."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        pieces = list(
            client.chat.completions.create(
                model=trials.NAME,
                messages=COLOURS,
                max_tokens=tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    assert pieces[-1].usage
    said = [p.choices[0].delta.content or "" for p in pieces if p.choices]
    assert len([word for word in said if word]) > 3  # in pieces, not at once
    return "".join(said), pieces[-1].usage.completion_tokens


@pytest.fixture(scope="module")
def api(docker_engine: Engine, image: str) -> Iterator[Container]:
    """The hardened API, its key by file; shared by the tests that only ask."""
    with trials.key_file(KEY) as path:
        options = serving(KEY, SMALL)
        del options["environment"]["API_KEYS"]
        options["environment"]["API_KEYS_FILE"] = trials.SECRET
        options["volumes"] = {str(path): {"bind": trials.SECRET, "mode": "ro"}}
        with docker_engine.container(image, **options, **HARDENED) as box:
            box.wait_healthy(60)
            yield box


@needs_docker
def test_openai_streams_from_the_container_with_a_key_by_file(
    docker: Engine, api: Container
):
    text, tokens = stream(api.url, KEY)
    assert text.strip()
    assert tokens == 12
    assert stream(api.url, KEY) == (text, tokens)
    with pytest.raises(openai.AuthenticationError):
        stream(api.url, "not-the-key-of-this-server")
    assert KEY not in json.dumps(api.inspect())


@needs_docker
def test_the_precautions_hold_and_the_api_answers_after_all_of_that(
    docker: Engine, api: Container
):
    found = trials.attack(api)
    (told,) = trials.ask(api.url, KEY, tokens=8)
    assert told.tokens == 8
    assert found["see who it is"] == "user 10001"
    assert found["count what root left it"] == "0 capabilities"
    assert found["drop a file in /tmp"] == "done"
    for name in ("change the program", "drop a file in /usr", "run what it dropped"):
        assert found[name].startswith("refused")
    assert found["give a file away"].startswith("refused")
    processes, _, why = found["start processes without end"].partition(
        " processes, then "
    )
    assert int(processes) < HARDENED["pids_limit"]
    assert why.startswith("refused")


@needs_docker
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "without API keys"),
        ({"API_KEYS": "short"}, "at least 16 ASCII characters"),
        ({"API_KEYS_FILE": "/nowhere"}, "API_KEYS_FILE: expected a readable text file"),
        ({"ROWS": "many", "ALLOW_ANONYMOUS": "1"}, "ROWS='many'"),
    ],
)
def test_a_wrong_setting_ends_the_container_in_words(
    docker: Engine, image: str, environment: dict[str, str], words: str
):
    code, _, said = trials.wrong_start(docker, image, environment)
    assert code == 2
    assert words in said


@needs_docker
def test_a_key_in_a_file_is_seen_by_nobody_and_opens_the_door(
    docker: Engine, image: str
):
    assert trials.where_seen(docker, image, "variable") == [True, True, True]
    assert trials.where_seen(docker, image, "file") == [False, False, True]


@needs_docker
def test_the_limit_leaves_room_for_all_that_callers_can_make_it_hold(
    docker: Engine, api: Container
):
    trials.fill(api.url, KEY, SMALL.rows, SMALL.context)
    assert SMALL.memory_mib
    assert SMALL.cache_bytes < api.stats().memory_bytes < SMALL.memory_mib * 2**20
    assert not api.state["OOMKilled"]
    assert trials.ask(api.url, KEY, tokens=8)


@needs_docker
def test_no_new_privileges_is_what_stops_a_program_of_roots(docker: Engine, image: str):
    assert trials.borrow_root(docker, image) == "user 0"
    stopped = trials.borrow_root(docker, image, "no-new-privileges:true")
    assert stopped == "user 10001"


@needs_docker
def test_a_stop_in_mid_answer_cuts_nothing(docker: Engine, image: str):
    with docker.container(image, **serving(KEY, SMALL), **HARDENED) as box:
        box.wait_ready("/health/ready", 60)
        end = trials.drain(box, KEY, lambda: box.made.stop(timeout=60))
    assert end.whole
    assert end.before > 0
    assert end.after > 0
    assert end.exit_code == 0


@needs_docker
def test_too_little_memory_for_the_model(docker: Engine, image: str):
    starved = {**serving(KEY, SMALL), **STARVED}
    code, _, found = trials.endure(docker, image, KEY, starved)
    assert (code, found) == (137, "killed by the kernel while it started")


@needs_docker
def test_enough_memory_is_no_failure_of_the_lesson(docker: Engine, image: str):
    enough = {**serving(KEY, SMALL), **HARDENED}
    code, _, found = trials.endure(docker, image, KEY, enough, callers=2, words=30)
    assert (code, found) == (None, "not killed when 2 long prompts came")


THREADS = """
import os, models
def count():
    return len(os.listdir("/proc/self/task"))
before = count()
with models.load(rows=1, context=64):
    print("cores", os.cpu_count(), "threads", count() - before)
"""


@needs_docker
def test_half_a_core_at_the_edge_gets_one_thread_and_still_answers(
    docker: Engine, image: str
):
    """The quota is not in `os.cpu_count()`; the model must read it for itself."""
    command = ["python", "-c", THREADS]
    found = []
    for limits in (HARDENED, EDGE):
        with docker.container(image, command=command, **limits) as box:
            assert box.wait_exit(60) == 0, box.logs()
            found.append(dict(zip(*[iter(box.logs().split())] * 2, strict=True)))
    everywhere, edge = found
    assert edge["cores"] == everywhere["cores"]
    fewer = int(everywhere["threads"]) - int(edge["threads"])
    assert fewer == len(os.sched_getaffinity(0)) - 1
    with docker.container(image, **serving(KEY, DEVICE), **EDGE) as box:
        box.wait_ready("/health/ready", 60)
        (told,) = trials.ask(box.url, KEY, tokens=8)
        used = box.stats()
    assert told.tokens == 8
    assert used.periods > 0  # it has a quota; what that does depends on who else works
    assert used.memory_bytes < 512 * 2**20


# -- the stack of docker-compose.yml


@needs_docker
@pytest.mark.usefixtures("composing")
def test_the_stack_builds_streams_survives_a_crash_and_leaves_nothing(
    docker: Engine, image: str
):
    """`docker compose up --build --wait` with the repository's own file."""
    tag, file = f"course-test:stack-{docker.run_id}", ROOT / "docker-compose.yml"
    with trials.key_file(KEY) as path:
        override = {
            "services": {"api": {"image": tag, "environment": {"DRAIN_SECONDS": "0"}}},
            "secrets": {"api_keys": {"file": str(path)}},
        }
        port = str(process.free_port())
        with compose.project(docker, file, override=override, API_PORT=port) as stack:
            try:
                stack.call("up", "--detach", "--build", "--wait", deadline_s=540)
                box = stack.container("api", 8000)
                before = stream(box.url, KEY)
                _, restarts = trials.crash(box)
                assert restarts == 1
                assert stream(box.url, KEY) == before
            finally:
                stack.down()
                docker.untag(tag)
    assert before[1] == 12
    assert docker.having(stack.label) == []
    assert not docker.has(tag)


# -- the lesson's own runs


@needs_docker
def test_an_unknown_base_ends_the_lesson_in_words(docker: Engine, tmp_path: Path):
    base = "BASE=course-test-nobody-has-this:1"
    told = lesson("2", "--build-arg", base, REPORTS_DIR=str(tmp_path))
    assert told.returncode == 1
    assert "Expected a build of model-api:distroless" in told.stderr
    assert "FROM ${BASE}" in told.stderr
    assert "Do: c" in told.stderr  # check the network, or correct the name
    assert "What was started has been stopped." in told.stderr
    assert "Traceback" not in told.stderr


@needs_docker
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give its rights away")
def test_the_lesson_run_by_nobody_is_refused_by_the_real_engine(
    docker: Engine, tmp_path: Path
):
    """nobody may read all files here, but not talk to the engine."""
    tmp_path.chmod(0o777)
    nobody = [program("setpriv"), "--reuid", "65534", "--regid", "65534"]
    nobody += ["--clear-groups", "--inh-caps", "+dac_read_search"]
    nobody += ["--ambient-caps", "+dac_read_search"]
    told = lesson("2", "--quick", REPORTS_DIR=str(tmp_path), before=nobody)
    assert told.returncode == 0, told.stderr
    assert "SKIPPED" in told.stdout
    assert "Expected the right to use the engine" in told.stdout
    assert "usermod -aG docker" in told.stdout


@needs_docker
def test_the_ladder_weighs_starts_and_asks_real_images(
    docker: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Without its naive rung, which takes minutes to build."""
    monkeypatch.setenv("REPORTS_DIR", str(tmp_path))
    rungs = [docker_deployment.RUNTIME, docker_deployment.DISTROLESS]
    monkeypatch.setattr(docker_deployment, "LADDER", rungs)
    run = Run(quick=True)
    try:
        docker_deployment.demo_ladder(run)
    finally:
        run.close()
    table = next(e for e in run.events if e["kind"] == "table")
    names = [column["name"] for column in table["columns"]]
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in table["rows"]}
    runtime, distroless = rows["runtime"], rows["distroless"]
    assert distroless["size"] <= 160  # MB
    assert distroless["gzipped"] <= 55
    assert distroless["size"] < runtime["size"]
    assert (distroless["shell"], runtime["shell"]) == (False, True)
    assert distroless["Python packages"] >= 20
    assert 5 < distroless["debs"] < runtime["debs"]
    for row in (runtime, distroless):
        assert min(row["cold start"], row["rebuild"], row["one caller"]) > 0
    assert not docker.has(f"{docker_deployment.DISTROLESS.tag}-changed")
    assert list(tmp_path.glob("*layers*.png"))


def running(docker: Engine, mark: str, **only: str) -> list[Any]:
    """Containers whose environment has this mark."""
    found = docker.client.containers.list(all=True, filters=only, ignore_removed=True)
    return [c for c in found if any(mark in x for x in c.attrs["Config"]["Env"])]


@needs_docker
@pytest.mark.parametrize("moment", ["in a build", "in a demo"])
def test_ctrl_c_takes_down_what_the_lesson_started(
    docker: Engine, image: str, composing: None, moment: str, tmp_path: Path
):
    mark = str(int(docker.run_id, 16) + 10**15)
    words, more = ["4", "--quick"], {"REQUESTS_PER_MINUTE": mark}
    if moment == "in a build":  # no wheels there: pip installs all of them anew
        words, more = ["2", "--build-arg", f"PIP_FIND_LINKS=/{mark}"], {}
    tags = {tag for image in docker.client.images.list() for tag in image.tags}
    begun = subprocess.Popen(
        [sys.executable, str(ROOT / "docker_deployment.py"), *words],
        env={**os.environ, **more, "REPORTS_DIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal sends Ctrl-C to the whole group
    )
    try:
        (box,) = process.wait_until(
            lambda: running(docker, mark, status="running"),
            120,
            "a container",
            every_s=0.1,
        )
        os.killpg(begun.pid, signal.SIGINT)
        _, said = begun.communicate(timeout=120)
    finally:
        begun.kill()
        begun.communicate()
    assert begun.returncode == 130
    assert "Interrupted; what was started has been stopped." in said
    assert "Traceback" not in said
    # That of a build is the engine's to end: it may take a moment.
    process.wait_until(lambda: not running(docker, mark), 60, "no container")
    stack = box.labels.get("com.docker.compose.project", mark)
    assert docker.having(f"com.docker.compose.project={stack}") == []
    made = [i for i in docker.client.images.list(all=True) if mark in str(i.history())]
    assert made == []  # no half-built image either
    assert {tag for i in docker.client.images.list() for tag in i.tags} <= tags


# -- failures, of demos and of tests


@needs_docker
def test_a_failing_demo_ends_in_words_with_everything_down(docker: Engine):
    @plainly
    def shown(run: Run) -> None:
        with docker.container(BASE, command=["python", "-c", "exit(3)"]) as box:
            box.wait_healthy(10)

    with pytest.raises(Failure, match="exit code 3"):  # and nothing left: `docker`
        shown(Run())


def test_a_demo_without_an_engine_is_a_skip():
    @plainly
    def shown(run: Run) -> None:
        raise NoEngine("nothing here", "start one")

    with pytest.raises(Skip, match="nothing here") as skipped:
        shown(Run())
    assert skipped.value.command == "start one"


FAILING = """
from pathlib import Path

def test_fails_half_way(docker, small):
    Path("run_id").write_text(docker.run_id)
    with docker.container(small):
        docker.client.networks.create("course-test", labels=docker.labels)
        docker.client.volumes.create("course-test", labels=docker.labels)
        docker.client.containers.create(small, labels=docker.labels).start()
        assert len(docker.leftovers()) == 4
        raise AssertionError("half-way")

def test_forgets(docker, small):
    docker.client.containers.create(small, labels=docker.labels).start()
"""


@needs_docker
def test_a_test_that_fails_half_way_leaves_nothing(docker: Engine, tmp_path: Path):
    (tmp_path / "test_failing.py").write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-p", "tests.container_fixtures"]
    command += ["-q", "--rootdir", str(tmp_path), "-c", os.devnull]
    told = subprocess.run(
        [*command, "-p", "no:cacheprovider", "test_failing.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == 1, told.stdout + told.stderr
    assert "AssertionError: half-way" in told.stdout
    # What either left is removed, and told as an error of its own.
    assert "1 failed, 1 passed, 2 errors" in told.stdout
    label = f"course.run={(tmp_path / 'run_id').read_text()}"
    assert docker.having(label) == []
