"""A real HTTP server on loopback, one of whose routes has a fault.

    with started({"/chat": {"wait_s": 0.02, "at_once": 1}, "/search": {}}) as port:
        asyncio.run(ask_at(port, "/chat"))

Each route waits for a downstream service, which is emulated by a timer, through a pool
of `at_once` connections. Who finds none free waits, or is refused where the route has
`"refuses": true`. So a route may be as fast as the others alone, and break under load.
It runs as a process of its own, so that the load test's work does not slow it down.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio import Semaphore, StreamReader, StreamWriter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from course import process

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 0.02  # of a route without a fault
PLENTY = 1000  # connections in its pool


@contextmanager
def started(routes: Mapping[str, Mapping[str, Any]]) -> Iterator[int]:
    """Serves routes, each with its `Route` settings, on the port that it gives."""
    port = process.free_port()
    argv = [sys.executable, "-m", __name__, str(port), json.dumps(routes)]
    ready, env = f"http://127.0.0.1:{port}/ready", {"PYTHONPATH": str(ROOT)}
    with process.child(argv, env=env, ready=ready):
        yield port


async def ask_at(port: int, route: str) -> None:
    """One GET; raises ConnectionError where the answer is not 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {route} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        status = (await reader.readline()).split()[1:2]
    finally:
        writer.close()
    if status != [b"200"]:
        raise ConnectionError(f"expected 200 of {route}, found {status}")


class Route:
    """One path and its pool."""

    def __init__(
        self, wait_s: float = WAIT_S, at_once: int = PLENTY, refuses: bool = False
    ):
        self.wait_s, self.refuses = wait_s, refuses
        self.pool = Semaphore(at_once)

    async def answer(self) -> str:
        if self.refuses and self.pool.locked():
            return "503 Service Unavailable"
        async with self.pool:
            await asyncio.sleep(self.wait_s)
        return "200 OK"


async def serve(port: int, routes: dict[str, dict[str, Any]]) -> None:
    known = {path: Route(**settings) for path, settings in routes.items()}
    known["/ready"] = Route(0.0)

    async def handle(reader: StreamReader, writer: StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            route = known.get(head.split()[1].decode())
            status = await route.answer() if route else "404 Not Found"
            answer = (
                f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            writer.write(answer.encode())
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client left
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", port, backlog=1000)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), json.loads(sys.argv[2])))
