"""What the lesson's demonstrations do to functions, and the pictures of it."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course import draw
from course.measure import Series
from course.process import wait_until
from local_cloud.functions.cold_starts import Phase
from local_cloud.functions.platform import Function, Platform
from local_cloud.functions.pool import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEADLINE_S = 60.0


def empty(event: Any, context: Any) -> None:
    """A handler that does nothing: what remains is the platform's own time."""


EMPTY = Function("empty", "local_cloud.functions.trials.empty", memory_mb=1769)


def overhead(cloud: Platform, calls: int) -> Series:
    """What the platform adds to a warm call, in milliseconds, by an empty handler."""
    cloud.deploy(EMPTY)
    cloud.invoke(EMPTY.name, {})
    took = []
    for _ in range(calls):
        begin = time.perf_counter()
        cloud.invoke(EMPTY.name, {})
        took.append(1000 * (time.perf_counter() - begin))
    return Series(tuple(took), "ms")


def story(result: Result, waited_ms: float) -> list[Any]:
    """A row: what the caller waited for and what the platform reports."""
    report = result.report
    before = report.init_ms or report.restore_ms or 0.0
    return [
        waited_ms,
        before,
        report.duration_ms,
        report.billed_ms,
        report.max_memory_mb,
    ]


def freeze(cloud: Platform, name: str) -> None:
    """Wait until the function's sandboxes are frozen: some 50 ms after their call."""

    def frozen() -> bool:
        return all(box.frozen for box in cloud.sandboxes(name))

    wait_until(frozen, DEADLINE_S, f"the sandboxes of {name} to be frozen")


def kill_one(cloud: Platform, name: str) -> bool:
    """kill -9 a sandbox that is at work; whether there was one."""
    busy = [box for box in cloud.sandboxes(name) if box.pid and not box.frozen]
    if not busy or len(cloud.sandboxes(name)) == cloud.warm(name):
        return False
    os.kill(busy[0].pid, signal.SIGKILL)
    return True


def rows_of(path: Path, query: str) -> list[tuple]:
    """What a SQLite file says; nothing as long as it is not there."""
    if not path.exists():
        return []
    with closing(sqlite3.connect(path, timeout=30)) as db:
        return db.execute(query).fetchall()


def draw_phases(ax: Axes, starts: Mapping[str, Sequence[Phase]]) -> None:
    """Cold starts as stacked bars of CPU time, one a way of writing the function."""
    names = list(dict.fromkeys(p.name for start in starts.values() for p in start))
    colours = dict(zip(names, draw.COLOURS * 2, strict=False))
    for place, phases in enumerate(starts.values()):
        left = 0.0
        for phase in phases:
            first = phase.name not in ax.get_legend_handles_labels()[1]
            ax.barh(
                place,
                phase.cpu_ms,
                left=left,
                height=0.55,
                color=colours[phase.name],
                edgecolor="white",
                hatch="//" if names.index(phase.name) >= len(draw.COLOURS) else None,
                label=phase.name if first else None,
            )
            left += phase.cpu_ms
        ax.annotate(
            f"{left:.0f} ms",
            (left, place),
            (6, 0),
            textcoords="offset points",
            va="center",
        )
    ax.set_yticks(range(len(starts)), list(starts))
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.margins(x=0.12)
    ax.set_xlabel("CPU time until the first token (ms)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=5, fontsize=10)
