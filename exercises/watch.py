"""Checks again whenever a file is saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

POLL_S = 0.1


def changes(
    files: Sequence[Path], changed: Callable[[Path], bool], *, poll_s: float = POLL_S
) -> None:
    """Calls `changed` for each file at once and after each save, until it gives False.

    Args:
        files: what to look at; one that is replaced or gone for a moment is no error.
        changed: gets the file; whether to go on.
    """
    seen: dict[Path, tuple[int, int] | None] = {}
    while True:
        for file in files:
            now = _stamp(file)
            if now is not None and now != seen.get(file):
                seen[file] = now
                if not changed(file):
                    return
        time.sleep(poll_s)


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        stat = file.stat()
    except FileNotFoundError:  # editors write a new file and rename it
        return None
    return stat.st_mtime_ns, stat.st_size
