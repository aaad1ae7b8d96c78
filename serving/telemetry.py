"""Where tracing and logging take hold of a request, if an app is given any.

The implementation is the app's owner's; without one nothing here costs or imports.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from models import AsyncStream

Exemplar = dict[str, str] | None  # the trace that a histogram names as its example


class Trace(Protocol):
    """One request on its way. No method may raise: the request goes on regardless."""

    def generates(self, kind: str, model: str, streams: Sequence[AsyncStream]) -> None:
        """Tell that answers were submitted; they are read again at the end."""
        ...

    def exemplar(self) -> Exemplar:
        """Name this trace, if it is certain by now that it will be kept."""
        ...

    def end(
        self, route: str, method: str, status: int, seconds: float, failure: str | None
    ) -> Exemplar:
        """Write everything down. `failure` is what broke, whatever the status said."""
        ...


class Telemetry(Protocol):
    """What makes traces."""

    def begin(
        self, request_id: str, headers: Iterable[tuple[bytes, bytes]]
    ) -> Trace: ...


# Set in the task that answers a request and in all tasks that it starts. The engine's
# thread has no part in it: it writes times down, which are read where this is known.
CURRENT: ContextVar[Trace | None] = ContextVar("trace", default=None)
