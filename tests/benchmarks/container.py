"""The API in its container, beside the same API without one and beside other images.

Four tables, each beside its bar: tokens a second inside the distroless container and
outside it, on the same CPUs; the cold start of the three images; a rebuild after one
line of code; and how long until the engine calls the container healthy. Whoever is
compared takes turns, and who begins changes with every turn; a server whose turn it is
not is stopped.

Run it:     python -m tests.benchmarks.container [--turns N] [--quick]
                        three minutes, and one more to build the images at first
Needs:      a Docker engine
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from signal import SIGCONT, SIGSTOP
from typing import Any

import docker_deployment
from course import lesson, process
from course.lesson import Run
from course.measure import Paired, Series
from course.show import Cell, Table
from docker_deployment import DISTROLESS, LADDER, NAIVE
from local_cloud.containers import ladder, trials
from local_cloud.containers.engine import Engine
from local_cloud.containers.ladder import Rung
from local_cloud.containers.trials import PORT, READY
from tests.benchmarks import AFTER_LESSONS
from tests.benchmarks.client import ask
from tests.benchmarks.prompts import request
from tests.benchmarks.servers import Server
from tests.benchmarks.turns import ROOT, Bystanders

TURNS, QUICK_TURNS = 9, 3
CALLERS, TOKENS = 4, 256
CPUS = 2
RATIO_BAR, REBUILD_BAR_S, HEALTHY_BAR_S = 0.95, 1.0, 3.0
START_S = 120.0  # a deadline
SETTINGS = {
    "DRAIN_SECONDS": "0",
    "REQUESTS_PER_MINUTE": "0",
    "TOKENS_PER_MINUTE": "0",
    "ORT_DISABLE_TELEMETRY": "1",
}


def turns_of(run: Run) -> int:
    return getattr(run.arguments, "turns", None) or (
        QUICK_TURNS if run.quick else TURNS
    )


def engine_with(run: Run, *rungs: Rung) -> Engine:
    """The engine, with these images built from the tree as it is."""
    docker = docker_deployment.engine_of(run)
    for rung in rungs:
        ladder.build(run, docker, rung, rung.tag)
    return docker


# -- tokens a second, inside and outside


def cores() -> list[int]:
    """The CPUs for either server: the first two that this process may use."""
    return sorted(os.sched_getaffinity(0))[:CPUS]


@contextmanager
def inside(docker: Engine, key: str) -> Iterator[tuple[Server, Any]]:
    """The API in the distroless container; and the container, to pause it."""
    options = {
        "environment": {**SETTINGS, "API_KEYS": key},
        "nano_cpus": CPUS * 10**9,
        "cpuset_cpus": ",".join(map(str, cores())),
    }
    with docker.container(DISTROLESS.tag, port=PORT, **options) as box:
        box.wait_ready(READY, START_S)
        # By its own address, as another container or a balancer reaches it. The port
        # published on loopback is served by one more process, docker-proxy, which
        # copies every byte: a convenience of development that takes some CPU itself.
        (network,) = box.inspect()["NetworkSettings"]["Networks"].values()
        host = network["IPAddress"]
        yield Server("inside", PORT, box.state["Pid"], host=host), box.made


@contextmanager
def outside(key: str) -> Iterator[Server]:
    """The same API as a plain process, pinned to the same CPUs."""
    port = process.free_port()
    argv = ["taskset", "--cpu-list", ",".join(map(str, cores()))]
    argv += [sys.executable, str(ROOT / "model_api.py"), "--serve", "--port", str(port)]
    env = {**SETTINGS, "API_KEYS": key}
    ready = f"http://127.0.0.1:{port}{READY}"
    with process.child(argv, env=env, ready=ready, deadline_s=START_S) as child:
        yield Server("outside", port, child.pid)


def rate(server: Server, key: str, first: int) -> tuple[float, float]:
    """Tokens/s that four streaming callers get together, and the server's ms of CPU.

    The CPU that a token takes tells what the machine's other work cannot disturb: if it
    is the same, what is lost lies between server and caller.
    """

    async def all_of_them() -> list[Any]:
        bodies = [request(first + i, TOKENS) for i in range(CALLERS)]
        return await asyncio.gather(*(ask(server, body, key) for body in bodies))

    start, before = time.perf_counter(), trials.usage(server.pid).cpu_s
    replies = asyncio.run(all_of_them())
    took_s = time.perf_counter() - start
    cpu_s = trials.usage(server.pid).cpu_s - before
    if bad := next((reply for reply in replies if not reply.ok), None):
        raise ValueError(f"Expected answers of the API {server.name}: {bad.error}.")
    tokens = sum(reply.tokens for reply in replies)
    return tokens / took_s, 1000 * cpu_s / tokens


def tokens_per_s(run: Run) -> None:
    """Turn by turn, the other server stopped."""
    docker = engine_with(run, DISTROLESS)
    run.predict("A container is a process with limits: the tokens come as fast.")
    key, told, bystanders = secrets.token_urlsafe(32), [], Bystanders()
    with inside(docker, key) as (within, box), outside(key) as without:

        def turn(number: int) -> list[float]:
            found: dict[str, tuple[float, float]] = {}
            first = 10_000 + number * CALLERS
            order = [within, without] if number % 2 else [without, within]
            for server in order:
                with stopped(box, without.pid, server is within):
                    found[server.name] = rate(server, key, first)
            return [*found["inside"], *found["outside"]]

        turn(-1)  # warms up
        with run.progress("tokens", turns_of(run)) as advance:
            for number in range(turns_of(run)):
                pids = [within.pid, without.pid]
                told.append(bystanders.watch(pids, partial(turn, number)))
                advance()
    bystanders.tell(run)
    show_rates(run, *(Series(column) for column in zip(*told, strict=True)))


@contextmanager
def stopped(box: Any, pid: int, contained: bool) -> Iterator[None]:
    """Stops the server whose turn it is not; a paused container is not probed."""
    stop, go = box.pause, box.unpause
    if contained:
        stop, go = partial(os.killpg, pid, SIGSTOP), partial(os.killpg, pid, SIGCONT)
    stop()
    try:
        yield
    finally:
        go()


def show_rates(
    run: Run, within: Series, cpu_within: Series, without: Series, cpu_without: Series
) -> None:
    paired = Paired(within, without)
    ratio = paired.ratio()
    rows: list[list[Cell]] = []
    for name, series, cpu, last in (
        ("no container", without, cpu_without, [None, ""]),
        ("distroless", within, cpu_within, [str(ratio), f">= {RATIO_BAR}"]),
    ):
        rows.append([name, series.median, series.spread, cpu.median, *last])
    columns = ["where", ("median", "tokens/s"), ("spread", "tokens/s")]
    columns += [("CPU a token", "ms"), "ratio", "bar"]
    title = f"{CALLERS} streaming callers, {CPUS} CPUs"
    spread = paired.ratios.spread
    note = f"ratio: median of the turns' ratios (spread {spread:.3f}, n={within.n})"
    run.table(Table(title, columns, rows, note))
    run.fact("tokens/s inside, of those outside", ratio.value)
    run.conclude(verdict(ratio.value >= RATIO_BAR, "The throughput inside"))


# -- starts and builds


def start(docker: Engine, rung: Rung, healthy: bool = False) -> float:
    """Seconds from start until it answers, or until the engine calls it healthy."""
    key = {"API_KEYS": secrets.token_urlsafe(32), "DRAIN_SECONDS": "0"}
    with docker.container(rung.tag, port=PORT, environment=key) as box:
        return box.wait_healthy(START_S) if healthy else box.wait_ready(READY, START_S)


def cold_starts(run: Run) -> None:
    """Each image once to warm the disk's cache, then in turns."""
    docker = engine_with(run, *LADDER)
    run.predict("The smallest image starts no later than the naive one.")
    told: dict[str, list[float]] = {rung.name: [] for rung in LADDER}
    for rung in LADDER:
        start(docker, rung)
    with run.progress("cold starts", turns_of(run)) as advance:
        for number in range(turns_of(run)):
            first = number % len(LADDER)
            for rung in [*LADDER[first:], *LADDER[:first]]:
                told[rung.name].append(start(docker, rung))
            advance()
    series = {name: Series(tuple(values)) for name, values in told.items()}
    bars = {DISTROLESS.name: f"<= {NAIVE.name}"}
    show_times(run, "Cold start, until it is ready", series, bars)
    ratio = Paired(series[DISTROLESS.name], series[NAIVE.name]).ratio()
    run.fact("distroless, of naive", str(ratio))
    run.conclude(verdict(ratio.value <= 1, "The cold start of the smallest image"))


