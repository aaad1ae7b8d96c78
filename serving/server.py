"""Serving for real: uvicorn, and a stop that breaks no stream.

A load balancer learns that a server goes away by asking `/health/ready`. So on SIGTERM
the order is: say "not ready", serve on for the drain delay, only then stop listening,
let running answers end, close the engine. uvicorn alone closes its listener first, and
whoever the balancer still sends meanwhile gets a refused connection.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from serving.settings import ConfigurationError, Settings, load

LOG = logging.getLogger("uvicorn.error")


class DrainingServer(uvicorn.Server):
    """A uvicorn that drains. `service` is told; Ctrl-C does not wait."""

    def __init__(self, config: uvicorn.Config, service: Any, drain_s: float):
        super().__init__(config)
        self.service, self.drain_s = service, drain_s
        self.draining = False
        self.loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: Any = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.service.loading is not None:
            self.service.loading.add_done_callback(self.after_load)

    def after_load(self, loading: asyncio.Future[Any]) -> None:
        """A server without a model is of no use: say why and stop."""
        if not loading.cancelled() and loading.exception():
            LOG.error("The model did not load: %s", loading.exception())
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig != signal.SIGTERM or self.draining or not self.drain_s:
            self.service.draining = True
            super().handle_exit(sig, frame)
            return
        self.draining = self.service.draining = True
        LOG.info("Draining for %.0f s before the stop.", self.drain_s)
        assert self.loop
        self.loop.call_soon_threadsafe(
            self.loop.call_later, self.drain_s, super().handle_exit, sig, frame
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a program that can serve."""
    parser.add_argument("--serve", action="store_true", help="serve the API")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")


def serve_if_asked(
    create_app: Callable[[Settings], Any], arguments: argparse.Namespace
) -> int | None:
    """Serve until a signal comes; refuse to serve everyone by accident."""
    if not arguments.serve:
        return None
    try:
        settings = load(**({"device": "cuda"} if arguments.device == "cuda" else {}))
        settings.check_exposure(arguments.host)
        app = create_app(settings)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    if not settings.keys():
        notice = "Serving without API keys: whoever reaches this address may use it."
        print(notice, flush=True)
    return serve(app, host=arguments.host, port=arguments.port)


def serve(app: Any, *, host: str, port: int) -> int:
    """Serve until a signal; 0 after a clean stop, 1 if the model did not load."""
    service = app.state.service
    settings = service.settings
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,  # /metrics counts every request; a line each costs more
        server_header=False,
        timeout_keep_alive=65,  # balancers use 60 s: they hang up first, not we
        timeout_graceful_shutdown=math.ceil(settings.request_timeout_s),
        log_level="info",
    )
    server = DrainingServer(config, service, settings.drain_s(host))
    with suppress(KeyboardInterrupt):  # uvicorn raises the signal again that stopped it
        server.run()
    return 1 if service.failure or not server.started else 0
