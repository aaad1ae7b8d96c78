"""What came of grading, as data: the only thing that anyone should trust.

A grader's exit status says nothing: a submission that calls `os._exit(0)` leaves 0
behind. Here every check that was announced has an entry, and one that never reported
has failed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from course.machine import machine_card

SCHEMA = "hosting-and-deployment/results/1"


class ResultsError(ValueError):
    """A file that holds no results."""


@dataclass(frozen=True)
class Check:
    """One claim about a submission: `passed` is None where it could not be checked."""

    name: str
    description: str
    points: int
    passed: bool | None
    message: str = ""  # why not, or why it could not be checked
    hint: str = ""
    slow: bool = False
    printed: str = ""  # by the submission, the end of it

    @property
    def score(self) -> int:
        return self.points if self.passed else 0


@dataclass(frozen=True)
class Graded:
    """One submission with all its checks."""

    exercise: str
    title: str
    file: str
    sha256: str | None  # None: there was no file
    seconds: float
    checks: tuple[Check, ...]

    @property
    def score(self) -> int:
        return sum(check.score for check in self.checks)

    @property
    def points(self) -> int:
        return sum(check.points for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]

    @property
    def unchecked(self) -> list[Check]:
        return [check for check in self.checks if check.passed is None]

    @property
    def full(self) -> bool:
        """Full marks: everything was checked, and holds."""
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        checks = [{**asdict(check), "score": check.score} for check in self.checks]
        sums = {"score": self.score, "points": self.points}
        return {**asdict(self), **sums, "checks": checks}


def write(path: Path, graded: Sequence[Graded]) -> None:
    """Writes results.json."""
    whole = {
        "schema": SCHEMA,
        "machine": machine_card(),
        "score": sum(each.score for each in graded),
        "points": sum(each.points for each in graded),
        "exercises": [each.as_json() for each in graded],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> list[Graded]:
    """Reads results.json; raises ResultsError, naming the file and what is wrong."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["schema"] != SCHEMA:
            raise ResultsError(f"{path}: expected {SCHEMA}, found {whole['schema']}.")
        return [_graded(each) for each in whole["exercises"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(
            f"{path}: expected results, found {error!r}. "
            f"Make them: python -m exercises grade --json {path}"
        ) from None


def _graded(told: dict[str, Any]) -> Graded:
    kept = {k: v for k, v in told.items() if k not in ("score", "points", "checks")}
    checks = [{k: v for k, v in c.items() if k != "score"} for c in told["checks"]]
    return Graded(**kept, checks=tuple(Check(**check) for check in checks))
