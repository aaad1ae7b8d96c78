"""The inference plane by HTTP: chat and text completions, whole or streamed.

    app.include_router(completions.router(plane))

Two prefixes, because the SDK uses both: /inference/v1 without a base_url, /v1 with one.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from local_cloud.fireworks import dialect, inference
from local_cloud.fireworks.dialect import ChatBody, TextBody
from local_cloud.fireworks.faults import Faults
from local_cloud.fireworks.plane import Plane
from local_cloud.fireworks.wire import INVALID_ARGUMENT, UNAUTHENTICATED, Refusal

PREFIXES = ("/v1", "/inference/v1")
SCALING_UP = {  # without retry-after, as the service answers it
    "error": {
        "message": "The deployment is scaled to zero and is scaling up. Nothing was "
        "queued: ask again in a few minutes.",
        "code": "DEPLOYMENT_SCALING_UP",
        "type": "error",
    }
}
T = TypeVar("T")


def router(plane: Plane) -> APIRouter:
    """The routes of both prefixes."""
    made = APIRouter()

    async def chat(request: Request) -> Response:
        return await _respond(plane, ChatBody, request)

    async def complete(request: Request) -> Response:
        return await _respond(plane, TextBody, request)

    for prefix in PREFIXES:
        made.post(f"{prefix}/chat/completions")(chat)
        made.post(f"{prefix}/completions")(complete)
    return made


async def _respond(
    plane: Plane, kind: type[dialect.Body], request: Request
) -> Response:
    """Answer a request, and turn whatever goes wrong into its error."""
    heads = {"x-request-id": secrets.token_hex(12)}
    route = None
    try:
        account = plane.account(_key(request))
        if account is None:
            raise Refusal(UNAUTHENTICATED, "The API key you provided is invalid.")
        if struck := _struck(plane.faults, request):
            made = struck
        else:
            ask = await inference.understand(
                plane, kind, await _json(request), account, request.headers
            )
            route = ask.route
            made = await _unless_gone(request, _answered(plane, ask, request))
    except Refusal as refusal:
        kind_of = {401: "authentication", 404: "not_found"}
        told = inference.error(
            str(refusal), kind_of.get(refusal.status, "invalid_request")
        )
        made = JSONResponse(told, refusal.status)
    except inference.ScalingUp as sleeping:
        route = sleeping.route
        made = JSONResponse(SCALING_UP, 503)
    except inference.Broken as broken:
        made = JSONResponse(inference.error(str(broken), "internal"), 500)
    if made.status_code >= 400:
        plane.refused(route, made.status_code)
    made.headers.update(heads)
    return made


async def _answered(plane: Plane, ask: inference.Ask, request: Request) -> Response:
    strike = plane.faults.strike
    if not ask.body.stream:
        fault = strike("slow", headers=request.headers)
        told, metrics = await inference.collect(plane, ask, fault)
        return JSONResponse(
            told, headers={f"fireworks-{k}": str(v) for k, v in metrics.items()}
        )
    fault = strike("cut", "error_event", "stall", "slow", headers=request.headers)
    events = inference.events(plane, ask, fault)
    # The head waits for the first event: it tells how long that took, and until then
    # a failure still has a status of its own.
    first, first_s = await anext(events)
    head = {
        "fireworks-prompt-tokens": str(len(ask.ids)),
        "fireworks-server-time-to-first-token": str(round(first_s, 6)),
    }
    return Events(first, events, head)


class Events(StreamingResponse):
    """A stream whose generation ends with it, also when nobody reads on."""

    def __init__(
        self, first: bytes, events: AsyncGenerator[Any, None], headers: dict[str, str]
    ) -> None:
        self._events = events

        async def rest() -> AsyncIterator[bytes]:
            yield first
            try:
                async for event, _ in events:
                    yield event
            except inference.Broken as broken:
                yield inference.event(inference.error(str(broken), "internal"))

        super().__init__(rest(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, or stop it in the moment the client hangs up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(INVALID_ARGUMENT, "The client hung up.")  # nobody reads it
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _key(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refusal(
            INVALID_ARGUMENT, f"Expected a JSON object as the body, found: {error}."
        ) from error


def _struck(faults: Faults, request: Request) -> Response | None:
    """The error that was ordered for this request, if one was."""
    try:
        fault = faults.strike("rate_limit", "cold", "broken", headers=request.headers)
    except ValueError as error:
        raise Refusal(INVALID_ARGUMENT, str(error)) from error
    if fault is None:
        return None
    if fault.kind == "cold":
        return JSONResponse(SCALING_UP, 503)
    if fault.kind == "rate_limit":
        error = inference.error(
            "Rate limit exceeded, please try again later.", "rate_limit"
        )
        return JSONResponse(error, 429, {"retry-after": f"{fault.seconds:g}"})
    return JSONResponse(inference.error("The backend failed.", "internal"), 500)
