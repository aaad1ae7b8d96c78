"""Grades one file, in a process of its own that may do much, but not for long.

The process runs pytest with an exercise's grader and the plugin of tests/graders. It
first writes which checks there are, then loads the submission, then writes what each
check found. So a submission that ends the process, hangs or breaks it cannot make a
check disappear: what was announced and not reported has failed.

This holds against mistakes, not against malice: a submission runs with your rights.
Grade strangers' files in a container or on a machine that is thrown away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from course import process
from exercises.catalogue import ROOT, Exercise
from exercises.results import Check, Graded

PLUGIN = "tests.graders.plugin"
FINISHED = {"finished": True}  # the report's last line
GRACE_S = 2.0  # from there to the end of the process
ANNOUNCE_S = 60.0  # within which it says which checks there are
STOP_S = 5.0  # for a process that had its time
INTERRUPTED_S = 30.0  # for one that may have a container to remove
POLL_S = 0.02


class GraderError(RuntimeError):
    """The grader itself could not run: no fault of the submission."""


def grade(
    exercise: Exercise,
    file: Path | None = None,
    *,
    quick: bool = False,
    limit_s: float | None = None,
) -> Graded:
    """Runs all checks of an exercise on a file.

    Args:
        exercise: which grader.
        file: the submission; default: the exercise's own file.
        quick: leaves the slow checks out; they stay unchecked.
        limit_s: seconds the checks may take in all; default: the exercise's.
    """
    file = (file or exercise.file).resolve()
    limit_s = limit_s or exercise.limit_s
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="grade-") as folder:
        report = Path(folder) / "report.jsonl"
        env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
        argv = _command(exercise, file, report, quick)
        with process.child(argv, env=env, stop_s=INTERRUPTED_S) as running:
            ended = _wait(running, report, limit_s)
            running.stop(STOP_S)
        lines = _lines(report)
    if not lines:
        raise GraderError(
            f"Expected {exercise.grader.name} to announce its checks, found none. "
            f"Look at this machine: python -m exercises doctor. "
            f"It wrote last:\n{running.last_lines()}"
        )
    announced, *found = (line for line in lines if line != FINISHED)
    seconds = round(time.monotonic() - start, 2)
    return Graded(
        exercise=exercise.name,
        title=exercise.title,
        file=_shown(file),
        sha256=announced["sha256"],
        seconds=seconds,
        checks=_checks(announced["checks"], found, ended),
    )


def _wait(running: process.Child, report: Path, limit_s: float) -> str:
    """Waits for the end; tells why, for the checks that did not report by then.

    The limit counts from the announcement: a busy machine takes its time until there.
    """
    end, announced = time.monotonic() + ANNOUNCE_S, False
    while (code := running.process.poll()) is None:
        lines = _lines(report)
        if lines and not announced:
            end, announced = time.monotonic() + limit_s, True
        if time.monotonic() > end:
            return f"the time limit of {limit_s:g} s for all checks was over"
        if lines[-1:] == [FINISHED]:
            # A thread that the submission left running must not keep us waiting.
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(GRACE_S)
            break
        time.sleep(POLL_S)
    return f"your file ended the grader with exit code {code}"


def _command(exercise: Exercise, file: Path, report: Path, quick: bool) -> list[str]:
    """Pytest for this grader alone: no settings, no fixtures and no cache of others."""
    argv = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider"]
    argv += ["-c", os.devnull, "--rootdir", str(ROOT), "--noconftest", "--quiet"]
    argv += ["--import-mode=importlib", "--assert=plain", "--tb=native"]
    argv += ["-o", "python_functions=check_*", "-o", f"pythonpath={ROOT}"]
    argv += ["--submission", str(file), "--report", str(report)]
    return [*argv, *(["--quick-only"] if quick else []), str(exercise.grader)]


def _lines(report: Path) -> list[dict[str, Any]]:
    text = report.read_text(encoding="utf-8") if report.exists() else ""
    whole = text.rpartition("\n")[0]  # what comes after is still being written
    return [json.loads(line) for line in whole.splitlines()]


def _checks(
    announced: list[dict[str, Any]], found: list[dict[str, Any]], ended: str
) -> tuple[Check, ...]:
    outcomes = {each["name"]: each for each in found}
    lost = {"passed": False, "message": f"never finished: {ended}"}
    return tuple(Check(**{**a, **outcomes.get(a["name"], lost)}) for a in announced)


def _shown(file: Path) -> str:
    return str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)
