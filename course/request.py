"""One request to a server, and what became of it: streaming, timed piece by piece.

Only this machine is a target unless the caller says otherwise. Whatever the server
does is an `Outcome`; only a mistake of the caller is an exception.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import ipaddress
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

MAX_ERROR_BYTES = 65_536  # of a refusal's body that are read


@dataclass(frozen=True)
class Outcome:
    """What became of one request. Times in seconds, from when it was due."""

    status: int | None = None  # None: no answer came
    error: str | None = None
    finish_reason: str | None = None
    retry_after_s: float | None = None
    first_token_s: float | None = None
    gaps_s: tuple[float, ...] = ()  # between the pieces that carried text
    total_s: float = 0.0
    tokens: int = 0  # as the server counts them, else the pieces
    text: str = ""
    due_s: float = 0.0  # from the start of the run
    late_s: float = 0.0  # how much later than due it was sent

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.error is None

    @property
    def refused(self) -> bool:
        """Turned away on purpose: over a limit (429) or out of capacity (503)."""
        return self.status in (429, 503)

    @property
    def time_per_token_s(self) -> float | None:
        """Seconds from one token to the next, on average, after the first."""
        if self.first_token_s is None or self.tokens < 2:
            return None
        return sum(self.gaps_s) / (self.tokens - 1)


def client(
    base_url: str = "", headers: Mapping[str, str] | None = None
) -> httpx.AsyncClient:
    """A client fit for load: no limit on connections, and never through a proxy."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(
        base_url=base_url, headers=headers, limits=limits, trust_env=False
    )


def check_target(host: str, *, allow_remote: bool = False) -> None:
    """Raises PermissionError unless `host` is this machine."""
    if allow_remote or host == "localhost":
        return
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = False
    if not here:
        raise PermissionError(
            f"Expected a server on this machine (127.0.0.1, ::1 or localhost), found "
            f"{host!r}. Load on a machine that is not yours is an attack; if it is "
            "yours, pass allow_remote=True."
        )


async def stream_chat(
    client: httpx.AsyncClient,
    url: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
    *,
    allow_remote: bool = False,
    deadline_s: float = 120.0,
    on_piece: Callable[[int], Any] = lambda so_far: None,
) -> Outcome:
    """Sends a chat or text completion, streamed, and times each piece as it arrives.

    `on_piece` is told how many pieces have come, with each of them. Network errors,
    refusals, errors in mid-stream and streams that break off are outcomes, not
    exceptions.
    """
    asked = {"stream_options": {"include_usage": True}, **body, "stream": True}
    reader = _Answer(on_piece)
    return await _send(client, url, asked, headers, allow_remote, deadline_s, reader)


async def post(
    client: httpx.AsyncClient,
    url: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
    *,
    allow_remote: bool = False,
    deadline_s: float = 120.0,
) -> Outcome:
    """Sends a request whose answer comes in one piece; its text is the body."""
    reader = _Body()
    return await _send(client, url, body, headers, allow_remote, deadline_s, reader)


async def _send(
    client: httpx.AsyncClient,
    url: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str] | None,
    allow_remote: bool,
    deadline_s: float,
    reader: _Answer | _Body,
) -> Outcome:
    import httpx

    request = client.build_request(
        "POST", url, json=body, headers=headers, timeout=deadline_s
    )
    check_target(request.url.host, allow_remote=allow_remote)
    error = None
    try:
        async with asyncio.timeout(deadline_s):
            response = await client.send(request, stream=True, follow_redirects=False)
            try:
                await reader.read(response)
            finally:
                await response.aclose()
    except TimeoutError:
        error = f"no complete answer within {deadline_s:g} s"
    except httpx.HTTPError as problem:
        error = f"{type(problem).__name__}: {problem}"
    return reader.outcome(error)


