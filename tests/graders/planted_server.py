"""A real HTTP server on loopback with a fault planted in one of its routes.

    python tests/graders/planted_server.py 8001 '{"/a": {"wait_s": 0.02, "at_once": 1}}'

Each route waits for a downstream service, which is emulated by a timer, through a pool
of `at_once` connections. Who finds none free waits, or is refused where the route has
`"refuses": true`. So a route may be as fast as the others alone, and break under load.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio import Semaphore, StreamReader, StreamWriter
from typing import Any


class Route:
    """One path and its pool."""

    def __init__(self, wait_s: float, at_once: int = 1000, refuses: bool = False):
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
