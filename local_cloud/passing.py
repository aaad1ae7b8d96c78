"""What everything has in common that passes requests on, whatever it decides.

The portable balancer and the edge that breaks on command are both an ASGI callable
behind uvicorn and an HTTP client in front of the servers; they differ in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx
    import uvicorn

MOST_BYTES = 8 << 20  # of a request: it is kept whole until it is answered
# These headers are about one connection, not about the message.
HOP = (b"connection", b"keep-alive", b"transfer-encoding")


def server(app: Any, log_level: str) -> uvicorn.Server:
    """What listens to the clients, adding nothing of its own to an answer."""
    import uvicorn

    config = uvicorn.Config(
        app,
        interface="asgi3",
        lifespan="off",
        proxy_headers=False,  # they pass, whoever sent them
        log_level=log_level,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=65,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


def client(timeout: httpx.Timeout) -> httpx.AsyncClient:
    """What asks the servers: any number of connections, and no proxy between."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False)


async def unless_left(answer: Coroutine[Any, Any, None], receive: Any) -> bool:
    """Answer, unless the client leaves before; whether the answer came to its end.

    Who leaves cancels it, and so the server that was asked is told, too.
    """
    work = asyncio.create_task(answer)
    left = asyncio.create_task(receive())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        left.cancel()
        work.cancel()  # nothing, if it is done
    with suppress(asyncio.CancelledError):
        await work
        return True
    return False
