"""What the lesson's demonstrations do to a server: ask, leave, poison, flood, knock."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import uvicorn

from course import process
from course.load import (
    LoadReport,
    poisson_arrivals,
    run_closed_loop,
    run_open_loop,
    summarise,
)
from course.machine import read_bandwidth
from course.request import Outcome, client, post, stream_chat
from course.show import Table
from models import build
from models.sampling import Sampling
from serving.asgi import Edge
from serving.generate import FirstTokens
from serving.metrics import Metrics
from serving.telemetry import CURRENT, Telemetry

if TYPE_CHECKING:
    from models import Model

NAME = "smollm2-135m-instruct"
CHAT = "/v1/chat/completions"
# The two tokens that end an answer. Without them it has exactly max_tokens tokens.
FULL_LENGTH = {"0": -100, "2": -100}
LENGTHS = [8, 16, 8, 64] * 4  # tokens of sixteen callers' answers
STAGGER_S = 0.03  # from one caller to the next
SLO_FIRST_TOKEN_S, SLO_GAP_S = 2.0, 0.5


@contextlib.contextmanager
def running_server(device: str, **environment: str) -> Iterator[str]:
    """`model_api.py --serve` as a process of its own; gives its address."""
    lesson = Path(__file__).parent.parent / "model_api.py"
    port = process.free_port()
    argv = [sys.executable, str(lesson), "--serve", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    variables = {"TTFT_TARGET_MS": "1000", **environment}
    with process.child(
        [*argv, "--device", device],
        env=variables,
        ready=f"{url}/health/ready",
        deadline_s=300,
    ):
        yield url


def small_talk(words: int, tokens: int) -> dict[str, Any]:
    """A request of a known size, with a beginning that no cache has seen."""
    text = f"{secrets.token_hex(4)} " + "and so on " * (words // 3)
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "logit_bias": FULL_LENGTH,
    }


def floor_ms() -> float:
    """The least time of one token: all weights read once, at the memory's speed."""
    weights = build.ensure().graph.stat().st_size
    return 1000 * weights / read_bandwidth()


async def ask_alone(url: str, words: int, tokens: int, repeats: int) -> list[Outcome]:
    """Send one request after the other."""
    async with client() as http:
        return [
            await stream_chat(http, url + CHAT, small_talk(words, tokens))
            for _ in range(repeats)
        ]


def cost_table(rows: list[list[Any]], repeats: int) -> Table:
    columns = ["request", ("prompt", "words"), ("answer", "tokens")]
    columns += [("first token", "ms"), ("per token", "ms"), ("total", "ms")]
    return Table(f"One request, alone (median, n = {repeats})", columns, rows)


# ## Many callers, one model


@dataclass(frozen=True)
class Span:
    """One caller's wait, in seconds from the start of the run."""

    asked: float
    first: float  # token
    done: float


async def burst(
    model: Model, batcher: Callable[[Callable[..., Any]], Any] | None
) -> list[Span]:
    """Let all callers come within half a second, through a batcher or without one."""
    start = time.perf_counter()

    async def answer(tokens: int) -> float:
        first, ids = 0.0, model.prompt(f"{secrets.token_hex(2)}: tell me more.")
        bias = tuple((int(id), float(value)) for id, value in FULL_LENGTH.items())
        async for _ in model.submit(ids, Sampling(max_tokens=tokens, logit_bias=bias)):
            first = first or time.perf_counter() - start
        return first

    async def together(batch: Sequence[int]) -> list[float]:
        return await asyncio.gather(*map(answer, batch))

    waiting_room = batcher(together) if batcher else None
    ask = waiting_room.submit if waiting_room else answer

    async def caller(place: int) -> Span:
        await asyncio.sleep(place * STAGGER_S)
        asked = time.perf_counter() - start
        first = await ask(LENGTHS[place])
        return Span(asked, first, time.perf_counter() - start)

    serving = asyncio.create_task(waiting_room.serve()) if waiting_room else None
    try:
        return await asyncio.gather(*map(caller, range(len(LENGTHS))))
    finally:
        if serving:
            serving.cancel()


def sharing_table(rows: list[list[Any]]) -> Table:
    columns = ["way", ("throughput", "tokens/s"), ("first token, median", "s")]
    columns += [("first token, worst", "s"), ("whole answer, median", "s")]
    title = (
        f"{len(LENGTHS)} callers, answers of {min(LENGTHS)} to {max(LENGTHS)} tokens"
    )
    return Table(title, columns, rows)


