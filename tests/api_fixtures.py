"""What the API's tests share: one real model, apps around it, a real server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import httpx
import uvicorn
from fastapi import FastAPI

import models
from model_api import create_app
from serving.settings import Settings

T = TypeVar("T")

KEY, OTHER_KEY, ADMIN_KEY = (
    "inference-key-0123",
    "another-key-456789",
    "admin-key-01234567",
)
KEYS = f"{KEY},{OTHER_KEY},{ADMIN_KEY}:admin"
BEARER = {"authorization": f"Bearer {KEY}"}
NAME = "smollm2-135m-instruct"
CHAT = "/v1/chat/completions"
COLOUR = [{"role": "user", "content": "Name three colours."}]


@functools.cache
def model() -> Any:
    """Load the model once for all tests of this process."""
    return models.load(rows=8, context=1024)


def app(**settings: Any) -> FastAPI:
    """An app around the shared model; settings by their names, none from outside."""
    return create_app(Settings(**settings), model=model())


def question(**fields: Any) -> dict[str, Any]:
    """A small chat request."""
    return {"model": NAME, "messages": COLOUR, "max_tokens": 8, **fields}


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run an async test, with an end."""

    async def bounded() -> T:
        async with asyncio.timeout(60):
            return await work()

    return asyncio.run(bounded())


@contextlib.asynccontextmanager
async def client(to: FastAPI, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the app without a socket."""
    transport = httpx.ASGITransport(to)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://api", timeout=60, **options
    ) as http:
        yield http


def post(to: FastAPI, path: str, body: Any, **headers: str) -> httpx.Response:
    """One POST: a dict goes as JSON, bytes go as they are."""

    async def work() -> httpx.Response:
        async with client(to) as http:
            if isinstance(body, bytes):
                kind = {"content-type": "application/json"}
                return await http.post(path, content=body, headers={**kind, **headers})
            return await http.post(path, json=body, headers=headers)

    return run(work)


def get(to: FastAPI, path: str, **headers: str) -> httpx.Response:
    """One GET."""

    async def work() -> httpx.Response:
        async with client(to) as http:
            return await http.get(path, headers=headers)

    return run(work)


@contextlib.contextmanager
def served(what: FastAPI) -> Iterator[str]:
    """The app behind a real socket on loopback; gives its address."""
    config = uvicorn.Config(what, port=0, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        listener = server.servers[0].sockets[0]
        # Small, so that who stops reading an answer is noticed after little of it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        port = listener.getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


def until(true: Callable[[], Any], deadline_s: float = 20.0) -> None:
    """Wait for a condition; fail if it never comes."""
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end, "the awaited condition never came"
        time.sleep(0.005)
