"""A learner's path: each command from the bundle to the first solved exercise, timed.

The bundle is made of the last commit, as for a class, in a temporary folder. There the
commands run as a learner types them, in an environment of its own: nothing is taken
from this one, from pip's cache or from a model that is built already. The answer that
is "written" in between is the course's own solution; reading and thinking is not timed.
It ends with 1 where a command ends otherwise than it should.

Run it:     python -m tests.benchmarks.learner [N]        exercise N, or 2; two minutes
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from course import show
from course.show import Table
from exercises.catalogue import ROOT, Exercise, find

BUNDLE = "mkdir -p {folder} && git archive HEAD | tar x -C {folder}"
LIMIT_S = 900.0
NOT_OURS = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MODEL_DIR", "PIP_CACHE_DIR")


def path_of(exercise: Exercise) -> list[tuple[str, int]]:
    """What is typed in the bundle, and the exit status that is right."""
    n = exercise.number
    return [
        ("python3 -m venv .venv", 0),
        ("pip install -q -r requirements.txt", 0),
        ("python -m models", 0),
        ("python -m exercises list", 0),
        ("python -m exercises doctor", 0),
        (f"python -m exercises hint {n}", 0),
        (f"python -m exercises check {n}", 1),
        (f"cp {exercise.solution} exercises/{exercise.file.name}", 0),
        (f"python -m exercises check {n}", 0),
    ]


def typed(command: str, folder: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Runs a line in bash; seconds, and what came of it."""
    env = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    path = f"{folder / '.venv/bin'}{os.pathsep}{env['PATH']}"  # as activated
    begin = time.perf_counter()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**env, "PATH": path, "PIP_NO_CACHE_DIR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    return time.perf_counter() - begin, done


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exercise", nargs="?", default="2", type=find, metavar="N")
    exercise = parser.parse_args(argv).exercise
    place = Path(tempfile.mkdtemp(prefix="learner-"))
    rows, wrong = [], []
    try:
        bundle = place / "students"
        steps = [(BUNDLE.format(folder=bundle), 0, ROOT)]
        steps += [(command, code, bundle) for command, code in path_of(exercise)]
        for command, code, folder in steps:
            seconds, done = typed(command, folder)
            shown = command.replace(str(place), "..").replace(f"{ROOT}/", "")
            rows.append([shown, round(seconds, 1), done.returncode])
            if done.returncode != code:
                wrong.append(f"{shown}: expected {code}\n{done.stdout[-2000:]}")
                break
    finally:
        shutil.rmtree(place)
    columns = ["command", ("took", "s"), "exit status"]
    show.table(Table(f"To exercise {exercise.number}, solved", columns, rows))
    show.labelled("in all", f"{sum(row[1] for row in rows):.0f} s")
    for each in wrong:
        show.labelled("wrong", each, "red")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
