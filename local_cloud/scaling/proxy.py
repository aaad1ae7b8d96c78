"""The portable balancer: what HAProxy does, in one event loop, with any `Picker`.

    with Proxy(PowerOfTwo()) as balancer:
        balancer.add("one", "127.0.0.1", 8001)

For where HAProxy does not run, and to see how little a balancer is. It is slower by far
(every byte passes Python) and keeps the same promises: members are asked for their
health, a request whose member vanishes before its answer goes to another, streams pass
piece by piece, a drain lets what has begun go on, and a client that leaves is noticed.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from course.process import wait_until
from local_cloud import passing
from local_cloud.passing import HOP, MOST_BYTES
from local_cloud.scaling.balancer import (
    CHECK_S,
    FALL,
    READY,
    RETRIES,
    BalancerError,
    Member,
    Traffic,
    checked,
    checked_address,
)
from local_cloud.scaling.policies import Picker

if TYPE_CHECKING:
    import httpx


@dataclass(eq=False)
class Backend:
    """A member as the event loop knows it."""

    name: str
    base: str
    draining: bool = False
    bad: int = FALL  # looks in a row that failed; it has to be found ready first
    in_flight: int = 0
    taken: int = 0
    failed: int = 0

    @property
    def up(self) -> bool:
        return not self.draining and self.bad < FALL

    def seen(self) -> Member:
        state = "draining" if self.draining else "up" if self.up else "down"
        return Member(self.name, state, self.in_flight, self.taken, self.failed)


class Proxy:
    """A running proxy in a thread of its own, with no members at first.

    Args:
        picker: chooses among the members by their requests in flight.
        slots: requests a member gets at a time; the rest waits in one line.
        retries, silence_s, queue_s, check_timeout_s: as for `HAProxy`.
    """

    def __init__(
        self,
        picker: Picker,
        *,
        slots: int | None = None,
        retries: int = RETRIES,
        silence_s: float = 60.0,
        queue_s: float = 30.0,
        check_timeout_s: float = 1.0,
    ):
        checked("slots", 1 if slots is None else slots, 1, 1_000_000)
        checked("retries", retries, 0, 100)
        times = {"silence_s": silence_s, "queue_s": queue_s}
        for name, seconds in {**times, "check_timeout_s": check_timeout_s}.items():
            checked(name, seconds, 0.001, 86_400)
        self.picker, self.retries, self.slots = picker, retries, slots
        self.silence_s, self.queue_s = silence_s, queue_s
        self.check_timeout_s = check_timeout_s
        self._backends: dict[str, Backend] = {}
        self._queue = self._answered = self._retried = 0

    def __enter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = passing.server(self._serve, "error")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._run(listener),)
        )
        self._thread.start()
        try:
            wait_until(lambda: self._server.started, 10, "the proxy to listen")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._loop.close()

    async def _run(self, listener: socket.socket) -> None:
        import httpx

        self._turn, self._freed = asyncio.Lock(), asyncio.Event()
        timeout = httpx.Timeout(self.silence_s, connect=1.0)
        with listener:
            async with passing.client(timeout) as self._client:
                await self._server.serve([listener])
                watching = asyncio.all_tasks() - {asyncio.current_task()}
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)

    def add(self, name: str, host: str, port: int) -> None:
        """A new member; it gets requests once it has been found ready."""
        address = checked_address(name, host, port)
        if name in self._backends:
            raise BalancerError(f"Expected a new member's name, found {name!r} again.")
        backend = self._backends[name] = Backend(name, f"http://{address}")
        asyncio.run_coroutine_threadsafe(self._watch(backend), self._loop)

    def drain(self, name: str) -> None:
        """No new requests for it; what it has begun goes on."""
        if name not in self._backends:
            known = ", ".join(self._backends) or "none"
            raise BalancerError(
                f"Expected a member's name, found {name!r}. The members: {known}."
            )
        self._backends[name].draining = True

    def remove(self, name: str, *, deadline_s: float = 30.0) -> None:
        """Drain it, wait for what it has begun, forget it."""
        self.drain(name)
        backend, end = self._backends[name], time.monotonic() + deadline_s
        while backend.in_flight and time.monotonic() < end:
            time.sleep(0.02)
        del self._backends[name]

    def stats(self) -> Traffic:
        """What goes on now."""
        members = tuple(backend.seen() for backend in list(self._backends.values()))
        return Traffic(members, self._queue, self._answered, self._retried)

    async def _watch(self, backend: Backend) -> None:
        """Ask a member for its health as long as it is one."""
        while self._backends.get(backend.name) is backend:
            backend.bad = 0 if await self._is_ready(backend) else backend.bad + 1
            self._freed.set()  # who waits looks again
            await asyncio.sleep(CHECK_S)

    async def _is_ready(self, backend: Backend) -> bool:
        import httpx

        with suppress(httpx.TransportError, TimeoutError):
            async with asyncio.timeout(self.check_timeout_s):
                return (await self._client.get(backend.base + READY)).is_success
        return False

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        """One request, until it is answered or its client has left."""
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > MOST_BYTES or message["type"] == "http.disconnect":
                await _refuse(send, 413, f"Expected at most {MOST_BYTES:,} bytes.")
                return
            more = message.get("more_body", False)
        if await passing.unless_left(self._forward(scope, body, send), receive):
            self._answered += 1

    async def _forward(self, scope: Any, body: bytes, send: Any) -> None:
        """Try members until one answers."""
        tried: list[Backend] = []
        while len(tried) <= self.retries and (backend := await self._take(tried)):
            self._retried += bool(tried)
            tried.append(backend)
            last = len(tried) > self.retries
            try:
                if await self._answer(backend, scope, body, send, last):
                    return
            finally:  # also if the client leaves
                backend.in_flight -= 1
                self._freed.set()
        await _refuse(send, 503, "No member is available. Come later.")

    async def _answer(
        self, backend: Backend, scope: Any, body: bytes, send: Any, last: bool
    ) -> bool:
        """Ask one member; False means that another may be asked."""
        import httpx

        try:
            response = await self._client.send(
                self._request(backend, scope, body), stream=True
            )
        except httpx.TransportError as error:
            backend.failed += 1
            backend.bad += isinstance(error, httpx.ConnectError)
            return False
        try:
            backend.failed += response.status_code >= 500
            if response.status_code in (502, 503) and not last:
                return False
            # From here on there is no other try: the client has seen the beginning.
            await _pass_on(response, send)
            return True
        finally:
            await response.aclose()

    async def _take(self, tried: list[Backend]) -> Backend | None:
        """A member with a free slot, one not tried yet if possible; None if none is up.

        Who came first is served first: only the head of the line looks for a slot.
        """
        self._queue += 1
        try:
            async with asyncio.timeout(self.queue_s), self._turn:
                while up := [one for one in self._backends.values() if one.up]:
                    up = [one for one in up if one not in tried] or up
                    free = [
                        one
                        for one in up
                        if self.slots is None or one.in_flight < self.slots
                    ]
                    if free:
                        backend = free[self.picker.pick([o.in_flight for o in free])]
                        backend.in_flight += 1
                        backend.taken += 1
                        return backend
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            pass
        finally:
            self._queue -= 1
        return None

    def _request(self, backend: Backend, scope: Any, body: bytes) -> httpx.Request:
        query = scope["query_string"].decode()
        path = scope["raw_path"].decode() + (f"?{query}" if query else "")
        headers = [header for header in scope["headers"] if header[0] not in HOP]
        return self._client.build_request(
            scope["method"], backend.base + path, headers=headers, content=body
        )


async def _pass_on(response: httpx.Response, send: Any) -> None:
    """The answer as it comes, piece by piece, nothing decoded."""
    headers = [(k, v) for k, v in response.headers.raw if k.lower() not in HOP]
    status = response.status_code
    await send({"type": "http.response.start", "status": status, "headers": headers})
    async for chunk in response.aiter_raw():
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(send: Any, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})
