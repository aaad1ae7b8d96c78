"""Measures cold starts: what one consists of, and what each way around it gains.

Everything returns plain numbers of this machine; the lesson draws and explains them.
What is compared is measured in turns, so that a busy moment hits all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from course.measure import Series
from course.process import wait_until
from course.show import Table
from local_cloud.functions.platform import REPOSITORY, Function, Platform
from local_cloud.functions.pool import Result
from local_cloud.functions.sandbox import Sandbox

PROGRAM = Path(__file__).with_name("phases.py")
DEADLINE_S = 60.0
MB = 1e6


@dataclass(frozen=True)
class Phase:
    """One step of a cold start; medians."""

    name: str
    cpu_ms: float
    wall_ms: float


@dataclass(frozen=True)
class Opening:
    """One way to open the model: what that takes, and what each token takes then."""

    way: str
    open_cpu_ms: float
    token_cpu_ms: float


@dataclass(frozen=True)
class Call:
    """One call as its caller saw it, and what the platform reports of it."""

    total_ms: float
    ready_ms: float  # init or restore before it; 0 where a sandbox was waiting
    duration_ms: float
    billed_ms: int
    memory_mb: int
    cold: bool
    answer: Any


# -- in processes of their own


def composition(
    kind: str, *, repeats: int = 5, environment: Mapping[str, str] | None = None
) -> list[Phase]:
    """The phases of a cold start, "naive" or "tuned", up to the first token."""
    runs = [_phases(kind, environment or {}) for _ in range(repeats)]
    return [
        Phase(
            laps[0][0],
            Series(tuple(cpu for _, cpu, _ in laps)).median,
            Series(tuple(wall for _, _, wall in laps)).median,
        )
        for laps in zip(*runs, strict=True)
    ]


def compositions(
    ways: Mapping[str, Mapping[str, str]],
    *,
    repeats: int,
    on_each: Callable[[], object] = lambda: None,
) -> dict[str, list[Phase]]:
    """The phases of several kinds of starts, each with its environment."""
    told = {}
    for kind, environment in ways.items():
        told[kind] = composition(kind, repeats=repeats, environment=environment)
        on_each()
    return told


def _phases(kind: str, environment: Mapping[str, str]) -> list[tuple]:
    return _run([kind, str(time.monotonic())], environment)


def openings(
    *, repeats: int = 5, environment: Mapping[str, str] | None = None
) -> list[Opening]:
    """Three ways to open the model; the third is a trap: soon open, slow for ever."""
    ways = {
        "read, packed at opening": "read",
        "mapped, packed on disk": "mapped",
        "mapped, never packed": "unpacked",
    }
    told: dict[str, list[Any]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            told[name].append(_run([way], environment or {}))
    return [
        Opening(name, *(Series(column).median for column in zip(*runs, strict=True)))
        for name, runs in told.items()
    ]


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Runs `phases.py` as a sandbox would run a function."""
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAM), *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"Expected {PROGRAM.name} to measure {arguments[0]!r}, "
            f"found:\n{done.stderr}"
        )
    return json.loads(done.stdout)


# -- on a platform


def call(cloud: Platform, name: str, event: Any) -> Call:
    """Invokes a function; raises RuntimeError with its log if it failed."""
    begin = time.perf_counter()
    result = cloud.invoke(name, event)
    return _call(result, 1000 * (time.perf_counter() - begin))


def _call(result: Result, total_ms: float) -> Call:
    if result.error:
        raise RuntimeError(f"Expected an answer, found an error:\n{result.log}")
    report = result.report
    return Call(
        total_ms,
        report.init_ms or report.restore_ms or 0.0,
        report.duration_ms,
        report.billed_ms,
        report.max_memory_mb,
        result.cold,
        json.loads(result.payload),
    )


def calls_table(calls: Mapping[str, Call]) -> Table:
    """Three calls of one sandbox, each under what had happened to it."""
    columns = ["call", ("caller waits", "ms"), ("of it init", "ms")]
    columns += [("duration", "ms"), ("billed", "ms"), ("most memory", "MB")]
    rows = [
        [what, c.total_ms, c.ready_ms, c.duration_ms, c.billed_ms, c.memory_mb]
        for what, c in calls.items()
    ]
    return Table("One sandbox, three calls", columns, rows)


