"""The inference plane of the stand-in: answers by the shared model, without HTTP.

`plane` is the account plane as this side sees it: see `plane.Plane`, which
`state.State` fulfils. It tells whose key this is and where a name leads, and hears of
every generation that begins and ends. `completions` serves it by HTTP; batch jobs call
`await answer(plane, ...)`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fireworks.types import CompletionChunk, CompletionCreateResponse
from fireworks.types.chat import ChatCompletionChunk
from fireworks.types.chat import CompletionCreateResponse as ChatResponse
from pydantic import BaseModel

from local_cloud.fireworks import dialect
from local_cloud.fireworks.dialect import ChatBody
from local_cloud.fireworks.faults import Fault
from local_cloud.fireworks.plane import Plane, Route, Use
from local_cloud.fireworks.wire import (
    INVALID_ARGUMENT,
    NOT_FOUND,
    Refusal,
    extras,
)
from models.errors import ModelError
from models.sampling import Sampling

if TYPE_CHECKING:
    from models import AsyncStream, Model

DEADLINE_S = 120.0  # of one generation


async def answer(plane: Plane, raw: Any, account: str) -> dict[str, Any]:
    """The whole answer to one chat request, without HTTP: what a batch job runs.

    Raises:
        Refusal, ScalingUp, Broken: the request cannot be served.
    """
    ask = await understand(plane, ChatBody, raw, account, {})
    return (await collect(plane, ask))[0]


# From a request to what the engine shall do.


@dataclass(frozen=True)
class Ask:
    """A request, understood."""

    engine: Model
    body: dialect.Body
    route: Route
    ids: list[int]
    sampling: Sampling
    tenant: str
    tokenizer_s: float


async def understand(
    plane: Plane,
    kind: type[dialect.Body],
    raw: Any,
    account: str,
    headers: Mapping[str, str],
) -> Ask:
    """Check a request and prepare it.

    Raises:
        Refusal: it is malformed, not supported, or its model is not there.
        ScalingUp: its model does not serve yet.
        Broken: there is no model.
    """
    body = dialect.read(kind, raw)
    route = plane.route(body.model, account)
    if route is None:
        raise Refusal(
            NOT_FOUND,
            f"Model {body.model!r} not found, or not deployed, or not yours. Expected "
            "accounts/<account>/models/<model> or .../deployments/<deployment>.",
        )
    if not route.serves:
        raise ScalingUp(route)

    engine = plane.engine
    if engine is None:
        raise Broken("This stand-in was started without a model.")

    def prepare() -> tuple[list[int], float, Sampling]:
        start = time.perf_counter()
        ids = dialect.prompt_ids(engine, body)
        took_s = time.perf_counter() - start
        return ids, took_s, dialect.sampling(engine, body, len(ids))

    try:
        # In a thread: a new grammar takes up to 0.2 s, and others are streaming.
        ids, took_s, sampling = await asyncio.to_thread(prepare)
    except (ModelError, ValueError) as error:
        raise Refusal(INVALID_ARGUMENT, str(error)) from error
    tenant = _tenant(body, account, headers)
    return Ask(engine, body, route, ids, sampling, tenant, took_s)


def _tenant(body: dialect.Body, account: str, headers: Mapping[str, str]) -> str:
    """With whom a known beginning is shared: each affinity is a replica of its own."""
    wall = body.prompt_cache_isolation_key or headers.get(
        "x-prompt-cache-isolation-key", ""
    )
    affinity = (
        body.prompt_cache_key or body.user or headers.get("x-session-affinity", "")
    )
    return json.dumps([account, wall, affinity])


# Generating.


@asynccontextmanager
async def _generating(plane: Plane, ask: Ask) -> AsyncIterator[AsyncStream]:
    """One generation: counted when it begins, told when the block ends it."""
    start = time.perf_counter()
    try:
        stream = ask.engine.submit(
            ask.ids, ask.sampling, tenant=ask.tenant, deadline_s=DEADLINE_S
        )
    except (ModelError, ValueError) as error:
        raise Refusal(INVALID_ARGUMENT, str(error)) from error
    plane.began(ask.route)
    try:
        yield stream
    finally:
        stream.cancel()
        plane.ended(ask.route, _use(stream, time.perf_counter() - start))


def _use(stream: AsyncStream, total_s: float) -> Use:
    return Use(
        stream.prompt_tokens,
        stream.cached_tokens,
        stream.completion_tokens,
        stream.first_token_s,
        total_s,
        stream.queued_s,
        stream.finish_reason or "cancelled",
    )


def _check(stream: AsyncStream) -> None:
    if stream.finish_reason not in (None, "stop", "length"):
        raise Broken(stream.error or f"The answer ended by {stream.finish_reason!r}.")


class Broken(Exception):
    """The engine gave up on an answer."""


class ScalingUp(Exception):
    """No replica serves yet. Nothing is queued: the client must come again."""

    def __init__(self, route: Route) -> None:
        super().__init__(f"{route.deployment} is scaling up.")
        self.route = route


async def collect(
    plane: Plane, ask: Ask, fault: Fault | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole answer, checked, and its performance metrics."""
    told = dialect.Answer(ask.body)
    start = time.perf_counter()
    async with _generating(plane, ask) as stream:
        async for piece in stream:
            told.add(piece)
        _check(stream)
        use = _use(stream, time.perf_counter() - start)
        if fault:
            await asyncio.sleep(fault.seconds)
    used = dialect.usage(use.prompt_tokens, use.completion_tokens, use.cached_tokens)
    metrics = _metrics(ask, use)
    kind = ChatResponse if isinstance(ask.body, ChatBody) else CompletionCreateResponse
    return _checked(kind, told.whole(used, metrics)), metrics


