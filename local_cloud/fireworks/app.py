"""The stand-in as one app, and a server for it on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from local_cloud.fireworks import batch, completions, management, uploads
from local_cloud.fireworks.clock import Clock
from local_cloud.fireworks.deployments import Boot
from local_cloud.fireworks.state import ACCOUNT, FAKE_KEY, State
from local_cloud.fireworks.wire import (
    INVALID_ARGUMENT,
    NOT_FOUND,
    UNIMPLEMENTED,
    Refusal,
    inference_error,
    management_error,
)

if TYPE_CHECKING:
    from models import Model

START_S = 20.0  # what a server on loopback may take to listen


def create_app(state: State) -> FastAPI:
    """The API of one account. `state` is closed with the app.

    Both prefixes are there: /v1/chat/completions, which the SDK asks for when it is
    given a base URL, and /inference/v1/..., which it asks for when it is not.
    """
    app = FastAPI(title="Fireworks, a stand-in", docs_url=None, redoc_url=None)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for job in list(state.jobs.values()):
            await batch.stop(job)
        state.close()

    app.router.lifespan_context = lifespan
    app.state.fireworks = state
    app.include_router(management.router(state))
    app.include_router(uploads.router(state.uploads))
    if state.engine is not None:
        app.include_router(completions.router(state))
    app.add_exception_handler(Refusal, on_refusal)
    app.add_exception_handler(HTTPException, on_no_route)
    return app


async def on_refusal(request: Request, refusal: Exception) -> JSONResponse:
    """The error in the words of the plane it happened in."""
    assert isinstance(refusal, Refusal)
    of_models = "/completions" in request.url.path
    return (inference_error if of_models else management_error)(refusal)


async def on_no_route(request: Request, missing: Exception) -> JSONResponse:
    """A path or method that is not there; a whole name in place of an id ends here."""
    assert isinstance(missing, HTTPException)
    if missing.status_code not in (404, 405):
        return await on_refusal(request, Refusal(INVALID_ARGUMENT, missing.detail))
    code = NOT_FOUND if missing.status_code == 404 else UNIMPLEMENTED
    message = (
        f"{request.method} {request.url.path} is not there. Expected an id where a "
        "path has one: the last part of a name."
    )
    return await on_refusal(request, Refusal(code, message))


@dataclass(frozen=True)
class Served:
    """A stand-in that listens: what a client needs, and the account behind it."""

    url: str
    state: State
    api_key: str
    account_id: str = ACCOUNT

    @property
    def clock(self) -> Clock:
        return self.state.clock


@contextmanager
def serve(
    engine: Model | None = None,
    *,
    clock: Clock | None = None,
    boot: Boot | None = None,
    api_key: str = FAKE_KEY,
) -> Iterator[Served]:
    """Serve a fresh account on 127.0.0.1, on a free port, for the length of the block.

    Args:
        engine: the shared model; it stays yours to close. None: no inference.
        clock: default: real time.
        boot: how long a replica takes to boot, in virtual time.
        api_key: the account's first key; it must be a fake one.

        with models.load() as model, serve(model) as cloud:
            client = Fireworks(
                base_url=cloud.url, api_key=cloud.api_key, account_id=cloud.account_id
            )
    """
    state = State(engine, clock=clock or Clock(), boot=boot or Boot(), key=api_key)
    config = uvicorn.Config(
        create_app(state),
        host="127.0.0.1",
        port=0,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=2,  # a stalled stream must not hold the block open
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="fireworks", daemon=True)
    thread.start()
    try:
        yield Served(_address(server, thread), state, api_key)
    finally:
        server.should_exit = True
        thread.join(START_S)
        state.close()


def _address(server: uvicorn.Server, thread: threading.Thread) -> str:
    """Where it listens, as soon as it does."""
    end = time.monotonic() + START_S
    while not server.started:
        if time.monotonic() > end or not thread.is_alive():
            raise RuntimeError(
                f"Expected a server on loopback within {START_S:g} s, found none. "
                "Its log says why."
            )
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    return f"http://127.0.0.1:{port}"
