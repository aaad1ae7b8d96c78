"""A client that costs little: the cores it uses are the server's.

`course.request` is the client for people: it checks targets, follows the standard in
every corner and costs some hundred microseconds a token. At 800 tokens a second on two
cores that would be a tenth of what is measured. This one opens a connection for each
request, reads one kind of answer, and does so for every server alike.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from course.request import Outcome
from tests.benchmarks.servers import CHAT, Server

DEADLINE_S = 120.0


@dataclass(frozen=True)
class Reply(Outcome):
    """An outcome, with what the server says of the prompt and when it was sent."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    sent_at: float = 0.0  # on this process's clock, time.perf_counter()

    @property
    def token_times(self) -> list[float]:
        """When each piece of text came, on the same clock."""
        if self.first_token_s is None:
            return []
        first = self.sent_at + self.first_token_s
        return list(itertools.accumulate(self.gaps_s, initial=first))


async def ask(server: Server, body: Mapping[str, Any], key: str = "") -> Reply:
    """Sends a chat request, streamed; failures are replies too."""
    sent_at = time.perf_counter()
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await _ask(server, body, key, sent_at)
    except (TimeoutError, OSError, EOFError, ValueError) as problem:
        error = f"{type(problem).__name__}: {problem}"
        return Reply(error=error, total_s=time.perf_counter() - sent_at)


async def _ask(
    server: Server, body: Mapping[str, Any], key: str, sent_at: float
) -> Reply:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        writer.write(_request(server, body, key))
        status = int((await reader.readline()).split()[1])
        headers = await reader.readuntil(b"\r\n\r\n")
        if status != 200:
            error = (await reader.read()).decode("utf-8", "replace")[:300]
            total_s = time.perf_counter() - sent_at
            return Reply(status=status, error=error, total_s=total_s)
        if b"chunked" not in headers.lower():
            raise ValueError(f"expected a chunked answer, found {headers!r}")
        return await _read(reader, sent_at)
    finally:
        writer.close()


def _request(server: Server, body: Mapping[str, Any], key: str) -> bytes:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps({**body, **options, **server.extra}).encode()
    head = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Connection: close"]
    head += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    head += [f"Authorization: Bearer {key}"] if key else []
    return "\r\n".join([*head, "", ""]).encode() + content


async def _read(reader: asyncio.StreamReader, sent_at: float) -> Reply:
    times: list[float] = []
    text, usage, reason, end = "", {}, None, 0.0
    async for data in _events(reader):
        now = time.perf_counter()
        if data == b"[DONE]":
            end = now
            break
        event = json.loads(data)
        if "error" in event:
            raise ValueError(event["error"])
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            reason = choice["finish_reason"] or reason
            if piece := choice["delta"].get("content"):
                times.append(now)
                text += piece
    if not end:
        raise EOFError("the stream broke off before [DONE]")
    return Reply(
        status=200,
        finish_reason=reason,
        first_token_s=times[0] - sent_at if times else None,
        gaps_s=tuple(b - a for a, b in itertools.pairwise(times)),
        total_s=end - sent_at,
        tokens=usage["completion_tokens"],
        text=text,
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get(
            "cached_tokens", 0
        ),
        sent_at=sent_at,
    )


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of each server-sent event, out of HTTP's chunks."""
    rest = b""
    while size := int(await reader.readline(), 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *events, rest = rest.split(b"\n\n")
        for event in events:
            yield event.removeprefix(b"data: ")
