"""The model API in a container: small, fast to start, bounded, and proven so.

"Works on my machine" ends with the second machine. A container takes the machine along:
the same interpreter, packages and model wherever an engine runs. The usual one weighs a
gigabyte, installs everything again when a line of code changes, runs as root, and is
killed at night because nobody measured what the model needs. This file builds the image
that does none of that, and shows by its effects that each precaution holds.

You will see: what a Dockerfile can get wrong and what the model needs; what happens
when a setting or a secret is missing; three images of one service, weighed and started;
a stack that is crashed, starved, and stopped in mid-answer, which cuts no answer.

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
import math
import secrets
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import models
from course import lesson
from course.lesson import Run
from course.show import Table, number
from local_cloud.containers import compose, demo, engine, ladder, packages, trials
from local_cloud.containers.demo import hold, plainly
from local_cloud.containers.engine import Container, Engine, EngineError, NoEngine
from local_cloud.containers.ladder import Rung, built
from local_cloud.containers.trials import PORT, START_S, where_seen, wrong_start

ROOT = Path(__file__).resolve().parent
BYTES_PER_TOKEN = 46_080  # a row holds: keys and values of 30 layers, 192 floats each
MB, MIB = 1e6, 2**20  # sizes are told in MB; limits are set in MiB


NAIVE = Rung("naive", "deploy/naive.Dockerfile", None, slow=True)
RUNTIME = Rung("runtime", "Dockerfile", "runtime")
DISTROLESS = Rung("distroless", "Dockerfile", "distroless")
LADDER = [NAIVE, RUNTIME, DISTROLESS]
STRUCTURE = [ROOT / "deploy" / f"structure-test{x}.yaml" for x in ("", ".distroless")]


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
# model needs, idle and under load, then set limits with room above the peak. And count
# what no short test shows: each row may fill to its whole context, and so may each
# prompt that is kept for reuse. Such a container dies of its first busy day.


@dataclass(frozen=True)
class Limits:
    """What to allow one container."""

    memory_mib: int
    cpus: float
    pids: int


@dataclass(frozen=True)
class Place:
    """What a deployment may hold at once, and the memory that it is given."""

    rows: int
    context: int
    memory_mib: int | None

    @property
    def cache_bytes(self) -> int:
        """Keys and values, when every row and kept prompt is as long as can be."""
        return (self.rows + models.SHELF) * self.context * BYTES_PER_TOKEN

    @property
    def environment(self) -> dict[str, str]:
        return {"ROWS": str(self.rows), "CONTEXT": str(self.context)}

    @property
    def limits(self) -> dict[str, Any]:
        """For docker-py. No swap: that is slower than being restarted."""
        return dict.fromkeys(("mem_limit", "memswap_limit"), f"{self.memory_mib}m")


STACK = Place(rows=16, context=1024, memory_mib=2304)  # as docker-compose.yml says
SMALL = Place(rows=8, context=256, memory_mib=768)  # this lesson's containers
DEVICE = Place(rows=1, context=128, memory_mib=512)  # one caller, at the edge
CALLERS = (1, 8, 16, 32)  # measured: as many as any place below has rows
PLACES = {
    "by default": Place(rows=32, context=2048, memory_mib=None),
    "docker-compose.yml": STACK,
    "this lesson": SMALL,
    "edge": DEVICE,
}


def recommend(
    peak_bytes: int,
    place: Place,
    *,
    cpu_s_per_token: float,
    threads: int,
    rate: float,
) -> Limits:
    """Turns measured needs into limits with room: start generous, then scale down.

    Memory gets the peak of as many short answers as there are rows, a quarter more, and
    the whole cache: over its limit means killed. CPU gets what `rate` tokens a second
    cost: over its limit only means slower.
    """
    need = 1.25 * peak_bytes + place.cache_bytes
    cpus = math.ceil(cpu_s_per_token * rate * 10) / 10
    pids = 32 * math.ceil(2 * threads / 32)
    return Limits(64 * math.ceil(need / MIB / 64), cpus, pids)


@plainly
def demo_dockerfiles(run: Run) -> None:
    """Check both Dockerfiles; measure what the model needs; recommend limits."""
    run.table(demo.audit_table(NAIVE, DISTROLESS))
    demo.lint(run, NAIVE, DISTROLESS)
    if not Path("/proc/self/status").exists():
        run.skip("the profile reads /proc", "use Linux, or read docker stats")
        return
    run.predict("Most memory is there before the first caller; callers cost CPU.")
    rows, last = trials.profile(CALLERS)
    columns = ["state", ("resident", "MB"), ("peak", "MB"), "threads"]
    columns += [("tokens", ""), ("CPU per token", "ms")]
    run.table(Table("What the API needs (a plain process)", columns, rows))
    run.table(limits_table(rows, last.threads))
    run.conclude(
        f"{rows[0][1] / rows[-1][1]:.0%} of the memory is taken before the first "
        f"caller. A token costs {rows[1][5] / rows[-1][5]:.1f} times less CPU among 32 "
        f"callers than alone. What nobody sees in a short test is the cache, once full."
    )


def limits_table(profile: list[list[Any]], threads: int) -> Table:
    """The limits that follow from the profile for each deployment."""
    measured: dict[int, list[Any]] = dict(zip(CALLERS, profile[1:], strict=True))
    rows = []
    for name, place in PLACES.items():
        _, _, peak, _, _, cost_ms = measured[place.rows]
        limits = recommend(
            int(peak * MB),
            place,
            cpu_s_per_token=cost_ms / 1000,
            threads=threads,
            rate=100,
        )
        held = [place.rows, place.context, peak, place.cache_bytes / MB]
        follows = [limits.memory_mib, place.memory_mib, limits.cpus, limits.pids]
        rows.append([name, *held, *follows])
    columns = ["deployment", ("rows", ""), ("context", "tokens"), ("peak", "MB")]
    columns += [("full cache", "MB"), ("memory follows", "MiB"), ("is set", "MiB")]
    columns += [("CPUs follow", ""), ("pids follow", "")]
    note = (
        f"memory: 1.25 x peak + (rows + {models.SHELF} kept prompts) x context x "
        f"{BYTES_PER_TOKEN:,} bytes; CPUs: for 100 tokens/s; pids: twice the threads"
    )
    return Table("Limits that follow", columns, rows, note)


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


@plainly
def demo_settings(run: Run) -> None:
    """Look into the locks; start real containers with wrong settings, then right."""
    columns = ["lock", ("packages", ""), ("hashes", ""), ("without a hash", "")]
    rows = [packages.lock_row(ROOT / name) for name in LOCKS]
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
    turns = 1 if run.quick else 3
    images = {rung.tag: ladder.measure(run, docker, rung, turns) for rung in LADDER}
    with run.progress("starting", total=turns * len(LADDER)) as advance:
        outside_s = ladder.start_in_turns(docker, images, turns, advance)
    names = {rung.name: images[rung.tag] for rung in LADDER}
    columns = ["image", ("size", "MB"), ("gzipped", "MB"), ("rebuild", "s")]
    columns += [("cold start", "s"), ("one caller", "tokens/s")]
    columns += [("debs", ""), ("Python packages", ""), "shell"]
    rows = [measured.row(name) for name, measured in names.items()]
    outside = median(rate for image in images.values() for rate in image.outside)
    rows.append(["no container", *[None] * 3, outside_s, outside, *[None] * 3])
    note = (
        f"sizes without the model; rebuild after one line of code and start: median, "
        f"n = {turns}; tokens/s: n = {turns * ladder.PAIRS}; naive's rebuild (n = 1): "
        "measured when its image was new"
    )
    run.table(Table("One service, three images", columns, rows, note))
    weights = {name: measured.weight for name, measured in names.items()}
    run.picture(partial(ladder.draw_layers, weights), "layers", size=(10, 4.2))
    smallest = images[LADDER[-1].tag]
    run.fact("the model in each image", smallest.weight.model_bytes / MB, "MB")
    run.fact("tokens/s in the smallest image, of those outside", smallest.share)
    first, last = rows[0], rows[len(LADDER) - 1]
    hold_ladder(run, first, last, smallest.share)
    demo.look_inside(run, docker, LADDER[-1], STRUCTURE)
    run.conclude(
        f"The smallest image has {last[1] / first[1]:.0%} of the naive one's size and "
        f"{last[2] / first[2]:.0%} of what a registry sends, starts in {last[4]:.2f} s "
        f"where naive takes {first[4]:.2f} s, and is rebuilt after a change of code in "
        f"{last[3]:.1f} s where naive takes {first[3]:.1f} s."
    )


def hold_ladder(run: Run, first: list[Any], last: list[Any], share: float) -> None:
    """What must hold of the smallest image, beside the first one and the outside."""
    size, zipped, rebuild_s, start_s = last[1:5]
    hold(run, "application, without the model", "160 MB", size, "MB", size <= 160)
    hold(run, "the same, gzipped", "55 MB", zipped, "MB", zipped <= 55)
    hold(run, "rebuild after a change of code", "1 s", rebuild_s, "s", rebuild_s <= 1)
    bar = f"naive's {number(first[4])} s"
    hold(run, "cold start", bar, start_s, "s", start_s <= first[4])
    hold(run, "tokens/s, of those outside", "at least 0.95", share, "", share >= 0.95)


def engine_of(run: Run) -> Engine:
    """The engine, one for all sections; all it started ends with the lesson."""
    return run.keep("engine", engine.connect)


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
    **SMALL.limits,
}
OPEN: dict[str, Any] = {"user": "0:0"}  # how most containers run
EDGE: dict[str, Any] = {**HARDENED, **DEVICE.limits, "nano_cpus": 500_000_000}
STARVED: dict[str, Any] = {**HARDENED, "mem_limit": "96m", "memswap_limit": "96m"}
# What a short test suggests: one caller's 0.3 GB, and a quarter more.
GUESSED: dict[str, Any] = {**HARDENED, "mem_limit": "384m", "memswap_limit": "384m"}
TOO_LITTLE = {  # to start; and enough to start, but not for what may come
    f"{STARVED['mem_limit']} of memory": (STARVED, SMALL),
    f"{GUESSED['mem_limit']}, after a short test": (GUESSED, PLACES["by default"]),
}
NO_DRAIN = {"DRAIN_SECONDS": "0"}  # nobody balances here: no need to wait for it


def serving(key: str, place: Place) -> dict[str, Any]:
    """Options of a container that serves as much as fits the place."""
    # The target: who fills a server on purpose would else be sent away, rightly.
    more = {"API_KEYS": key, "DRAIN_SECONDS": "1", "TTFT_TARGET_MS": "60000"}
    return {"environment": {**more, **place.environment}, "port": PORT}


@plainly
def demo_compose(run: Run) -> None:
    """Rehearse a stack's life: up, asked, crashed, starved, broken into, stopped."""
    docker = engine_of(run)
    image = built(run, docker, DISTROLESS)
    key = secrets.token_urlsafe(32)
    run.predict("Whatever ends a container, nothing is left; no stop cuts an answer.")
    stack_life(run, docker, key)
    days, at_work = [], []
    for name, (options, place) in TOO_LITTLE.items():
        starved = {**serving(key, place), **options}
        days.append([name, *trials.endure(docker, image, key, starved)])
    with docker.container(image, **serving(key, SMALL), **HARDENED) as box:
        at_work.append(["all cores", SMALL.memory_mib, *trials.work(box, key)])
        healthy_s = box.wait_healthy(START_S)
        hold(run, "healthy after its start", "3 s", healthy_s, "s", healthy_s <= 3)
        break_in(run, docker, image, box, key)
        days += full_then_stopped(run, box, key)
    columns = ["what happened", ("exit code", ""), ("took", "s"), "found"]
    run.table(Table("Bad days", columns, days))
    with docker.container(image, **serving(key, DEVICE), **EDGE) as box:
        at_work.append(["half a core", DEVICE.memory_mib, *trials.work(box, key)])
    edge(run, at_work)
    left = docker.leftovers()
    hold(run, "left behind", "nothing", len(left), "things", not left)
    bars = demo.bars(run)
    run.table(Table("Must hold", ["what", "bar", "measured", "holds"], bars))
    run.conclude(
        f"{sum(bar[3] for bar in bars)} of {len(bars)} bars hold. Containers, networks "
        f"and volumes left behind: {len(left)}."
    )


