"""A model API that strangers may call: the lesson, and the production server itself.

A script that calls a model works until the second caller comes. Then one of them waits,
a third leaves and is still being answered, a fourth sends a prompt of a million
characters, a fifth has no right to be there, and nobody can say which. This file turns
the shared model into a service that holds under all of that, in the dialect that every
client already speaks: OpenAI's.

You will see: what one request costs and where its time goes; three ways to let many
callers share one model; what happens when a client leaves, when four times too many
come, when a request is poisoned; and who may spend how much.

Run it:     python model_api.py              all four sections, under a minute
            python model_api.py 2 --quick    one section, rough figures, soon
            python model_api.py --serve      the server, at http://127.0.0.1:8000
Import it:  from model_api import create_app
Needs:      pip install -r requirements.txt (the first run also builds the model)
Next:       open http://127.0.0.1:8000 in two windows, ask in both, watch the slots
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

import models
from course import lesson
from course.measure import Series
from models.errors import EngineClosed, GrammarError, ModelError, PromptTooLong, TooLate
from serving import answers, contract, health, pages, protocol, server, trials
from serving.asgi import Edge
from serving.errors import (
    ApiError,
    failed_answer,
    http_error,
    invalid_request,
    over_budget,
)
from serving.generate import generate
from serving.idempotency import remembered
from serving.limits import OverBudget, Reservation
from serving.metrics import CONTENT_TYPE
from serving.plan import plan_chat, plan_classification, plan_completion
from serving.service import Service, service_of
from serving.settings import Settings, is_loopback, load
from serving.wire import ClientLeft, Wire

if TYPE_CHECKING:
    from models import Model
    from serving.telemetry import Telemetry

# ## Design RESTful endpoints for model inference
#
# A request to a language model has two costs. Reading the prompt (prefill) takes all
# its tokens at once and is bound by arithmetic. Writing the answer (decode) takes one
# step a token, and each step reads all the weights: it is bound by memory. So the
# length of the answer decides how long a caller waits, and streaming decides how long
# it feels.
#
# The design follows. Answers can stream. `max_tokens` always has a value. Every answer
# says in `usage` what it cost. And health is four questions, not one, because "is it
# still loading", "is the process up", "should it get requests" and "does its work
# progress" call for different actions: wait, restart, send elsewhere, restart.


def create_app(
    settings: Settings | None = None,
    *,
    model: Model | None = None,
    telemetry: Telemetry | None = None,
) -> FastAPI:
    """Build the API around the given model (which stays yours to close), or load one.

    Requests are traced and logged by `telemetry`, if there is one.

    There is no `app` at module level. A server that imports this file by name would
    run it twice (once as `__main__`): two models, and every metric registered twice.
    """
    service = Service(settings or load(), model)
    app = FastAPI(
        title="Model API",
        version="1.0.0",
        description="A language model in OpenAI's dialect.",
        docs_url=None,
        redoc_url=None,
        lifespan=service.lifespan,
        # FastAPI's own would export what callers sent, with every validation error.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = service
    app.router.route_class = KeyedRoute
    add_routes(app)
    for kind in EXPLAINED:
        app.add_exception_handler(kind, on_error)
    app.add_middleware(
        Edge,
        max_body_bytes=service.settings.max_body_bytes,
        body_timeout_s=service.settings.body_timeout_s,
        on_finish=service.metrics.finished,
        telemetry=telemetry,
    )
    contract.describe(app)
    return app


def add_routes(app: FastAPI) -> None:
    """The whole API as a table: path, answer, whose key opens it, function."""
    work, open_to_all, own = contract.work, contract.health, "inference"
    app.post("/v1/chat/completions", **work(answers.ChatCompletion, own))(chat)
    app.post("/v1/completions", **work(answers.TextCompletion, own))(complete)
    app.post("/v1/classify", **work(answers.Classification, own))(classify)
    app.get("/v1/models", **contract.read(answers.ModelList, own))(health.list_models)
    app.get("/health/startup", **open_to_all(answers.Health))(health.startup)
    app.get("/health/live", **open_to_all(answers.Health))(health.live)
    app.get("/health/ready", **open_to_all(answers.Ready))(health.ready)
    app.get("/health/progress", **open_to_all(answers.Health))(health.progress)
    app.get("/metrics", **contract.text(CONTENT_TYPE, "admin"))(health.scrape)
    app.get("/", include_in_schema=False)(pages.chat)
    app.get("/docs", include_in_schema=False)(pages.docs)


async def chat(request: Request, body: protocol.ChatRequest) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    model = service.served(body.model)
    job = await plan_chat(model, body, service.settings)
    return Answer(request, job.most_tokens, partial(generate, service, job))


async def complete(request: Request, body: protocol.CompletionRequest) -> Response:
    """Continue a text, or many: a list of prompts is the batch form."""
    service = service_of(request)
    model = service.served(body.model)
    job = await plan_completion(model, body, service.settings)
    return Answer(request, job.most_tokens, partial(generate, service, job))


async def classify(request: Request, body: protocol.ClassifyRequest) -> Response:
    """Find the label that fits each text best: the plain `predict` of other models."""
    service = service_of(request)
    model = service.served(body.model)
    job = await plan_classification(model, body, service.settings)
    return Answer(request, job.most_tokens, partial(job.run, model))


def demo_endpoints(run: lesson.Run) -> None:
    """Take a request apart: what reading costs, and what writing costs."""
    floor_ms = trials.floor_ms()
    run.predict(
        f"The CPU needs {floor_ms:.1f} ms to read the weights once, so an answer alone "
        f"cannot grow by more than {1000 / floor_ms:.0f} tokens a second."
    )
    url = run.keep("server", partial(trials.running_server, run.device))
    shapes = {"short": (20, 8), "long prompt": (620, 8), "long answer": (20, 48)}
    repeats, rows = 1 if run.quick else 3, {}
    for name, (words, tokens) in shapes.items():
        told = asyncio.run(trials.ask_alone(url, words, tokens, repeats))
        times = [(o.first_token_s, o.time_per_token_s, o.total_s) for o in told]
        medians = [Series(column).median * 1000 for column in zip(*times, strict=True)]
        rows[name] = [name, words, tokens, *medians]
    run.table(trials.cost_table(list(rows.values()), repeats))
    read_ms = (rows["long prompt"][3] - rows["short"][3]) / 600
    write_ms = rows["long answer"][4]
    run.conclude(
        f"A token of answer takes {write_ms:.1f} ms, {write_ms / floor_ms:.1f} times "
        f"the floor and {write_ms / read_ms:.0f} times a word of prompt. Bound both, "
        "count both."
    )


# ## Handle batch requests efficiently
#
# A decode step reads the same weights whether one answer grows by a token or thirty-two
# do. So answers should grow together, and there are three ways to arrange it:
#
# - One at a time. The weights are read for one token of one answer.
# - Dynamic batching, below. Collect calls for some milliseconds, run them as one batch.
#   Right where every call takes the same time (classifiers, image models). Here the
#   batch lasts as long as its longest answer; who comes a moment late waits it out.
# - Continuous batching. The batch is made anew at every step: who is done leaves, who
#   waits joins. The engine in models/ does this. So a batch request needs no code: its
#   prompts are handed over at once, and share the steps with everyone else's.


class DynamicBatcher:
    """Collects calls until `most` are there or `window_s` is over, then runs them."""

    def __init__(self, run: RunBatch, *, most: int, window_s: float):
        self.run, self.most, self.window_s = run, most, window_s
        self.calls: asyncio.Queue[tuple[Any, asyncio.Future]] = asyncio.Queue()

    async def submit(self, item: Any) -> Any:
        """Hand in one item and wait for its result."""
        result = asyncio.get_running_loop().create_future()
        self.calls.put_nowait((item, result))
        return await result

    async def serve(self) -> None:
        """Run batch after batch, until cancelled."""
        while True:
            batch = await self.collect()
            try:
                results = await self.run([item for item, _ in batch])
                if (found := len(results)) != len(batch):
                    text = f"run: expected a result a call, {len(batch)}, found {found}"
                    raise ValueError(text)
            except Exception as error:
                results = [error] * len(batch)  # the batch's failure is each caller's
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue  # its caller left; the others keep their places
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    async def collect(self) -> list[tuple[Any, asyncio.Future]]:
        """The first call opens the window; fullness or time closes it."""
        batch = [await self.calls.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self.window_s):
                while len(batch) < self.most:
                    batch.append(await self.calls.get())
        return batch


RunBatch = Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]


def demo_batching(run: lesson.Run) -> None:
    """Let sixteen callers share one model in each of the three ways."""
    model = run.keep("model", partial(models.load, run.device, rows=16, context=1024))
    run.predict("Continuous batching writes most tokens a second and waits least.")
    ways = {
        "one at a time": partial(DynamicBatcher, most=1, window_s=0.0),
        "dynamic": partial(DynamicBatcher, most=8, window_s=0.02),
        "continuous": None,
    }
    rows, spans = [], {}
    for name, batcher in ways.items():
        spans[name] = calls = asyncio.run(trials.burst(model, batcher))
        first = Series(tuple(call.first - call.asked for call in calls))
        whole = Series(tuple(call.done - call.asked for call in calls))
        rate = sum(trials.LENGTHS) / max(call.done for call in calls)
        rows.append([name, rate, first.median, first.max, whole.median])
    run.table(trials.sharing_table(rows))
    draw = partial(trials.draw_spans, spans)
    run.picture(draw, "batching", panels=3, size=(12, 4.5))
    single, dynamic, continuous = rows
    run.conclude(
        f"In a second, continuous batching wrote {continuous[1] / single[1]:.1f} times "
        f"the tokens of one at a time and {continuous[1] / dynamic[1]:.1f} times those "
        f"of dynamic batches, where the median caller waited "
        f"{dynamic[2] / continuous[2]:.1f} times as long for a first token."
    )


# ## Implement proper error handling
#
# An error is an answer too, and the one that is read most carefully. All errors have
# one shape, whoever raised them: {"error": {"message", "type", "param", "code"}}, where
# the message says what was expected, what was found and what to do. The status tells a
# machine the same: 4xx is yours to mend, 5xx is ours, 429 and 503 mean "not now" and
# say when in Retry-After.
#
# Three rules keep one caller's trouble from becoming everyone's:
#
# - Say no early. A queue that is longer than callers will wait makes every answer late,
#   and the machine busy with answers nobody wants. What cannot start in time is refused
#   before any work, in milliseconds, with the time it would take as Retry-After.
# - Stop when nobody listens. HTTP does not cancel a handler whose client has left, so
#   the work races against the disconnect, in the queue, in prefill and in decode.
# - Promise nothing that cannot be kept. A stream's status line is sent with its first
#   piece. Should it break later, it ends in an `error` event and without [DONE].


def explain(error: Exception) -> ApiError:
    """Decide what each exception means to the caller."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return invalid_request(error)
        case HTTPException():
            return http_error(error)
        case PromptTooLong():
            return ApiError(400, str(error), "context_length_exceeded")
        case GrammarError():
            return ApiError(400, str(error), "unsupported_schema")
        case OverBudget():
            return over_budget(error)
        case EngineClosed():
            return failed_answer("cancelled")
        case TooLate():
            return failed_answer("deadline")
        case ModelError():
            return failed_answer("error")
    raise error


