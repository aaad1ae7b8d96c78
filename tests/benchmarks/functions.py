"""The functions platform: what it adds to a call, and whether its reports are true.

An empty handler shows what the platform costs: warm, cold, and thawed. Handlers with a
known appetite show whether limits hold and whether the REPORT line tells that appetite:
the memory that one takes more than another, and the CPU time that one uses until the
kernel's account (getrusage) says that it is enough.

Run it:     python -m tests.benchmarks.functions [--quick]       under half a minute
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise

from course import lesson
from course.measure import Series
from course.show import Cell, Table
from local_cloud.functions import Function, Platform, Result, cgroup
from tests.benchmarks import AFTER_LESSONS

WARM, COLD = 2000, 30
WARM_BAR_MS, COLD_BAR_MS, REPORT_BAR = 0.5, 40.0, 5
MEMORY_MB = (128, 256, 512, 1024, 1769)
HELD_MB = (100, 300, 700)

HANDLERS = """
import resource, time

def empty(event, context):
    return None

def holds(event, context):
    held = bytearray(event * 2**20)
    held[::4096] = b"x" * len(held[::4096])

def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

def works(event, context):
    begin = used()
    while used() - begin < event:
        pass
    return 1000 * (used() - begin)

def hangs(event, context):
    time.sleep(60)
"""


def functions(cloud: Platform, **settings: object) -> Callable[[str], str]:
    """Deploys handlers by name."""
    code = cloud.host.root / "code"
    code.mkdir(exist_ok=True)
    (code / "handlers.py").write_text(HANDLERS)

    def deploy(handler: str) -> str:
        where = f"handlers.{handler}"
        cloud.deploy(Function(handler, where, code, **settings))  # pyright: ignore
        return handler

    return deploy


def timed(call: Callable[[], Result]) -> float:
    """Milliseconds from the call to its result."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def overhead(run: lesson.Run) -> None:
    """An empty handler: warm, thawed, cold."""
    many, few = (300, 8) if run.quick else (WARM, COLD)
    with Platform() as cloud:
        # A whole CPU: calls without a pause use up the share of a smaller function.
        deploy = functions(cloud, memory_mb=cgroup.FULL_CPU_MB)
        name = deploy("empty")
        cloud.invoke(name, {})
        warm = Series(tuple(timed(lambda: cloud.invoke(name, {})) for _ in range(many)))
        thawed, cold = [], []
        for _ in range(few):
            box = cloud.sandboxes(name)[0]
            while not box.frozen:
                time.sleep(0.005)
            thawed.append(timed(lambda: cloud.invoke(name, {})))
        for _ in range(few):
            deploy("empty")
            cold.append(timed(lambda: cloud.invoke(name, {})))
        run.fact("limits by", cloud.kind)
    rows: list[list[Cell]] = []
    for case, series, bar in (
        ("warm", warm, f"<= {WARM_BAR_MS}"),
        ("warm, was frozen", Series(tuple(thawed)), ""),
        ("cold", Series(tuple(cold)), f"<= {COLD_BAR_MS:.0f}"),
    ):
        rows.append([case, series.median, series.p99, series.spread, bar, series.n])
    columns = ["an empty handler", ("median", "ms"), ("99th percentile", "ms")]
    run.table(
        Table("From invoke to Result", [*columns, ("spread", "ms"), "bar", "n"], rows)
    )
    run.conclude(
        f"The platform adds {warm.median:.2f} ms to a warm call (bar: {WARM_BAR_MS}), "
        f"and starts a sandbox in {Series(tuple(cold)).median:.0f} ms "
        f"(bar: {COLD_BAR_MS:.0f})."
    )


def truth(run: lesson.Run) -> None:
    """REPORT beside what the handler is known to have used."""
    rows: list[list[Cell]] = []
    with Platform() as cloud:
        # A whole CPU: with a share of one a call lasts longer than it works.
        deploy = functions(cloud, memory_mb=cgroup.FULL_CPU_MB, timeout_s=30)
        name = deploy("holds")
        before = cloud.invoke(name, HELD_MB[0]).report.max_memory_mb
        for less, more in pairwise(HELD_MB):
            after = cloud.invoke(name, more).report.max_memory_mb
            what = f"memory, {more} MB held after {less}"
            rows.append(beside(what, "MB", after - before, more - less))
            before = after
        name = deploy("works")
        for seconds in (0.05, 0.2, 0.8):
            result = cloud.invoke(name, seconds)
            what, told = f"duration, {seconds:g} s of CPU", result.report.duration_ms
            rows.append(beside(what, "ms", told, json.loads(result.payload)))
        note = f"Memory: {cloud.kind}. A CPU shared with others makes durations longer."
    columns = ["what", "unit", "REPORT", "known", ("apart", "%")]
    run.table(Table("REPORT beside what was used", columns, rows, note))
    worst = max(abs(float(str(row[4]))) for row in rows)
    run.conclude(
        f"The worst figure is {worst:.1f} % away from what was used "
        f"(bar: {REPORT_BAR} %)."
    )


def beside(what: str, unit: str, told: float, known: float) -> list[Cell]:
    """A row: REPORT's figure, the known one, and how far apart they are."""
    return [what, unit, told, known, 100 * (told / known - 1)]


def shares(run: lesson.Run) -> None:
    """The same work at each size, and limits that end an invocation."""
    rows: list[list[Cell]] = []
    work_s = 0.1 if run.quick else 0.3
    run.predict("Below one CPU (1,769 MB) twice the memory takes half the time.")
    with Platform() as cloud:
        for memory_mb in MEMORY_MB:
            name = functions(cloud, memory_mb=memory_mb, timeout_s=60)("works")
            cloud.invoke(name, 0.0)
            took = cloud.invoke(name, work_s).report.duration_ms
            share = min(1.0, memory_mb / cgroup.FULL_CPU_MB)
            rows.append([memory_mb, share, took, 1000 * work_s / share])
        columns = [("memory", "MB"), ("share", "CPU"), ("took", "ms"), ("ideal", "ms")]
        title = f"{1000 * work_s:.0f} ms of CPU time"
        run.table(Table(title, columns, rows))
        hung = cloud.invoke(functions(cloud, timeout_s=1.0)("hangs"), {})
        greedy = functions(cloud, memory_mb=128, timeout_s=60)("holds")
        burst = cloud.invoke(greedy, 500)
    run.fact("a handler that hangs, limit 1 s", hung.report.status)
    run.fact("was ended after", hung.report.duration_ms, "ms")
    run.fact("a handler that wants 500 MB of 128", burst.report.error_type or "none")


SECTIONS = [
    lesson.Section("What the platform adds", overhead),
    lesson.Section("Whether REPORT is true", truth),
    lesson.Section("Whether limits hold", shares),
]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