async def events(
    plane: Plane, ask: Ask, fault: Fault | None
) -> AsyncGenerator[tuple[bytes, float], None]:
    """The events of a stream, each with the seconds its first token took."""
    kind = ChatCompletionChunk if isinstance(ask.body, ChatBody) else CompletionChunk
    told, sent, start = dialect.Answer(ask.body), 0, time.perf_counter()
    async with _generating(plane, ask) as stream:
        if fault and fault.kind == "slow":
            await asyncio.sleep(fault.seconds)
        async for piece in stream:
            _check(stream)
            told.add(piece)
            use = _use(stream, time.perf_counter() - start)
            chunk = told.chunk(_metrics(ask, use))
            if chunk is None:
                continue
            if fault and fault.kind != "slow" and sent == fault.after:
                if fault.kind == "error_event":
                    yield event(error("The backend failed.", "internal")), 0.0
                if fault.kind != "stall":
                    return
                await asyncio.sleep(fault.seconds)
            yield event(_checked(kind, chunk)), stream.first_token_s
            sent += 1
        if ask.body.told_usage:
            used = dialect.usage(
                stream.prompt_tokens, stream.completion_tokens, stream.cached_tokens
            )
            yield event(_checked(kind, told.last(used))), 0.0
        yield b"data: [DONE]\n\n", 0.0


def _metrics(ask: Ask, use: Use) -> dict[str, Any]:
    """What Fireworks tells of every request; more for a deployment of one's own."""
    told: dict[str, Any] = {
        "prompt-tokens": use.prompt_tokens,
        "cached-prompt-tokens": use.cached_tokens,
        "server-time-to-first-token": round(use.first_token_s, 6),
        "server-processing-time": round(use.total_s, 6),
    }
    if ask.route.deployment:
        told |= {
            "deployment": ask.route.deployment,
            "num-concurrent-requests": ask.engine.engine.snapshot().active,
            "tokenizer-duration": round(ask.tokenizer_s, 6),
            "prefill-queue-duration": round(use.queued_s, 6),
            "prefill-duration": round(use.first_token_s - use.queued_s, 6),
            "generation-duration": round(use.total_s - use.first_token_s, 6),
        }
    return told


def _checked(kind: type[BaseModel], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The answer as the SDK's own type tells it, with nothing the type has not."""
    made = kind.model_validate(fields)
    if unknown := extras(made):
        raise ValueError(f"Expected fields that {kind.__name__} has, found {unknown}.")
    return made.model_dump(mode="json", by_alias=True, exclude_unset=True)


def error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": f"{kind}_error", "code": kind}}


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"