EXPLAINED = (ApiError, RequestValidationError, HTTPException, ModelError, OverBudget)


async def on_error(request: Request, error: Exception) -> Response:
    """Put any of them into the one envelope."""
    told = explain(error)
    service, tenant = service_of(request), getattr(request.state, "tenant", None)
    headers = await service.budgets.headers(tenant) if tenant else {}
    service.metrics.refuse(told.code)
    body = told.body(request.state.request_id)
    return Response(body, told.status, {**headers, **told.headers}, "application/json")


def refuse_if_late(model: Model, target_s: float) -> None:
    """Shed load: refuse whoever others would keep waiting longer than the target.

    What counts is the work ahead of a newcomer. Its own prompt does not: a long prompt
    on an idle machine is slow, not unwelcome.
    """
    wait_s = model.engine.estimate_first_token_s(0)
    if wait_s <= target_s:
        return
    text = (
        f"The queue is {wait_s:.1f} s long, the bound is {target_s:.1f} s. Come later."
    )
    after_s = max(1, math.ceil(wait_s - target_s))
    raise ApiError(503, text, "overloaded", headers={"retry-after": str(after_s)})


async def unless_client_leaves(receive: Any, work: Coroutine[Any, Any, bool]) -> bool:
    """Run the work, or cancel it in the moment the client hangs up."""

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    job, left = asyncio.create_task(work), asyncio.create_task(hang_up())
    try:
        await asyncio.wait({job, left}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientLeft("hung up")
        return job.result()
    finally:
        job.cancel()
        left.cancel()
        await asyncio.gather(job, left, return_exceptions=True)


class Answer(Response):
    """Work on its way to one client; the order of its steps is the policy."""

    def __init__(self, request: Request, most_tokens: int, work: Work):
        super().__init__()
        self.request, self.most_tokens, self.do = request, most_tokens, work
        self.service, self.tenant = service_of(request), request.state.tenant

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Replay, or work until done or until nobody listens."""
        service, request = self.service, self.request
        entry = await remembered(service.ledger, request, self.tenant)
        timeout_s = service.settings.send_timeout_s
        wire = Wire(send, timeout_s, request.state.request_id, entry)
        try:
            if entry and entry.done:
                await wire.replay()
                return
            whole = await unless_client_leaves(receive, self.work(wire))
            if entry and whole:
                service.ledger.finish(entry)
        except ClientLeft:
            service.metrics.cancelled.inc()
        finally:
            request.state.broken = wire.failed
            if entry:
                service.ledger.abandon(entry)

    async def work(self, wire: Wire) -> bool:
        """Refuse what would be late, reserve the worst case, work, settle the rest."""
        service = self.service
        refuse_if_late(service.served(), service.settings.ttft_target_ms / 1000)
        reservation = await service.budgets.reserve(self.tenant, self.most_tokens)
        try:
            headers = await service.budgets.headers(self.tenant)
            return await self.do(wire, reservation, headers)
        finally:
            await service.budgets.settle(reservation)


Work = Callable[[Wire, Reservation, dict[str, str]], Awaitable[bool]]


def demo_errors(run: lesson.Run) -> None:
    """Leave, poison, overload, and see what it costs the server."""
    url = run.keep("server", partial(trials.running_server, run.device))
    run.predict("Leaving frees the row within a step; refusals take milliseconds.")
    freed_ms = asyncio.run(trials.leave(url)) * 1000
    run.fact("from hanging up to a free row", freed_ms, "ms")
    poisoned = [
        [name, *asyncio.run(trials.poison(url, fields))]
        for name, fields in trials.POISON.items()
    ]
    run.table(trials.poison_table(poisoned))
    seconds = 3.0 if run.quick else 6.0
    best, told = asyncio.run(trials.overload(url, seconds, loads=(1, 2, 4)))
    rows = [
        [f"{load}x", r.requests, r.ok, r.refused, r.failed, r.goodput_per_s, refusal_ms]
        for load, (r, refusal_ms) in told.items()
    ]
    run.table(trials.overload_table(rows, best))
    kept = rows[-1][5] / max(row[5] for row in rows)
    run.conclude(
        f"At four times what the server can do, {kept:.0%} of its best rate of answers "
        f"in time remained; {rows[-1][3]} requests were refused before they cost work."
    )


# ## Add authentication and request validation
#
# A key says who calls; a budget says how much of the machine is theirs. Both come
# before any work, and the key before the body is even read.
#
# Keys are random and long, so their SHA-256 is all the server keeps: who reads its
# memory or its configuration dump gets no key. A caller's digest is compared with every
# key's in constant time, so that the time of a refusal tells nothing about how close a
# guess was.
#
# Budgets count requests and tokens, because the cost of one request varies a
# thousandfold. The worst case (prompt plus max_tokens) is reserved before work and the
# rest given back after, or fifty requests sent at once would all pass the same check. A
# refusal costs nothing.


def authenticate(request: Request, scope: str) -> str:
    """Find the caller's key and see that it opens this scope.

    Gives back the tenant: the name under which budgets, caches and ledgers keep callers
    apart.
    """
    keys = service_of(request).keys
    if not keys:  # on loopback, or with ALLOW_ANONYMOUS=1: see check_exposure
        host = request.client.host if request.client else "unknown"
        if scope == "admin" and not is_loopback(host):
            raise ApiError(403, "Without keys, only this machine may.", "no_keys")
        return f"anonymous-{host}"
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(secret.strip().encode()).digest()
    found = None
    for key in keys:  # all of them, always: no early way out to measure
        if hmac.compare_digest(key.digest, digest):
            found = key
    if found is None or kind.lower() != "bearer":
        text = "Expected the header `Authorization: Bearer <API key>` with a valid key."
        challenge = {"www-authenticate": 'Bearer realm="model-api"'}
        raise ApiError(401, text, "invalid_api_key", headers=challenge)
    if scope not in found.scopes:
        has = " and ".join(sorted(found.scopes))
        text = f"This key opens {has}; expected one with the scope {scope}."
        raise ApiError(403, text, "insufficient_scope")
    return found.tenant


class KeyedRoute(APIRoute):
    """A route that asks for the key first, and reads JSON once and strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's own handler."""
        handle = super().get_route_handler()
        scope = contract.declared_scope(self.openapi_extra)

        async def keyed(request: Request) -> Response:
            if scope:
                request.state.tenant = authenticate(request, scope)
            strict = protocol.StrictRequest(request.scope, request.receive)
            return await handle(strict)

        return keyed


def demo_keys(run: lesson.Run) -> None:
    """Try the door: without a key, with the wrong one, too often, all at once."""
    key, admin = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    limits = {"TOKENS_PER_MINUTE": "2000", "TTFT_TARGET_MS": "60000"}
    keys = {"API_KEYS": f"{key},{admin}:admin"}
    run.predict("Of fifty requests at once, only what the budget holds gets in.")
    with trials.running_server(run.device, **limits, **keys) as url:
        run.table(asyncio.run(trials.try_doors(url, key, admin)))
        told = asyncio.run(trials.rush(url, key, callers=50, tokens=40))
    spent = sum(outcome.tokens for outcome in told)
    run.conclude(
        f"Of 50 requests at once {sum(o.ok for o in told)} got in and wrote {spent} "
        f"tokens, {sum(o.status == 429 for o in told)} were told to wait. The budget: "
        "2,000 tokens a minute, prompts included."
    )


SECTIONS = [
    lesson.Section("Design RESTful endpoints for model inference", demo_endpoints),
    lesson.Section("Handle batch requests efficiently", demo_batching),
    lesson.Section("Implement proper error handling", demo_errors),
    lesson.Section("Add authentication and request validation", demo_keys),
]


def main(argv: list[str] | None = None) -> int:
    """Serve, or run the lesson."""
    return lesson.run(
        doc=__doc__,
        sections=SECTIONS,
        argv=argv,
        number=2,
        model_digest=models.prepare,
        after="python model_api.py --serve, then open http://127.0.0.1:8000",
        add_arguments=server.add_arguments,
        instead=partial(server.serve_if_asked, create_app),
    )


if __name__ == "__main__":
    raise SystemExit(main())
