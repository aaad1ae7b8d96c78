"""The machinery of containers: checks without an engine, the rest with a real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from course import process
from local_cloud.containers import compose, engine, layers, packages
from local_cloud.containers.engine import (
    Container,
    ContainerError,
    Engine,
    ImageError,
    NoEngine,
)
from tests.container_fixtures import BASE, attempt

ROOT = Path(__file__).parent.parent
NOBODY = 65534
needs_docker = pytest.mark.docker


# -- what the engine says, read without one


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
    assert packages.lock_row(lock) == ["some.lock", 2, 2, 1]


# -- no engine, or no right to use one


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
            box.wait_exit(60)
            assert box.logs() == "['serve.py']"  # classic builders drop the rest
        with docker.container(
            "course-test:all", command=["python", "/all/serve.py"]
        ) as box:
            box.wait_exit(60)
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
def test_a_step_that_fills_its_disk_says_so(docker: Engine, folder: Path):
    """A builder's /dev/shm is a real disk of 64 MB, and nobody else's."""
    fill = "open('/dev/shm/all', 'wb').write(bytes(1 << 27))"
    (folder / "Dockerfile").write_text(f'FROM {BASE}\nRUN python -c "{fill}"\n')
    said = attempt(docker, "course-test:x", folder)
    assert "No space left on device" in said
    assert not docker.has("course-test:x")


@needs_docker
def test_an_engine_whose_disk_is_full(docker: Engine):
    """A volume of 1 MB stands for the engine's disk: what fills it is the engine."""
    name = f"course-test-{docker.run_id}"
    small_disk = {"type": "tmpfs", "device": "tmpfs", "o": "size=1m"}
    volume = docker.client.volumes.create(
        name, driver="local", driver_opts=small_disk, labels=docker.labels
    )
    where = {name: {"bind": "/usr/local/lib", "mode": "rw"}}  # it is filled from there
    try:
        with (
            pytest.raises(ContainerError, match="no space left on device") as full,
            docker.container(BASE, volumes=where),
        ):
            pass
        assert "docker_deployment.py --clean" in str(full.value).partition("Do: ")[2]
        assert docker.leftovers() == [name]  # no container
    finally:
        volume.remove(force=True)


@needs_docker
def test_what_is_cleaned_is_told_by_its_label_alone(
    docker: Engine,
    folder: Path,
    small: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
):
    theirs = ["course-test:theirs", f"course-test-theirs-{docker.run_id}"]
    docker.client.images.get(BASE).tag(*theirs[0].split(":"))
    request.addfinalizer(lambda: docker.untag(theirs[0]))
    with docker.container(small, name=theirs[1]):
        # Another course's label, so that no image of ours is lost to a test.
        monkeypatch.setattr(engine, "COURSE", f"test-{docker.run_id}")
        with engine.connect() as other:
            (folder / "serve.py").write_text("print(1)")
            other.build("course-test:ours", folder=folder)
            network = other.client.networks.create("course-test", labels=other.labels)
            with other.container("course-test:ours") as box:
                gone = other.clean()
        assert {"course-test:ours", box.made.name, network.name} <= set(gone)
        assert not set(theirs) & set(gone)
        assert not docker.has("course-test:ours")
        assert docker.having(f"{engine.LABEL}={engine.COURSE}") == []
        assert docker.leftovers() == [theirs[1]]
        assert docker.has(theirs[0])
        assert docker.has(small)
        assert docker.has(BASE)


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
        assert box.wait_healthy(60) > 0
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
    words = r"healthy within 0\.1 s, found it running"
    with docker.container(small, command=deaf) as box:
        process.wait_until(box.logs, 60, "a word of it")
        with pytest.raises(ContainerError, match=words) as late:
            box.wait_healthy(0.1)
    assert "not serving" in str(late.value)
    assert "health " in str(late.value)


@needs_docker
def test_a_container_that_ends_instead(docker: Engine, small: str):
    rude = ["python", "-c", "import sys; sys.exit('no such setting')"]
    with (
        pytest.raises(ContainerError, match="exit code 1") as ended,
        docker.container(small, port=8000, command=rude) as box,
    ):
        box.wait_ready("/", 60)
    assert "no such setting" in str(ended.value)


@needs_docker
def test_more_memory_than_the_limit_is_told_as_such(docker: Engine, small: str):
    greedy = ["python", "-c", "x = bytearray(200 << 20)"]
    limits: dict[str, Any] = {"mem_limit": "32m", "memswap_limit": "32m"}
    with docker.container(small, command=greedy, **limits) as box:
        assert box.wait_exit(60) == 137
        assert box.state["OOMKilled"]
        with pytest.raises(
            ContainerError, match=r"killed \(137\) for using more memory"
        ):
            box.wait_healthy(1)


@needs_docker
def test_a_share_of_a_cpu_is_counted_by_the_kernel(docker: Engine, small: str):
    # So small a share that a busy machine gives more, and the quota has work to do.
    busy = ["python", "-c", "while True: pass"]
    with docker.container(small, command=busy, nano_cpus=50_000_000) as box:
        throttled = process.wait_until(
            lambda: box.stats().throttled_periods, 60, "throttled periods"
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
        running.communicate(timeout=60)
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


# -- Compose


@needs_docker
@pytest.mark.usefixtures("composing")
def test_compose_takes_down_what_failed_to_come_up(
    docker: Engine, small: str, tmp_path: Path
):
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
        stack.up(90)
    assert docker.having(stack.label) == []


@needs_docker
@pytest.mark.usefixtures("composing")
def test_compose_from_up_to_down(docker: Engine, small: str, tmp_path: Path):
    file = tmp_path / "compose.yml"
    service = {"image": small, "ports": ["127.0.0.1::8000"]}
    file.write_text(json.dumps({"services": {"api": service}}))
    with compose.project(docker, file) as stack:
        assert stack.up(90) > 0
        box = stack.container("api", 8000)
        assert isinstance(box, Container)
        assert process.answers(box.url)
        with pytest.raises(ContainerError, match="service web, found none"):
            stack.container("web")
    assert docker.having(stack.label) == []


@needs_docker
@pytest.mark.usefixtures("composing")
def test_compose_finds_its_port_in_use(docker: Engine, small: str, tmp_path: Path):
    file = tmp_path / "compose.yml"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [f"127.0.0.1:{taken.getsockname()[1]}:8000"]
        file.write_text(
            json.dumps({"services": {"api": {"image": small, "ports": ports}}})
        )
        with (
            pytest.raises(ContainerError, match=r"already (allocated|in use)"),
            compose.project(docker, file) as stack,
        ):
            stack.up(90)
    assert docker.having(stack.label) == []
