"""Cold starts of the real model: what they consist of, and how small they get.

The phases of a start, three ways to open the model, the first call of a naive and of a
tuned function, of a snapshot, of provisioned and of kept sandboxes, then fresh clones
and a burst of sixteen of them.

Run it:     python -m tests.benchmarks.cold_start [--quick]        about a minute
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import serverless_deployment as function
from course import lesson
from course.measure import Series
from course.show import Cell, Table
from local_cloud.functions import Function, Platform, cold_starts
from models import build
from tests.benchmarks import AFTER_LESSONS

TURNS, QUICK_TURNS = 9, 3
CALLERS = 16
EVENT = {"prompt": "Name a colour.", "max_tokens": 1}
TUNED_BAR, RESTORE_BAR_MS, RESTORE_BAR, PRIVATE_BAR_MB = 1.8, 4.0, 70, 6.0
BURST_BAR_MS = 250.0
NAIVE, TUNED, SNAPSHOT = "naive", "tuned", "snapshot"
READ_ONLY = "read-only"
PROVISIONED, WARM, SECOND = "provisioned", "keep-warm", "keep-warm-second"


def deployed(name: str, **settings: Any) -> Function:
    """The lesson's function, whose sandboxes end after each call."""
    return function.deployed(name, **{"keep_alive_s": 0.0, **settings})


def compositions(run: lesson.Run) -> None:
    """Phase by phase, both functions side by side."""
    run.predict("Most of a naive start serves nobody: a framework, a check, a copy.")
    repeats = QUICK_TURNS if run.quick else TURNS
    kinds = {NAIVE: {}, TUNED: function.ENVIRONMENT}
    told = {
        kind: cold_starts.composition(kind, repeats=repeats, environment=environment)
        for kind, environment in kinds.items()
    }
    rows: list[list[Cell]] = [
        [kind, phase.name, phase.cpu_ms, phase.wall_ms]
        for kind, phases in told.items()
        for phase in phases
    ]
    columns = ["function", "phase", ("CPU", "ms"), ("wall", "ms")]
    run.table(Table(f"A cold start, medians of {repeats}", columns, rows))
    naive, tuned = (sum(phase.cpu_ms for phase in told[kind]) for kind in kinds)
    run.conclude(f"{naive:.0f} ms of CPU to the first token, or {tuned:.0f} ms.")


def openings(run: lesson.Run) -> None:
    """What packing costs, and what not packing costs."""
    told = cold_starts.openings(repeats=QUICK_TURNS, environment=function.ENVIRONMENT)
    rows = [[one.way, one.open_cpu_ms, one.token_cpu_ms] for one in told]
    columns = ["the model", ("to open", "ms CPU"), ("a token", "ms CPU")]
    run.table(Table("Three ways to open it", columns, rows))
    _, packed, never = told
    run.conclude(
        f"Without packing it opens {packed.open_cpu_ms / never.open_cpu_ms:.0f} times "
        f"faster, and each token takes {never.token_cpu_ms / packed.token_cpu_ms:.0f} "
        "times as long."
    )


@contextmanager
def read_only() -> Iterator[Path]:
    """The model's folder as a zip on Lambda has it: it can be read, nothing packed.

    Raises:
        OSError: mounting it takes root.
    """
    files = build.ensure("int4")
    with TemporaryDirectory() as folder:
        for path in (files.graph, files.graph.with_suffix(".json"), files.tokenizer):
            (Path(folder) / path.name).symlink_to(path)
        mount = ["mount", "--bind", "-o", "ro", folder, folder]
        told = subprocess.run(mount, capture_output=True, text=True)
        if told.returncode:
            raise OSError(told.stderr.strip())
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def first_calls(run: lesson.Run) -> None:
    """What the first caller waits for, by strategy."""
    turns = QUICK_TURNS if run.quick else TURNS
    functions = [
        deployed(NAIVE, handler="deploy.functions.naive.handler", environment={}),
        deployed(TUNED),
        deployed(SNAPSHOT, snapshot=True),
        deployed(PROVISIONED, provisioned=1),
    ]
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(read_only())
        except OSError as refused:
            run.skip(f"{READ_ONLY}: {refused}", "run it as root")
        else:
            environment = {**function.ENVIRONMENT, "MODEL_DIR": str(folder)}
            functions.insert(2, deployed(READ_ONLY, environment=environment))
        cloud = stack.enter_context(Platform())
        run.say(f"Limits by {cloud.kind}.")
        told = cold_starts.first_calls(cloud, functions, EVENT, turns=turns)
        kept = deployed(WARM, keep_alive_s=300.0)
        told[WARM], told[SECOND] = cold_starts.kept_warm(
            cloud, kept, EVENT, turns=QUICK_TURNS
        )
    answers = {call.answer["text"] for calls in told.values() for call in calls}
    if len(answers) != 1:
        raise ValueError(f"Expected one and the same answer, found {answers}.")
    rows: list[list[Cell]] = [
        [name, *cold_starts.figures(calls), max(call.memory_mb for call in calls)]
        for name, calls in told.items()
    ]
    columns = ["strategy", ("whole call, median", "ms"), ("spread", "ms")]
    columns += [("init or restore", "ms"), ("billed", "ms"), "n", ("memory", "MB")]
    note = (
        "read-only: tuned, but MODEL_DIR cannot be written, as on Lambda. "
        "keep-warm-second: the slower of two at once. All gave the same answer."
    )
    run.table(Table("The first call", columns, rows, note))
    ready = {name: cold_starts.ready_ms(calls) for name, calls in told.items()}
    run.conclude(
        f"Tuned starts {ready[NAIVE] / ready[TUNED]:.1f} times faster than naive "
        f"(bar: {TUNED_BAR}); a restore takes {ready[SNAPSHOT]:.1f} ms "
        f"(bar: {RESTORE_BAR_MS:.0f}), {ready[NAIVE] / ready[SNAPSHOT]:.0f} times less "
        f"(bar: {RESTORE_BAR})."
    )


def clones(run: lesson.Run) -> None:
    """The memory of fresh clones, and sixteen callers at once."""
    turns = QUICK_TURNS if run.quick else TURNS
    bursts: list[float] = []
    cold = 0
    with Platform() as cloud:
        with cold_starts.clones(cloud, deployed("fresh"), 4) as fresh:
            private = max(cold_starts.private_mb(one.pid) for one in fresh)
        for _ in range(turns):
            cloud.deploy(deployed("burst", snapshot=True))
            took, calls = cold_starts.burst(cloud, "burst", EVENT, CALLERS)
            bursts.append(took)
            cold = sum(call.cold for call in calls)
    run.fact("a fresh clone's own memory, the largest of 4", private, "MB")
    run.fact("sandboxes restored for the last burst", cold)
    series = Series(tuple(bursts))
    run.conclude(
        f"{private:.1f} MB private (bar: {PRIVATE_BAR_MB:.0f}); a burst of {CALLERS} "
        f"answered in {series.median:.0f} ms, spread {series.spread:.0f}, n={series.n} "
        f"(bar: {BURST_BAR_MS:.0f})."
    )


SECTIONS = [
    lesson.Section("What a cold start consists of", compositions),
    lesson.Section("Opening the model", openings),
    lesson.Section("The first call", first_calls),
    lesson.Section("Clones of a snapshot", clones),
]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
