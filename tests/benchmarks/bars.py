"""Bars that a benchmark's figures are held against, and the exit code of a miss."""

from __future__ import annotations

import sys


class Bars:
    """Collects what lies beyond its bar."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def most(self, what: str, found: float, bar: float, unit: str = "") -> None:
        """The figure may be as large as the bar; one that is not known misses it."""
        if not found <= bar:
            figures = f"{found:.4g} {unit}".rstrip()
            self.missed.append(f"{what}: expected at most {bar:g}, found {figures}")

    def code(self, code: int) -> int:
        """The exit code: that of the run, or 1 where a bar was missed; says which."""
        for line in self.missed:
            print(f"Beyond its bar: {line}", file=sys.stderr)
        return code or bool(self.missed)
