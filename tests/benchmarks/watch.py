"""How long `python -m exercises watch` takes from a save to its verdict.

    python -m tests.benchmarks.watch [TURNS]

For each exercise the quick checks on the starter and on the solution, each in a process
of its own, as `watch` runs them; to that come at most 0.1 s until a save is noticed.
"""

from __future__ import annotations

import sys
from statistics import median

from course import show
from course.show import Table
from exercises import runner
from exercises.catalogue import EXERCISES


def main(turns: int = 5) -> None:
    rows = []
    for exercise in EXERCISES:
        for name, file in (
            ("starter", exercise.starter),
            ("solution", exercise.solution),
        ):
            took = [
                runner.grade(exercise, file, quick=True).seconds for _ in range(turns)
            ]
            rows.append([exercise.name, name, median(took), max(took)])
    columns = ["exercise", "file", ("median", "s"), ("worst", "s")]
    show.table(Table("Quick checks", columns, rows, f"n = {turns}"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
