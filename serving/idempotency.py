"""The same key and the same body twice: one piece of work, one answer.

A client whose connection broke cannot know whether its request was done. With an
`Idempotency-Key` it may ask again: a finished answer is replayed byte for byte (streams
too), an unfinished one is 409, the same key with another body is 422. Only
successes are kept: who was refused, or left early, may try again and gets real work.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from fastapi import Request

from serving.errors import ApiError

MAX_KEY_CHARS = 255
MAX_ENTRIES = 10_000


@dataclass(slots=True)
class Entry:
    """One remembered request; `done` once its answer is whole."""

    name: tuple[str, str]  # tenant, key
    body_hash: bytes
    expires_at: float
    done: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of the answer."""
        return sum(map(len, self.chunks))


class Ledger:
    """Finished and running answers by (tenant, key); bounded in time and memory."""

    def __init__(self, ttl_s: float, max_bytes: int):
        self.ttl_s, self.max_bytes = ttl_s, max_bytes
        self.bytes = 0  # of finished answers
        self._entries: OrderedDict[tuple[str, str], Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def begin(self, tenant: str, key: str, path: str, body: bytes) -> Entry:
        """Open an entry, or return the finished one to replay; else 409 or 422."""
        self._forget_old()
        body_hash = hashlib.sha256(path.encode() + b"\0" + body).digest()
        name = (tenant, key)
        known = self._entries.get(name)
        if known is None:
            entry = Entry(name, body_hash, time.monotonic() + self.ttl_s)
            self._entries[name] = entry
            return entry
        if known.body_hash != body_hash:
            text = "This Idempotency-Key came with another body. Use a new key."
            raise ApiError(422, text, "idempotency_key_reused")
        if not known.done:
            text = (
                "The first request with this Idempotency-Key still runs. Wait for it."
            )
            wait = {"retry-after": "1"}
            raise ApiError(409, text, "idempotency_in_flight", headers=wait)
        return known

    def finish(self, entry: Entry) -> None:
        """Keep a whole answer for replays."""
        entry.done = True
        entry.expires_at = time.monotonic() + self.ttl_s
        self._entries.move_to_end(entry.name)  # finished answers stand by expiry
        self.bytes += entry.size
        self._forget_old()

    def abandon(self, entry: Entry) -> None:
        """Forget work that came to nothing, so that the client may try again."""
        if not entry.done:
            self._entries.pop(entry.name, None)

    def _forget_old(self) -> None:
        """Drop what expired, then the oldest until all fits; never running work."""
        now = time.monotonic()
        for entry in tuple(self._entries.values()):
            too_many = self.bytes > self.max_bytes or len(self) > MAX_ENTRIES
            if entry.done and not too_many and entry.expires_at > now:
                break
            if entry.done:
                del self._entries[entry.name]
                self.bytes -= entry.size


async def remembered(ledger: Ledger, request: Request, tenant: str) -> Entry | None:
    """The entry for the request's Idempotency-Key, if it has one: new or to replay."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 0 < len(key) <= MAX_KEY_CHARS:
        text = f"Expected an Idempotency-Key of 1 to {MAX_KEY_CHARS} characters."
        raise ApiError(400, text, "invalid_value", param="Idempotency-Key")
    return ledger.begin(tenant, key, request.url.path, await request.body())
