"""Grades exercise 1: by the Dockerfile's text, by effects, and on a real engine."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from exercises.catalogue import ROOT
from local_cloud.containers import dockerfile, engine, trials
from local_cloud.containers.engine import Container, Engine, EngineError
from tests.graders.plugin import Call, Failed, Submission, points

MIB = 2**20
PORT, USER = 9000, 20001
SHARE = 0.75  # of the naive image's size that is allowed
CONTEXT_MB = 50  # what the build may get; the sources it needs have less than one
READY_S = 90.0


# -- 1a in its text


def parsed(submission: Submission) -> tuple[Call, dockerfile.Dockerfile]:
    found = submission.call("dockerfile")
    found.must(isinstance(found.value, str), "a text", "a Dockerfile is one")
    try:
        return found, dockerfile.parse(found.value)
    except dockerfile.DockerfileError as error:
        raise Failed(
            f"called {found.text}, expected a Dockerfile because an engine is to read "
            f"it, got {error}"
        ) from None


def audited(submission: Submission, *names: str) -> None:
    """Claims that these checks of the course's own audit find nothing.

    Whatever is not there breaks no rule, so first something must be there.
    """
    found, file = parsed(submission)
    because, got = "without them there is nothing to judge", "none"
    packed = file.inside(None, "COPY", "ADD") and file.inside(None, "CMD", "ENTRYPOINT")
    found.must(packed, "a COPY and a CMD, or an ENTRYPOINT, that run", because, got)
    ignore = "*"  # what the ignore file does is checked apart
    for finding in dockerfile.audit(file, None, ignore):
        if finding.check in names:
            expected = f'a file that keeps the rule "{finding.check}"'
            found.must(finding.good, expected, finding.why, got=finding.place)


@points(1, hint="A name must be looked up in the image; the box compares numbers.")
def check_runs_as_the_number(submission: Submission) -> None:
    """The container runs as user 20001, given as a number."""
    found, file = parsed(submission)
    users = [i.rest for i in file.inside(None, "USER")] or ["none (root)"]
    because = "the box lets nobody else run, and can verify only a number"
    found.must(
        users[-1].partition(":")[0] == str(USER), f"USER {USER}", because, users[-1]
    )


@points(1, hint='CMD ["python", "-m", ...] is exec form; a bare line is run by sh.')
def check_starts_in_exec_form(submission: Submission) -> None:
    """Python is process 1 and serves on port 9000."""
    audited(submission, "starts in exec form")
    found, file = parsed(submission)
    start = " ".join(i.rest for i in file.inside(None, "CMD", "ENTRYPOINT", "ENV"))
    because = "the box asks there, and reaches no server that listens on loopback"
    right = str(PORT) in start and "0.0.0.0" in start
    found.must(right, f"a start on 0.0.0.0 and port {PORT}", because, got=start)


@points(1, hint="HEALTHCHECK has a CMD of its own; the lesson's probe reads PORT.")
def check_has_a_healthcheck(submission: Submission) -> None:
    """The image says how to ask whether it is healthy."""
    audited(submission, "has a HEALTHCHECK")


@points(2, hint="Copy the lock alone, install, and copy the code after that.")
def check_packages_before_code(submission: Submission) -> None:
    """Packages come before code, from a lock with hashes, and leave no cache."""
    found, file = parsed(submission)
    steps = " ".join(step.rest for step in file.everywhere("RUN"))
    because = "the API imports packages that no base brings along"
    installs = re.search(r"\bpip\d? .*\b(install|sync)\b", steps)
    found.must(installs, "a RUN that installs packages", because, got="none")
    names = ("packages before code", "packages by hash", "pip keeps no cache")
    audited(submission, *names)


@points(2, hint="COPY --from takes the results of a stage and leaves its tools.")
def check_runs_without_build_tools(submission: Submission) -> None:
    """The stage that runs installs nothing, and every COPY names what it takes."""
    audited(submission, "the image that runs builds nothing", "copies what it names")
    found, file = parsed(submission)
    taken = [step for step in file.inside(None, "COPY") if of_stage(step)]
    because = "packages and model are made in a stage whose tools nobody runs"
    found.must(taken, "a COPY --from of another stage", because, got="none")


@points(1, hint="Nothing can be compiled on a read-only root: when else can it?")
def check_starts_fast_and_quietly(submission: Submission) -> None:
    """Bytecode is made in the build, and the runtime reports to nobody."""
    names = "bytecode is made in the build", "the runtime's telemetry is off"
    audited(submission, *names)


@points(1, hint="Run hadolint on it too; a secret comes at run time, as a file.")
def check_builds_anywhere_tomorrow(submission: Submission) -> None:
    """Bases have tags, no secret is baked in, and any builder can build it."""
    audited(
        submission,
        "bases have a tag that stays",
        "no secrets in ENV or ARG",
        "builds with any builder",
        "apt leaves nothing behind",
    )


def of_stage(step: dockerfile.Instruction) -> bool:
    """Whether it copies from another stage, and not from the build's folder."""
    return any(flag.startswith("--from") for flag in step.flags)


