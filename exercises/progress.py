"""What a learner reached on this machine, and copies of what was replaced."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from exercises.catalogue import ROOT, Exercise
from exercises.results import Graded

FILE = ROOT / ".exercises.json"  # git ignores it, and the folder below
BACKUPS = ROOT / ".exercises-backups"
HINTS = 3


def load() -> dict[str, dict[str, Any]]:
    """By the exercises' names; nothing yet, or a broken file, is no error."""
    try:
        known = json.loads(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    facts = known.items() if isinstance(known, dict) else ()
    return {name: fact for name, fact in facts if isinstance(fact, dict)}


def note(exercise: str, **facts: Any) -> None:
    """Keeps facts about one exercise beside those that are known."""
    known = load()
    known[exercise] = {**known.get(exercise, {}), **facts}
    new = FILE.with_suffix(".tmp")
    new.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    new.replace(FILE)


def note_result(graded: Graded) -> None:
    """Keeps the best result of the learner's own file; once solved stays solved."""
    best = load().get(graded.exercise, {})
    solved = best.get("solved", False) or (graded.score > 0 and not graded.failed)
    facts: dict[str, Any] = {"points": graded.points, "solved": solved}
    note(graded.exercise, **facts, score=max(graded.score, best.get("score", 0)))


def next_hint(exercise: Exercise) -> tuple[int, str]:
    """The next of three hints, its number first; the last one again after that."""
    steps = re.split(r"(?m)^## .*\n", exercise.hints.read_text(encoding="utf-8"))[1:]
    seen = min(load().get(exercise.name, {}).get("hints", 0) + 1, len(steps))
    note(exercise.name, hints=seen)
    return seen, re.sub(r"(?<!\n)\n(?!\n)", " ", steps[seen - 1].strip())


def back_up(file: Path) -> Path:
    """Copies a file away, and says where to."""
    BACKUPS.mkdir(exist_ok=True)
    stem = f"{file.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    taken = len(list(BACKUPS.glob(f"{stem}*")))  # two within a second
    return Path(shutil.copy2(file, BACKUPS / f"{stem}{f'-{taken}' * bool(taken)}.py"))