def stack_life(run: Run, docker: Engine, key: str) -> None:
    """Compose from up to down, with a crash in between."""
    try:
        compose.find()
    except NoEngine as missing:
        run.skip(missing.reason, missing.command)
        return
    over = {"image": DISTROLESS.tag, "environment": NO_DRAIN}
    rows, left = trials.rehearse(docker, ROOT / "docker-compose.yml", over, key)
    hold(run, "left behind by Compose", "nothing", left, "things", not left)
    run.table(Table("Compose", ["event", ("took", "s"), "found"], rows))


def full_then_stopped(run: Run, box: Container, key: str) -> list[list[Any]]:
    """All the memory it can ever need, within its limit; then SIGTERM in mid-answer."""
    start = time.perf_counter()
    trials.fill(box.url, key, SMALL.rows, SMALL.context)
    took, used = time.perf_counter() - start, box.stats().memory_bytes / MIB
    alive = box.state["Status"] == "running"
    end = trials.drain(box, key, partial(box.made.stop, timeout=30))
    bar = f"runs on, in {SMALL.memory_mib} MiB"
    hold(run, "every row and kept prompt full", bar, used, "MiB", alive)
    hold(run, "an answer, stopped in the middle", "whole", end.how, "", end.whole)
    found = f"answer {end.how}: {end.before} pieces before the stop, {end.after} after"
    return [
        ["every row and kept prompt full", None, took, f"it holds {used:.0f} MiB"],
        ["SIGTERM in mid-answer", end.exit_code, end.seconds, found],
    ]


