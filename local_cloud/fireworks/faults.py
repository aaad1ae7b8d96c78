"""Bad days, on demand: what a hosted API does to its clients when nobody is looking.

Nothing here happens by itself. A fault is ordered, either on the control object, for
whoever comes next:

    faults.order(Fault("rate_limit", seconds=2, times=2))

or by the request it shall strike, in a header: `x-fault: cut; after=3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Literal, get_args

HEADER = "x-fault"
Kind = Literal[
    "cut",  # the stream ends after `after` pieces, without a finish_reason
    "error_event",  # after `after` pieces an error comes in the stream
    "stall",  # after `after` pieces nothing comes for `seconds`
    "slow",  # the answer is generated, but kept back for `seconds`
    "rate_limit",  # 429, retry-after: `seconds`
    "cold",  # 503 DEPLOYMENT_SCALING_UP
    "broken",  # 500
    "delete_refused",  # a deployment's DELETE is answered 400, code 9
]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Fault:
    """One kind of trouble, and how often it strikes; `times=None` is without end."""

    kind: str
    after: int = 2  # pieces of a stream sent before it strikes
    seconds: float = 1.0
    times: int | None = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"fault: expected one of {', '.join(KINDS)}, found {self.kind!r}; "
                "order one of these"
            )
        if self.after < 1 or self.seconds < 0 or self.times == 0:
            raise ValueError(
                "fault: expected after >= 1, seconds >= 0 and times >= 1, found "
                f"{self}; correct it"
            )


class Faults:
    """The faults ordered and not yet spent. Safe to use from any thread."""

    def __init__(self) -> None:
        self._ordered: list[Fault] = []
        self._lock = Lock()

    def order(self, fault: Fault) -> None:
        """Let this happen to the next requests it can strike."""
        with self._lock:
            self._ordered.append(fault)

    def clear(self) -> None:
        """Call everything off."""
        with self._lock:
            self._ordered.clear()

    def strike(self, *kinds: str, headers: Mapping[str, str] = {}) -> Fault | None:
        """The fault of one of these kinds that strikes now, if any; uses it up once."""
        asked = from_header(headers.get(HEADER, ""))
        if asked is not None and asked.kind in kinds:
            return asked
        with self._lock:
            for place, fault in enumerate(self._ordered):
                if fault.kind not in kinds:
                    continue
                if fault.times == 1:
                    del self._ordered[place]
                elif fault.times is not None:
                    self._ordered[place] = replace(fault, times=fault.times - 1)
                return fault
        return None


def from_header(text: str) -> Fault | None:
    """Read `kind; after=3; seconds=0.5`.

    Raises:
        ValueError: it is not written like that.
    """
    if not text.strip():
        return None
    kind, *options = (part.strip() for part in text.split(";"))
    pairs = [option.partition("=") for option in options]
    given = {name.strip(): value.strip() for name, _, value in pairs}
    if unknown := set(given) - {"after", "seconds"}:
        raise ValueError(
            f"{HEADER}: expected kind; after=N; seconds=S, found {sorted(unknown)}"
        )
    return Fault(
        kind, after=int(given.get("after", 2)), seconds=float(given.get("seconds", 1))
    )