def first_calls(
    cloud: Platform, functions: Iterable[Function], event: Any, *, turns: int = 5
) -> dict[str, list[Call]]:
    """The call that finds no sandbox in use, of each function, in turns.

    Deploy them with `keep_alive_s=0`: their sandboxes end after each call, so that the
    next one is a first call again. Provisioned ones stay, and are waited for.
    """
    functions = list(functions)
    for function in functions:
        cloud.deploy(function)
    told: dict[str, list[Call]] = {function.name: [] for function in functions}
    for _ in range(turns):
        for function in functions:
            told[function.name].append(call(cloud, function.name, event))
            _await_idle(cloud, function)
    return told


def figures(calls: Sequence[Call]) -> list[Any]:
    """Of such calls: how long they took and its spread, init, billed, and how many."""
    waits = Series(tuple(call.total_ms for call in calls))
    billed = Series(tuple(call.billed_ms for call in calls)).median
    return [waits.median, waits.spread, ready_ms(calls), billed, waits.n]


def strategies_table(told: Mapping[str, Sequence[Call]], idle: Sequence[str]) -> Table:
    """First calls by strategy, and what each of these pays for while nobody calls."""
    columns = ["strategy", ("caller waits", "ms"), ("spread", "ms")]
    columns += [("init or restore", "ms"), ("billed", "ms"), "n", "costs while idle"]
    rows = [
        [name, *figures(calls), costs]
        for (name, calls), costs in zip(told.items(), idle, strict=True)
    ]
    return Table("The first call, to the first token", columns, rows)


def ready_ms(calls: Sequence[Call]) -> float:
    """Of such calls: the median time before the handler ran."""
    return Series(tuple(call.ready_ms for call in calls)).median


def _await_idle(cloud: Platform, function: Function) -> None:
    def as_before() -> bool:
        kept = len(cloud.sandboxes(function.name))
        return kept == cloud.warm(function.name) == function.provisioned

    wait_until(as_before, DEADLINE_S, f"the sandboxes of {function.name} to end")


def kept_warm(
    cloud: Platform, function: Function, event: Any, *, turns: int = 5
) -> tuple[list[Call], list[Call]]:
    """A function that is called now and then so that one sandbox stays.

    Returns:
        Calls that come alone, which find it; and the slower of two that come at once,
        of which one always starts a sandbox: a timer keeps one warm, not two.
    """
    alone, at_once = [], []
    for _ in range(turns):
        cloud.deploy(function)  # anew: without the sandboxes of the last turn
        call(cloud, function.name, event)  # the timer's
        alone.append(call(cloud, function.name, event))
        _, both = burst(cloud, function.name, event, 2)
        at_once.append(max(both, key=lambda one: one.total_ms))
    return alone, at_once


def burst(
    cloud: Platform, name: str, event: Any, callers: int
) -> tuple[float, list[Call]]:
    """So many calls at once: milliseconds until all are answered, and the calls."""
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda _: None, range(callers)))  # its threads exist now
        begin = time.perf_counter()
        calls = list(pool.map(lambda _: call(cloud, name, event), range(callers)))
        return 1000 * (time.perf_counter() - begin), calls


@contextmanager
def clones(cloud: Platform, function: Function, count: int) -> Iterator[list[Sandbox]]:
    """Fresh clones of a snapshot that nobody has called: their sandboxes."""
    fresh = replace(function, snapshot=True, ready_clones=True, provisioned=count)
    cloud.deploy(fresh)
    yield cloud.sandboxes(fresh.name)
    cloud.deploy(replace(fresh, provisioned=0))


def meet_burst(
    cloud: Platform, function: Function, event: Any, callers: int
) -> tuple[float, int, float]:
    """So many callers of a snapshot that nobody has called yet.

    Returns:
        Milliseconds until all are answered, how many of them started a clone (one
        that is soon done may take another), and the MB that a fresh clone owns.
    """
    with clones(cloud, function, 1) as (fresh,):
        memory = private_mb(fresh.pid)
    cloud.deploy(replace(function, snapshot=True))
    took, calls = burst(cloud, function.name, event, callers)
    return took, sum(call.cold for call in calls), memory


def private_mb(pid: int) -> float:
    """Memory that a process shares with nobody and has written to, in MB."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        sizes = dict(line.split()[:2] for line in file.readlines()[1:])
    return int(sizes["Private_Dirty:"]) * 1024 / MB