def draw_spans(spans: dict[str, list[Span]], *panels: Any) -> None:
    """One bar a caller: grey while it waits, blue while its answer grows."""
    end = max(span.done for calls in spans.values() for span in calls)
    for ax, (name, calls) in zip(panels, spans.items(), strict=True):
        for place, span in enumerate(calls):
            ax.barh(place, span.first - span.asked, left=span.asked, color="#bbbbbb")
            ax.barh(place, span.done - span.first, left=span.first, color="#0072B2")
        ax.set(title=name, xlabel="seconds", xlim=(0, end))
        ax.grid(axis="y", visible=False)
        ax.invert_yaxis()
    panels[0].set_ylabel("caller")


# ## Trouble

BOMB = {"name": "x", "schema": {"type": "string", "pattern": "^(a{1000}){1000}$"}}
POISON: dict[str, dict[str, Any]] = {
    "a mistyped field": {"max_token": 5},
    "10,000 stop strings": {"stop": ["x"] * 10_000},
    "a prompt of 200,000 words": {
        "messages": [{"role": "user", "content": "word " * 200_000}]
    },
    "a schema that explodes": {
        "response_format": {"type": "json_schema", "json_schema": BOMB}
    },
}


async def poison(url: str, fields: dict[str, Any]) -> tuple[int, float, str]:
    """Status, milliseconds and message of a request nobody should send."""
    async with client() as http:
        told = await post(http, url + CHAT, {**small_talk(5, 5), **fields})
    return told.status or 0, told.total_s * 1000, told.error or "none"


def poison_table(rows: list[list[Any]]) -> Table:
    columns = ["request", "status", ("answered in", "ms"), "message"]
    short = [[*row[:3], textwrap.shorten(row[3], 60, placeholder=" …")] for row in rows]
    return Table("Poisoned requests", columns, short)


async def leave(url: str) -> float:
    """Hang up in the middle of a stream; seconds until no row is busy any more."""
    async with client(url) as http:
        body = {**small_talk(20, 400), "stream": True}
        async with http.stream("POST", CHAT, json=body) as answer:
            async for _ in answer.aiter_lines():
                break
        left = time.perf_counter()
        while (await http.get("/health/ready")).json()["active"]:
            await asyncio.sleep(0.001)
        return time.perf_counter() - left


async def overload(
    url: str, seconds: float, loads: Sequence[int]
) -> tuple[float, dict[int, tuple[LoadReport, float | None]]]:
    """Find the capacity, then send it so many times over, whatever comes back.

    Gives requests a second at best, and for each load its report and the median time
    of a refusal in milliseconds.
    """
    async with client() as http:

        def send(_: int) -> Awaitable[Outcome]:
            return stream_chat(http, url + CHAT, small_talk(20, 16))

        closed = await run_closed_loop(send, clients=16, requests=48)
        best = summarise(closed, SLO_FIRST_TOKEN_S, SLO_GAP_S).requests_per_s
        reports = {}
        for load in loads:
            arrivals = poisson_arrivals(load * best, seconds, seed=load)
            told = await run_open_loop(send, arrivals)
            refusals = [o.total_s * 1000 for o in told if o.refused]
            report = summarise(told, SLO_FIRST_TOKEN_S, SLO_GAP_S)
            reports[load] = report, median(refusals) if refusals else None
        return best, reports


def overload_table(rows: list[list[Any]], best: float) -> Table:
    columns = ["load", "sent", "answered", "refused", "failed"]
    columns += [("in time", "1/s"), ("refusal, median", "ms")]
    title = f"Load as it comes, in multiples of {best:.1f} requests/s"
    note = f"In time: first token within {SLO_FIRST_TOKEN_S:g} s of when it was due."
    return Table(title, columns, rows, note)


