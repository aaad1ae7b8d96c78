"""A clock that tests set ahead instead of waiting."""

from __future__ import annotations

import time


class Clock:
    """The time, and as much more as a test has let pass."""

    ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s

    def millis(self, *_: object) -> float:
        """The same in milliseconds."""
        return 1000 * self()