def rebuilds(run: Run) -> None:
    """After one line of code, each time another."""
    docker = engine_with(run, DISTROLESS)
    run.predict("One small layer is built; the model and the packages are known.")
    again = partial(ladder.time_rebuild, run, docker, DISTROLESS)
    again()
    series = Series(tuple(again() for _ in range(max(5, turns_of(run)))))
    bar = f"<= {REBUILD_BAR_S:g}"
    show_times(run, "Rebuild", {DISTROLESS.name: series}, {DISTROLESS.name: bar})
    run.conclude(verdict(series.median <= REBUILD_BAR_S, "The rebuild"))


def health(run: Run) -> None:
    """What Compose and an orchestrator wait for."""
    docker = engine_with(run, DISTROLESS)
    run.predict("The engine asks every 2 s, so a start of 1 s is healthy after 2.")
    start(docker, DISTROLESS)
    times = [start(docker, DISTROLESS, healthy=True) for _ in range(turns_of(run))]
    series, bar = Series(tuple(times)), f"<= {HEALTHY_BAR_S:g}"
    show_times(run, "Healthy", {DISTROLESS.name: series}, {DISTROLESS.name: bar})
    run.conclude(verdict(series.median <= HEALTHY_BAR_S, "Healthy"))


def show_times(
    run: Run, title: str, times: dict[str, Series], bars: dict[str, str]
) -> None:
    rows: list[list[Cell]] = []
    for name, series in times.items():
        middle, ends = [series.median, series.spread], [series.min, series.max]
        rows.append([name, *middle, *ends, bars.get(name, ""), series.n])
    columns = ["image", ("median", "s"), ("spread", "s"), ("least", "s"), ("most", "s")]
    run.table(Table(title, [*columns, "bar", "n"], rows))


def verdict(held: bool, what: str) -> str:
    return f"{what} {'holds' if held else 'MISSES'} its bar."


SECTIONS = [
    lesson.Section("Tokens a second inside and outside", tokens_per_s),
    lesson.Section("Cold starts", cold_starts),
    lesson.Section("A rebuild after one line of code", rebuilds),
    lesson.Section("Healthy after start", health),
]


def count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0: {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=count, help=f"of each (default: {TURNS})")


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    return lesson.run(
        doc=__doc__,
        sections=SECTIONS,
        argv=argv,
        number=AFTER_LESSONS,
        add_arguments=add_arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main())
