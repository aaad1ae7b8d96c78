"""The outermost layer: a request id, a bound on the body, a measurement, a last resort.

One plain ASGI callable of a few microseconds. (Starlette's BaseHTTPMiddleware costs a
task and a hundred microseconds, and hides from the application that a client has left.)
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from starlette.exceptions import HTTPException

from serving.answers import error_body
from serving.telemetry import CURRENT, Exemplar, Telemetry

SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
# Any other word may come as a method too, and each would be a time series of its own.
METHODS = frozenset(
    ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
)
LOG = logging.getLogger("serving")

# route, method, status, seconds, and the trace that shows an example
OnFinish = Callable[[str, str, int, float, Exemplar], None]


class Edge:
    """What every request passes first and every answer last."""

    def __init__(
        self,
        app: Any,
        *,
        max_body_bytes: int,
        body_timeout_s: float,
        on_finish: OnFinish,
        telemetry: Telemetry | None = None,
    ):
        self.app, self.on_finish, self.telemetry = app, on_finish, telemetry
        self.max_body_bytes, self.body_timeout_s = max_body_bytes, body_timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        exchange = Exchange(scope, receive, send, self)
        trace = None
        if self.telemetry:
            trace = self.telemetry.begin(exchange.id.decode(), scope["headers"])
        token = CURRENT.set(trace)
        try:
            await exchange.run()
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in METHODS else "_OTHER"
            status, seconds = exchange.status or 499, time.perf_counter() - started
            ended = route, method, status, seconds, exchange.failure
            exemplar = trace.end(*ended) if trace else None
            # A trace tells what was sent. What is counted is how it ended: a stream
            # that broke under its 200 is a failure to whoever waited for the rest.
            counted = scope["state"].get("broken") or status
            self.on_finish(route, method, counted, seconds, exemplar)
            CURRENT.reset(token)


class Exchange:
    """One request and its answer."""

    def __init__(self, scope: Any, receive: Any, send: Any, edge: Edge):
        self.scope, self.edge = scope, edge
        self._receive, self._send = receive, send
        self.status = 0  # 0: nothing sent yet
        self.failure: str | None = "client_left"  # unless it comes to another end
        self.body_bytes, self.body_whole = 0, False
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        self.id = given if SANE_ID.fullmatch(given) else uuid4().hex.encode()
        self.declared = headers.get(b"content-length", b"0")
        scope.setdefault("state", {})["request_id"] = self.id.decode()

    async def run(self) -> None:
        if self.declared.isdigit() and int(self.declared) > self.edge.max_body_bytes:
            await self.refuse(413, too_large(self.edge.max_body_bytes))
            return
        try:
            await self.edge.app(self.scope, self.receive, self.send)
        except Exception as error:
            LOG.exception("request %s failed", self.id.decode())
            if self.status:
                self.failure = type(error).__name__
                self.scope["state"]["broken"] = 500
                raise  # too late for an answer: let the server cut the connection
            await self.refuse(500, "The server failed. Try again; tell us the id.")

    async def receive(self) -> Any:
        """Pass the body on until it is whole, too large or too slow."""
        if self.body_whole:
            return await self._receive()
        try:
            async with asyncio.timeout(self.edge.body_timeout_s):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(
                408, "The body came too slowly. Send it again."
            ) from None
        self.body_whole = not message.get("more_body", False)
        self.body_bytes += len(message.get("body", b""))
        if self.body_bytes > self.edge.max_body_bytes:
            raise HTTPException(413, too_large(self.edge.max_body_bytes))
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            headers.append((b"x-request-id", self.id))
            headers.append((b"x-content-type-options", b"nosniff"))
            if not self.body_whole and self.status in (408, 413):
                headers.append((b"connection", b"close"))  # do not read the rest
            message = {**message, "headers": headers}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.failure = None

    async def refuse(self, status: int, message: str) -> None:
        """Answer without the application."""
        kind = "server_error" if status >= 500 else "invalid_request_error"
        code = {413: "body_too_large"}.get(status, "internal_error")
        body = error_body(message, kind, code=code, request_id=self.id.decode())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await self.send(
            {"type": "http.response.start", "status": status, "headers": headers}
        )
        await self.send({"type": "http.response.body", "body": body})


def too_large(max_body_bytes: int) -> str:
    """Say how large a body may be."""
    return (
        f"Expected a body of at most {max_body_bytes:,} bytes, found more. Send fewer "
        "or shorter prompts."
    )
