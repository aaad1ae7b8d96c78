"""The last metre to the client: one answer's messages, in time, and remembered."""

from __future__ import annotations

import asyncio
from typing import Any

from serving.answers import error_event
from serving.errors import ApiError
from serving.idempotency import Entry

JSON = "application/json"
EVENTS = "text/event-stream; charset=utf-8"
NOT_CACHED = {"cache-control": "no-store"}
# A proxy that collects the stream before it passes it on would undo the streaming.
NOT_COLLECTED = {"x-accel-buffering": "no"}


class ClientLeft(Exception):
    """Nobody is reading any more."""


class Wire:
    """Sends one answer; the head goes out with the first piece, not before.

    Until then every failure still has its own status code.
    """

    def __init__(
        self, send: Any, timeout_s: float, request_id: str, entry: Entry | None
    ):
        self._send, self.timeout_s = send, timeout_s
        self.request_id, self.entry = request_id, entry
        self.started = False
        self.failed: int | None = None  # the status of an error that came too late

    async def whole(self, body: bytes, headers: dict[str, str]) -> None:
        """Send an answer in one piece."""
        await self._head({**headers, **NOT_CACHED, "content-type": JSON}, len(body))
        await self._body(body, more=False)

    async def piece(
        self, chunk: bytes, headers: dict[str, str], *, last: bool = False
    ) -> None:
        """Send the next piece of a stream."""
        if not self.started:
            kind = {"content-type": EVENTS}
            await self._head({**headers, **NOT_CACHED, **NOT_COLLECTED, **kind})
        await self._body(chunk, more=not last)

    async def broken(self, error: ApiError) -> None:
        """End a stream that failed: the error, and no [DONE]."""
        self.failed = error.status
        await self._body(error_event(error.body(self.request_id)), more=False)

    async def replay(self) -> None:
        """Send the remembered answer again."""
        entry, self.entry = self.entry, None  # a replay is not remembered in its turn
        assert entry is not None
        body = b"".join(entry.chunks)
        await self._head({**entry.headers, "idempotent-replayed": "true"}, len(body))
        await self._body(body, more=False)

    async def _head(self, headers: dict[str, str], length: int | None = None) -> None:
        if self.entry:
            self.entry.headers = headers
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        if length is not None:
            raw.append((b"content-length", str(length).encode()))
        self.started = True
        start = {"type": "http.response.start", "status": 200, "headers": raw}
        await self._in_time(start)

    async def _body(self, body: bytes, more: bool) -> None:
        if self.entry:
            self.entry.chunks.append(body)
        await self._in_time(
            {"type": "http.response.body", "body": body, "more_body": more}
        )

    async def _in_time(self, message: dict[str, Any]) -> None:
        """A client that stops reading holds its own answer up, for so long."""
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._send(message)
        except TimeoutError:
            raise ClientLeft("stopped reading") from None
