"""Coordinated omission: one stall of two seconds, as two loops and the server tell it.

Run it:     python -m tests.benchmarks.omission [--quick]     seven seconds, or four
"""

from __future__ import annotations

import asyncio

from course import lesson
from course.show import Cell, Table
from local_cloud.scaling.omission import Experiment, measure
from tests.benchmarks import AFTER_LESSONS

SHORT = Experiment(seconds=3.5, clients=2, stall_at_s=1.0)


def coordinated_omission(run: lesson.Run) -> None:
    """Closed loop, open loop, truth."""
    experiment = SHORT if run.quick else Experiment()
    met = min(1.0, experiment.stall_s / experiment.seconds)
    run.predict(
        f"A stall of {experiment.stall_s:g} s in {experiment.seconds:g} meets "
        f"{met:.0%} of all who come; a closed loop sends {experiment.clients} into it."
    )
    told = asyncio.run(measure(experiment))
    rows: list[list[Cell]] = []
    for row in told:
        times = [1000 * t for t in (row.p50_s, row.p99_s, row.worst_s)]
        rows.append([row.what, row.requests, row.met_stall, *times])
    columns = ["who tells it", ("requests", ""), ("met the stall", "")]
    columns += [("p50", "ms"), ("p99", "ms"), ("worst", "ms")]
    note = (
        f"one worker, {1000 * experiment.service_s:g} ms a request, waited and not "
        f"computed; {experiment.rate_per_s:g} requests a second in the open loop"
    )
    run.table(Table("One stall", columns, rows, note))
    closed, opened, truth = told
    run.conclude(
        f"The closed loop reports a p99 of {1000 * closed.p99_s:.0f} ms; the truth is "
        f"{1000 * truth.p99_s:,.0f} ms, and the open loop says "
        f"{1000 * opened.p99_s:,.0f} ms."
    )


SECTIONS = [lesson.Section("Coordinated omission", coordinated_omission)]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
