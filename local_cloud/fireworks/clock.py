"""Virtual time: windows of five minutes that pass in milliseconds."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime


class Clock:
    """Virtual seconds since 1970. They follow real ones, faster, or only on demand.

    Args:
        factor: virtual seconds that pass in a real one: 1 is real time, 600 makes ten
            minutes of a second, 0 stands still until `advance`.
        start: where it begins; default: now.
    """

    def __init__(self, factor: float = 1.0, *, start: float | None = None) -> None:
        if factor < 0:
            raise ValueError(
                f"Expected a factor of 0 or more, found {factor}. Time cannot run "
                "backwards: use 0 for a clock that moves by `advance` alone."
            )
        self.factor = factor
        self._origin = time.monotonic()
        self._start = time.time() if start is None else start
        self._advanced = 0.0
        self._lock = threading.Lock()

    @classmethod
    def manual(cls, start: float | None = None) -> Clock:
        """A clock that moves by `advance` alone."""
        return cls(0.0, start=start)

    def now(self) -> float:
        """Virtual seconds since 1970."""
        real_s = time.monotonic() - self._origin
        return self._start + real_s * self.factor + self._advanced

    def advance(self, seconds: float) -> None:
        """Let virtual time pass at once, on top of what passes by itself."""
        if seconds < 0:
            raise ValueError(f"Expected seconds of 0 or more, found {seconds}.")
        with self._lock:
            self._advanced += seconds

    def virtual(self, real_s: float) -> float:
        """What a real duration is here. On a manual clock, work takes what it takes."""
        return real_s * self.factor if self.factor else real_s


def moment(seconds: float) -> datetime:
    """A virtual time as the API shows it."""
    return datetime.fromtimestamp(seconds, UTC)