class _Body:
    """Reads an answer that comes whole."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.status: int | None = None
        self.retry_after_s: float | None = None
        self.error: str | None = None
        self.text = ""
        self.end: float | None = None

    async def read(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.retry_after_s = _seconds(response.headers.get("retry-after"))
        if response.status_code == 200:
            await self.read_good(response)
        else:
            self.error = await _refusal(response)

    async def read_good(self, response: httpx.Response) -> None:
        self.text = (await response.aread()).decode("utf-8", "replace")

    def outcome(self, error: str | None) -> Outcome:
        return Outcome(
            status=self.status,
            error=error or self.error,
            retry_after_s=self.retry_after_s,
            total_s=(self.end or time.perf_counter()) - self.start,
            text=self.text,
        )


class _Answer(_Body):
    """Reads an answer that comes as server-sent events, in OpenAI's dialect."""

    def __init__(self, on_piece: Callable[[int], Any]) -> None:
        super().__init__()
        self.on_piece = on_piece
        self.times: list[float] = []  # of the pieces that carried text
        self.finish_reason: str | None = None
        self.tokens: int | None = None

    async def read_good(self, response: httpx.Response) -> None:
        events = Events()
        async for chunk in response.aiter_bytes():
            now = time.perf_counter()
            for data in events.feed(chunk):
                self.take(data, now)
        if self.end is None and self.error is None:
            self.error = "the stream broke off before [DONE]"

    def take(self, data: str, now: float) -> None:
        """Takes in the data of one event that arrived at `now`."""
        if data == "[DONE]":
            self.end = now
            return
        event = _event(data)
        if problem := event.get("error"):
            self.error = self.error or _message(problem)
        if usage := event.get("usage"):
            self.tokens = usage.get("completion_tokens", self.tokens)
        for choice in event.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if text := _piece(choice):
                self.times.append(now)
                self.text += text
                self.on_piece(len(self.times))

    def outcome(self, error: str | None) -> Outcome:
        times = self.times
        return replace(
            super().outcome(error),
            finish_reason=self.finish_reason,
            first_token_s=times[0] - self.start if times else None,
            gaps_s=tuple(b - a for a, b in itertools.pairwise(times)),
            tokens=len(times) if self.tokens is None else self.tokens,
        )


def _event(data: str) -> dict[str, Any]:
    with contextlib.suppress(json.JSONDecodeError):
        if isinstance(event := json.loads(data), dict):
            return event
    return {"error": f"expected a JSON object in an event, found {data[:80]!r}"}


def _piece(choice: dict[str, Any]) -> str:
    """The text a choice adds: of a chat, of a completion, or a tool's arguments."""
    delta = choice.get("delta") or {}
    calls = [call.get("function") or {} for call in delta.get("tool_calls") or ()]
    arguments = "".join(call.get("arguments") or "" for call in calls)
    return delta.get("content") or choice.get("text") or arguments


class Events:
    """Server-sent events out of bytes cut anywhere, even inside a character."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The data of every event that this chunk completed."""
        text = self._rest + self._decoder.decode(chunk)
        held = "\r" if text.endswith("\r") else ""  # half of a \r\n, perhaps
        *lines, rest = re.split(r"\r\n|\n|\r", text.removesuffix(held))
        self._rest = rest + held
        return [data for line in lines if (data := self._line(line)) is not None]

    def _line(self, line: str) -> str | None:
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        if line or not self._data:  # only an empty line ends an event
            return None
        data, self._data = "\n".join(self._data), []
        return data


async def _refusal(response: httpx.Response) -> str:
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    text = body.decode("utf-8", "replace")
    try:
        return _message(json.loads(text).get("error") or text)
    except (json.JSONDecodeError, AttributeError):  # not our envelope
        return text.strip()[:500] or f"status {response.status_code}, empty body"


def _message(problem: Any) -> str:
    if isinstance(problem, dict):
        return str(problem.get("message") or problem)
    return str(problem)


def _seconds(header: str | None) -> float | None:
    return float(header) if header and re.fullmatch(r"\d+(\.\d+)?", header) else None