# ## What watching costs


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """Any app behind a real socket, in a thread of this process; gives its address."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False)
    serving = uvicorn.Server(config)
    thread = threading.Thread(target=serving.run, daemon=True)
    thread.start()
    try:
        process.wait_until(lambda: serving.started, 30, "the server to listen")
        port = serving.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        serving.should_exit = True
        thread.join(timeout=30)


async def followed(url: str, trace_id: str) -> str:
    """Ask one question as part of a trace; gives the exemplar that names it."""
    async with client(url) as http:
        traced = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
        question = small_talk(200, 24)
        await http.post(CHAT, json=question, headers=traced, timeout=60)
        accept = {"accept": "application/openmetrics-text"}
        async with asyncio.timeout(10):  # the answer comes before it is counted
            while True:
                text = (await http.get("/metrics", headers=accept)).text
                for line in text.splitlines():
                    if trace_id in line and line.startswith("http_server"):
                        return line


async def mixed(url: str, good: int, refused: int) -> None:
    """Send small requests, and some that no budget can hold."""
    async with client(url) as http:
        for _ in range(good):
            await http.get("/v1/models", timeout=60)
        for _ in range(refused):
            await http.post(CHAT, json=small_talk(3, 1990), timeout=60)


def watched_s(
    metrics: Metrics | None,
    telemetry: Telemetry | None,
    streams: Sequence[Any],
    requests: int,
) -> float:
    """CPU seconds of one request to an app that answers at once.

    It is the real outermost layer, and the app tells what `generate` tells of these
    answers; so the difference between two such times is what watching costs.
    """

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if trace := CURRENT.get():
            trace.generates("chat.completion", NAME, streams)
        exemplar = trace.exemplar() if trace else None
        if metrics:
            FirstTokens(metrics, streams).over()
        for stream in streams if metrics else ():
            metrics.generated(  # type: ignore[union-attr]
                prompt=stream.prompt_tokens,
                completion=stream.completion_tokens,
                first_s=stream.first_token_s,
                total_s=stream.total_s,
                exemplar=exemplar,
            )
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ignore(_: Any) -> None: ...

    finished = metrics.finished if metrics else lambda *_: None
    edge = Edge(
        app,
        max_body_bytes=1,
        body_timeout_s=1.0,
        on_finish=finished,
        telemetry=telemetry,
    )
    scope = {"type": "http", "method": "POST", "headers": [(b"accept", b"*/*")]}

    async def work() -> float:
        started = time.process_time()
        for _ in range(requests):
            await edge({**scope, "state": {}}, None, ignore)
        return (time.process_time() - started) / requests

    return asyncio.run(work())


def watching_s(
    model: Model, telemetry: Telemetry, requests: int
) -> tuple[float, float]:
    """CPU seconds that watching adds to a request, and that its answer takes."""
    began, answer = time.process_time(), model.stream("Hello", Sampling(max_tokens=32))
    list(answer)
    answer_s = time.process_time() - began
    metrics = Metrics(NAME, lambda: None)
    rounds = [
        watched_s(metrics, telemetry, [answer], requests)
        - watched_s(None, None, [answer], requests)
        for _ in range(5)
    ]
    return median(rounds), answer_s


# ## The door


async def try_doors(url: str, key: str, admin: str) -> Table:
    """Knock at each door once: what was tried, what came back, how OWASP names it."""
    tiny, mine, admins = small_talk(3, 1), f"Bearer {key}", f"Bearer {admin}"
    wrong = mine[:-1] + ("a" if key[-1] != "a" else "b")
    attempts = [
        ("no key", CHAT, tiny, "", "API2 broken authentication"),
        ("one letter wrong", CHAT, tiny, wrong, "API2 broken authentication"),
        ("inference key, /metrics", "/metrics", None, mine, "API5 function level"),
        ("admin key, inference", CHAT, tiny, admins, "API5 function level"),
        ("an unknown field", CHAT, {**tiny, "role": 1}, mine, "API3 property level"),
        ("over the budget", CHAT, small_talk(3, 1990), mine, "API4 consumption"),
        ("the right key", CHAT, tiny, mine, ""),
    ]
    rows = []
    async with client(url) as http:
        for name, path, body, header, risk in attempts:
            started = time.perf_counter()
            headers = {"authorization": header} if header else {}
            method = "POST" if body else "GET"
            answer = await http.request(method, path, json=body, headers=headers)
            taken_ms = (time.perf_counter() - started) * 1000
            rows.append([name, answer.status_code, taken_ms, risk])
    columns = ["attempt", "status", ("answered in", "ms"), "OWASP API risk (2023)"]
    return Table("Who gets in", columns, rows)


async def rush(url: str, key: str, callers: int, tokens: int) -> list[Outcome]:
    """Send many requests in one moment."""
    headers = {"authorization": f"Bearer {key}"}
    async with client(headers=headers) as http:
        return await asyncio.gather(
            *(
                stream_chat(http, url + CHAT, small_talk(3, tokens))
                for _ in range(callers)
            )
        )