# -- 1b by its effect


FORBIDDEN = (
    ".env",
    ".git/config",
    "secrets/api_keys",
    "models/build/model.onnx",
    "models/__pycache__/engine.cpython-311.pyc",
    "notes-of-tomorrow/customers.csv",
)
EVERYTHING = {".", ""}  # sources that mean the whole folder
NOT_COPIED = {"build", "__pycache__"}  # made here; the ignore file keeps them out


def let_in(submission: Submission, folder: Path) -> tuple[Call, set[str]]:
    """What the ignore file lets into a build in a folder."""
    from docker.utils.build import exclude_paths

    found = submission.call("dockerignore")
    found.must(isinstance(found.value, str), "a text", "a .dockerignore is one")
    lines = [x.strip() for x in found.value.splitlines()]
    patterns = [x for x in lines if x and not x.startswith("#")]
    return found, set(exclude_paths(str(folder), patterns))


def copied(file: dockerfile.Dockerfile) -> list[str]:
    """The sources of all COPY and ADD that read the build's folder."""
    sources: list[str] = []
    for step in file.everywhere("COPY", "ADD"):
        if not of_stage(step):
            words = json.loads(step.rest) if step.exec_form else step.rest.split()
            sources += words[:-1]
    return [source.removeprefix("./").rstrip("/") for source in sources]


def sources(folder: Path) -> Iterator[Path]:
    """The files of the repository that an image of the API may be made of."""
    top = (path for path in folder.glob("*") if path.is_file())
    below = (
        path
        for name in ("course", "models", "serving", "deploy")
        for path in (folder / name).rglob("*")
        if path.is_file()
        and not NOT_COPIED.intersection(path.relative_to(folder).parts)
    )
    yield from (path for path in (*top, *below) if not path.name.startswith("."))


@points(2, hint="A list of what is forbidden never knows of tomorrow's folder.")
def check_ignore_keeps_out(submission: Submission, tmp_path: Path) -> None:
    """Secrets, history, built files and what nobody foresaw stay out of the build."""
    for name in FORBIDDEN:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found, entered = let_in(submission, tmp_path)
    leaked = sorted(entered & set(FORBIDDEN))
    because = "whoever has an image can read all that entered its build"
    found.must(not leaked, f"none of {len(FORBIDDEN)} such files", because, got=leaked)


@points(1, hint="Each source of a COPY needs a line with an exclamation mark.")
def check_ignore_lets_in(submission: Submission) -> None:
    """All that the Dockerfile copies may enter the build."""
    _, file = parsed(submission)
    found, entered = let_in(submission, ROOT)
    here = [path.relative_to(ROOT).as_posix() for path in sources(ROOT)]
    wanted = {source: matching(source, here) for source in copied(file)}
    because = "an image of the API is made of this repository"
    taken = any(wanted.values()) and entered.intersection(here)
    found.must(taken, "a file to be copied and to get in", because, got="none")
    for source, names in wanted.items():
        because = f"the Dockerfile copies {source}"
        optional = "*" in source  # of what may be there
        found.must(names or optional, f"a file {source}", because, got="none here")
        missing = sorted(names - entered)
        # "COPY ." takes what gets in, whatever that is.
        whole = not missing or source in EVERYTHING
        expected, got = f"all of {source} to get in", f"a build without {missing}"
        found.must(whole, expected, because, got=got)


def matching(source: str, here: Iterable[str]) -> set[str]:
    """What a COPY needs: the files that it names, of a folder its Python files."""
    if source in EVERYTHING:
        return set(here)
    depth = source.count("/") + 1
    return {
        name
        for name in here
        if fnmatch.fnmatch("/".join(name.split("/")[:depth]), source)
        and (name.count("/") < depth or name.endswith(".py"))
    }


# -- 2: limits by arithmetic


def need(submission: Submission, **other: Any) -> Any:
    """A `Need` of the submission's own kind, with other numbers than the example's."""
    values = {
        "peak_bytes": 512_000_000,
        "bytes_per_token": 10_000,
        "kept_prompts": 4,
        "threads": 20,
        "cpu_s_per_token": 0.008,
    }
    return submission.call("Need", **{**values, **other}).value