def break_in(run: Run, docker: Engine, image: str, box: Container, key: str) -> None:
    """Try from inside what an intruder would, with and without the precautions."""
    with docker.container(image, **serving(key, SMALL), **OPEN) as open_box:
        plain, hardened = trials.attack(open_box), trials.attack(box)
    rows = [[name, plain[name], hardened[name]] for name in plain]
    who = [
        trials.borrow_root(docker, image, *x) for x in ([], HARDENED["security_opt"])
    ]
    rows.append(["become root through a root's program", *who])
    columns = ["an intruder tries to", "as root, no limits", "hardened"]
    run.table(Table("What holds", columns, rows))
    refused = sum("refused" in row[2] for row in rows)
    hold(run, "what an intruder tries, refused", "5", refused, "", refused >= 5)


def edge(run: Run, rows: list[list[Any]]) -> None:
    """The same image where there is little: half a core and 512 MB; and on ARM."""
    columns = ["cores", ("memory limit", "MiB"), ("cold start", "s")]
    columns += [("one caller", "tokens/s"), ("CPU taken", "cores")]
    columns += [("memory", "MiB"), ("tasks", "")]
    run.table(Table("At the edge", columns, rows))
    cores = rows[-1][4]
    hold(run, "CPU taken, of half a core", "0.5 cores", cores, "cores", cores <= 0.51)
    kinds = packages.on_arm()
    columns = ["wheel", ("packages", ""), "such as"]
    note = f"looked up {packages.looked_up()}; again: {packages.REFRESH}"
    found = [[kind, len(x), ", ".join(x[-3:]) or None] for kind, x in kinds.items()]
    run.table(Table("The locked packages on arm64", columns, found, note))


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