@points(2, hint="Kept prompts fill to the whole context as well, and come first.")
def check_most_rows_fill_the_memory(submission: Submission) -> None:
    """As many rows as fit when everything is full, and not one more."""
    of_row = 1000 * 10_000
    for spare, rows in ((0, 7), (of_row - 1, 7), (of_row, 8)):
        memory = 640_000_000 + (7 + 4) * of_row + spare
        found = submission.call("most_rows", need(submission), 1000, memory)
        because = (
            f"1.25 x peak and ({rows} rows + 4 kept prompts) x 1000 tokens x 10,000 "
            f"bytes fit into {memory:,} bytes, and one row more does not"
        )
        found.equals(rows, because)


@points(1, hint="Zero rows is no service: say so before it is deployed.")
def check_most_rows_refuse_too_little(submission: Submission) -> None:
    """A box that cannot hold one row is refused."""
    short_by_one = 640_000_000 + 5 * 1000 * 10_000 - 1
    because = "the first row does not fit, and a container would be killed by it"
    call = ("most_rows", need(submission), 1000, short_by_one)
    submission.refuses(ValueError, *call, because=because)


def bounded(submission: Submission) -> Call:
    found = submission.call("limits", need(submission), 6, 1000, 90.0)
    found.must(isinstance(found.value, dict), "a dict", "docker-py takes options")
    return found


def option(found: Call, name: str) -> Any:
    expected = f"the option {name}"
    found.must(name in found.value, expected, "the exercise asks for it")
    return found.value[name]


@points(1, hint="Swap is memory plus swap in Docker's terms: equal means none.")
def check_memory_is_bounded(submission: Submission) -> None:
    """Memory follows from the need, and there is no swap."""
    from docker.utils import parse_bytes

    found = bounded(submission)
    least = 640_000_000 + (6 + 4) * 1000 * 10_000
    got = parse_bytes(option(found, "mem_limit"))
    expected = f"mem_limit from {least:,} to {least + 64 * MIB:,}"
    because = "1.25 x peak and the whole cache must fit; more is taken from others"
    found.must(least <= got <= least + 64 * MIB, expected, because, got=got)
    swap = parse_bytes(option(found, "memswap_limit"))
    because = "a model that swaps answers nobody in time; a restart is faster"
    found.must(swap == got, f"memswap_limit {got:,}", because, got=swap)


@points(1, hint="CPU seconds a token times tokens a second are CPUs.")
def check_cpu_and_processes_are_bounded(submission: Submission) -> None:
    """CPU follows from the rate, processes from the threads."""
    found = bounded(submission)
    cpus = option(found, "nano_cpus") / 1e9
    because = "90 tokens a second at 0.008 CPU seconds each are 0.72 CPUs"
    found.must(0.72 <= cpus <= 0.82 + 1e-9, "0.72 to 0.82 CPUs", because, got=cpus)
    pids = option(found, "pids_limit")
    because = "20 threads run, an exec or two comes along, a fork bomb must not"
    found.must(40 <= pids <= 112, "pids_limit from 40 to 112", because, got=pids)


@points(1, hint="Four options; the API itself writes nothing but temporary files.")
def check_may_do_nothing_else(submission: Submission) -> None:
    """Read-only root with a tmpfs, no capabilities, no new privileges."""
    found = bounded(submission)
    told = {
        "read_only": option(found, "read_only") is True,
        "tmpfs": "/tmp" in option(found, "tmpfs"),
        "cap_drop": [x.upper() for x in option(found, "cap_drop")] == ["ALL"],
        "security_opt": any(
            x.startswith("no-new-privileges") and not x.endswith("false")
            for x in option(found, "security_opt")
        ),
    }
    for name, good in told.items():
        because = "whoever breaks into the API should find nothing to go on with"
        found.must(good, f"{name} closed", because, got=found.value[name])


# -- on an engine


@dataclass(frozen=True)
class Built:
    """The learner's image on the engine, or why there is none."""

    docker: Engine
    tag: str
    call: Call
    problem: str = ""


@pytest.fixture(scope="session")
def built(
    submission: Submission, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Built]:
    """Builds the image in a folder that holds what the ignore file lets in.

    It stays, as the lessons' images do, until `python docker_deployment.py --clean`:
    so the next check has nothing to build but what was changed.
    """
    call, _ = parsed(submission)
    ignore, entered = let_in(submission, ROOT)
    digest = hashlib.sha256(f"{call.value}\0{ignore.value}".encode()).hexdigest()
    folder, tag = tmp_path_factory.mktemp("context"), f"exercise-1:{digest[:12]}"
    gather(ignore, entered, folder)
    (folder / "Dockerfile").write_text(call.value)
    (folder / ".dockerignore").write_text(ignore.value)
    with engine.connect() as docker:
        try:
            docker.build(tag, folder=folder)
            yield Built(docker, tag, call)
        except EngineError as error:
            yield Built(docker, tag, call, str(error))


def gather(ignore: Call, names: set[str], folder: Path) -> None:
    """Copies what may enter the build; a context that is too large is refused."""
    files = [name for name in sorted(names) if (ROOT / name).is_file()]
    size_mb = sum((ROOT / name).stat().st_size for name in files) / 1e6
    because = "all of it is sent and hashed before the first step"
    expected = f"a build of at most {CONTEXT_MB} MB"
    ignore.must(size_mb <= CONTEXT_MB, expected, because, got=f"{size_mb:.0f} MB")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def image_of(built: Built) -> Any:
    because = "the other checks run it"
    built.call.must(not built.problem, "an image", because, got=built.problem)
    return built.docker.image(built.tag)


@points(
    3,
    hint="docker history shows which layer is heavy.",
    needs="docker",
    slow=True,
    limit_s=560,
)
def check_beats_the_naive_image(running: Container, built: Built) -> None:
    """It serves, and has at most 75 % of the naive image's size."""
    image = image_of(built)
    if not built.docker.has("model-api:naive"):
        built.docker.build("model-api:naive", dockerfile="deploy/naive.Dockerfile")
    naive = built.docker.image("model-api:naive").attrs["Size"] / 1e6
    mine = image.attrs["Size"] / 1e6
    because = f"the naive one has {naive:.0f} MB, and what it has more serves nobody"
    most = math.floor(SHARE * naive)
    built.call.must(mine <= most, f"at most {most} MB", because, got=f"{mine:.0f} MB")


@pytest.fixture(scope="session")
def running(built: Built, submission: Submission) -> Iterator[Container]:
    """The learner's container under the learner's limits."""
    image_of(built)
    measured = submission.module.MEASURED
    options = submission.call("limits", measured, 8, 256, 200.0)
    env = {"ROWS": "8", "CONTEXT": "256", "ALLOW_ANONYMOUS": "1"}
    try:
        with built.docker.container(
            built.tag, port=PORT, environment=env, **options.value
        ) as box:
            box.wait_healthy(READY_S)
            box.wait_ready(trials.READY, READY_S)
            yield box
    except (EngineError, TypeError) as error:
        raise Failed(
            f"called {options.text} and started the image with it, expected a healthy "
            f"container because the model fits these limits, got {error}"
        ) from None


@points(
    2, hint="docker logs shows its last words.", needs="docker", slow=True, limit_s=120
)
def check_serves_within_its_limits(running: Container, built: Built) -> None:
    """Under its limits it becomes healthy and answers a chat on port 9000."""
    try:
        trials.ask(running.url, "none", tokens=8)
        error = ""
    except RuntimeError as refused:
        error = str(refused)
    because = "healthy means able to answer"
    built.call.must(not error, "an answer to a chat", because, got=error)


@points(
    1,
    hint="The engine's view: docker inspect, HostConfig.",
    needs="docker",
    slow=True,
    limit_s=120,
)
def check_limits_hold_inside(running: Container, built: Built) -> None:
    """Inside, the user is 20001, the root cannot be written, memory is bounded."""
    because = "limits count by their effect, not by their text"
    user = running.run("python", "-c", "import os; print(os.getuid())")[1]
    built.call.must(user == str(USER), f"user {USER} inside", because, got=user)
    status, said = running.run("python", "-c", "open('/var/x', 'w')")
    read_only = status != 0 and "Read-only file system" in said
    expected = "a refused write to a read-only root"
    built.call.must(read_only, expected, because, got=f"exit {status}: {said[-90:]}")
    host = running.inspect()["HostConfig"]
    bounded = 0 < host["Memory"] == host["MemorySwap"]
    got = f"{host['Memory']}, with swap {host['MemorySwap']}"
    built.call.must(bounded, "a bounded memory without swap", because, got=got)


@points(
    1,
    hint="It must fail when nobody listens.",
    needs="docker",
    slow=True,
    limit_s=60,
)
def check_probe_notices_silence(built: Built) -> None:
    """Where nothing serves, its HEALTHCHECK fails."""
    probe = image_of(built).attrs["Config"].get("Healthcheck", {}).get("Test", [])
    because = "a probe that cannot fail tells nothing"
    built.call.must(len(probe) > 1, "a HEALTHCHECK", because, got=probe)
    words = ["/bin/sh", "-c", *probe[1:]] if probe[0] == "CMD-SHELL" else probe[1:]
    idle = ["-c", "import time; time.sleep(50)"]
    with built.docker.container(built.tag, entrypoint="python", command=idle) as box:
        status, said = box.run(*words)
    expected = "a HEALTHCHECK that fails in a container where nothing serves"
    missing = status in (126, 127)  # it fails because it cannot even be run
    got = f"exit status {status}: {said[:200]}"
    built.call.must(status != 0 and not missing, expected, because, got=got)
