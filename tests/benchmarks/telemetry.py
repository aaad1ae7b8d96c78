"""What watching costs: metrics, traces and log lines, alone and beside real answers.

Three questions. What does a request cost that does nothing but be watched, with no
traces, with one of ten kept, with all kept? How long is a scrape after real traffic?
And does an instrumented API answer as many requests as a bare one? For the last, two
apps share one model in one process and take turns, so that a slow minute hits both. It
ends with 1 where a figure is beyond its bar.

CPU time is that of the whole process, the thread that exports spans included.

Run it:     python -m tests.benchmarks.telemetry [--quick]     two minutes
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import httpx

import models
from course import lesson
from course.measure import Paired, Series
from course.show import Table
from local_cloud.monitoring import logs
from local_cloud.monitoring.traces import SQLiteSpans, Tracing
from model_api import create_app
from monitoring_setup import JsonLines, worth_keeping
from serving import trials
from serving.metrics import Metrics
from serving.settings import Settings
from tests.benchmarks import AFTER_LESSONS
from tests.benchmarks.bars import Bars

METRICS_US, STACK_US, SHARE, SCRAPE_MS, THROUGHPUT = 6.0, 150.0, 0.001, 5.0, 0.01
REQUESTS = 500  # of one turn
CLIENTS, EACH, TOKENS = 8, 3, 32  # of one turn of real requests
ROUNDS, QUICK_ROUNDS = 15, 5
BARS = Bars()
OPEN = {"ttft_target_ms": 60_000, "requests_per_minute": 0, "tokens_per_minute": 0}


@dataclass
class Rig:
    """One model, telemetry, and two apps: the bare one and the watched one."""

    model: models.Model
    tracing: Tracing
    bare: Any
    watched: Any


@contextmanager
def rig(device: str) -> Iterator[Rig]:
    with (
        models.load(device, rows=CLIENTS) as model,
        closing(SQLiteSpans()) as store,
        open("/dev/null", "w") as sink,
        logs.lines(JsonLines(), sink, "serving"),
        Tracing(store, worth_keeping) as tracing,
    ):
        watched = create_app(Settings(**OPEN), model=model, telemetry=tracing)
        with mock.patch("serving.service.Metrics", Unmetered):
            bare = create_app(Settings(**OPEN), model=model)
        yield Rig(model, tracing, bare, watched)


class Unmetered(Metrics):
    """Metrics that count nothing: what they cost shall be in the difference."""

    def finished(self, *_: Any) -> None: ...
    def first(self, *_: Any) -> None: ...
    def generated(self, **_: Any) -> None: ...


def a_request(run: lesson.Run) -> None:
    """A request that is only watched, beside the CPU of a real one."""
    shared = run.keep("rig", partial(rig, run.device))
    run.predict(
        f"Metrics take at most {METRICS_US:g} µs, everything {STACK_US:g} µs and "
        f"{SHARE:.1%} of a request's CPU."
    )
    answer = shared.model.stream("Tell me a story.")
    list(answer)
    metrics, tracing = Metrics(trials.NAME, lambda: None), shared.tracing
    ways: dict[str, tuple[Metrics | None, Tracing | None, Any]] = {
        "nothing": (None, None, None),
        "metrics": (metrics, None, None),
        "metrics, log, one trace of ten": (metrics, tracing, worth_keeping),
        "metrics, log, every trace": (metrics, tracing, lambda *_: True),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(QUICK_ROUNDS if run.quick else ROUNDS):
        for name, (metered, traced, keep) in ways.items():
            tracing.keep = keep
            times[name].append(trials.watched_s(metered, traced, [answer], REQUESTS))
            tracing.flush()
    tracing.keep = worth_keeping
    cpu_s = asyncio.run(real_cpu_s(shared.bare))
    rows = []
    for name in list(ways)[1:]:
        pairs = zip(times[name], times["nothing"], strict=True)
        added = Series(tuple(1e6 * (a - b) for a, b in pairs))
        share = added.median / cpu_s / 1e4
        rows.append([name, added.median, added.spread, share, added.n])
    columns = ["", ("added", "µs"), ("spread", "µs"), ("of a request", "% CPU"), "n"]
    run.table(Table(f"One request; a real one takes {cpu_s:.2f} s CPU", columns, rows))
    BARS.most("metrics", rows[0][1], METRICS_US, "µs")
    BARS.most("the whole stack", rows[1][1], STACK_US, "µs")
    BARS.most("its share of a request's CPU", rows[1][3], 100 * SHARE, "%")
    told = [f"{row[1]:.1f} µs" for row in rows]
    run.conclude(
        f"Metrics {told[0]} (bar: {METRICS_US:g}); the stack {told[1]} (bar: "
        f"{STACK_US:g}), {rows[1][3]:.3f} % of a request's CPU (bar: {SHARE:.1%})."
    )


async def real_cpu_s(app: Any) -> float:
    """CPU of a short chat, answered alone: the smallest request there is to watch."""
    async with client(app) as http:
        await http.post(trials.CHAT, json=trials.small_talk(20, TOKENS))
        began = time.process_time()
        for _ in range(EACH):
            await http.post(trials.CHAT, json=trials.small_talk(20, TOKENS))
        return (time.process_time() - began) / EACH


def client(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://api", timeout=120)


def a_scrape(run: lesson.Run) -> None:
    """/metrics, after traffic that left an exemplar in many buckets."""
    shared = run.keep("rig", partial(rig, run.device))
    shared.tracing.keep = lambda *_: True
    run.predict(f"Neither form takes {SCRAPE_MS:g} ms.")
    rows = []

    async def scraped() -> None:
        async with client(shared.watched) as http:
            for tokens in (1, 4, 16, 64):
                await http.post(trials.CHAT, json=trials.small_talk(20, tokens))
            for path in ("/", "/docs", "/v1/models", "/health/live", "/none") * 20:
                await http.get(path)
            for name in ("text/plain", "application/openmetrics-text"):
                times = []
                for _ in range(100):
                    began = time.process_time()
                    answer = await http.get("/metrics", headers={"accept": name})
                    times.append((time.process_time() - began) * 1000)
                told = Series(tuple(times))
                size = len(answer.content) / 1000
                rows.append([name, told.median, told.p99, size, told.n])

    asyncio.run(scraped())
    shared.tracing.keep = worth_keeping
    columns = ["form", ("median", "ms CPU"), ("p99", "ms CPU"), ("size", "kB"), "n"]
    run.table(Table("A scrape, with its HTTP", columns, rows))
    worst = max(row[1] for row in rows)
    BARS.most("a scrape", worst, SCRAPE_MS, "ms")
    run.conclude(f"A scrape takes {worst:.1f} ms (bar: {SCRAPE_MS:g}).")


def throughput(run: lesson.Run) -> None:
    """Eight clients that ask again at once, on either app in turns."""
    shared = run.keep("rig", partial(rig, run.device))
    run.predict(f"Watched and bare differ by less than {THROUGHPUT:.0%}.")
    rates: tuple[list[float], list[float]] = [], []
    rounds = QUICK_ROUNDS if run.quick else ROUNDS
    with run.progress("rounds", rounds) as advance:
        for number in range(-1, rounds):
            turns = [(shared.watched, 0), (shared.bare, 1)]
            for app, place in turns if number % 2 else turns[::-1]:
                rate = asyncio.run(tokens_per_s(app))
                if number >= 0:  # the first round warms up
                    rates[place].append(rate)
            advance()
    pair = Paired(Series(tuple(rates[0])), Series(tuple(rates[1])))
    told = pair.ratio()
    rows = [["watched", pair.a.median, pair.a.spread, pair.a.n]]
    rows.append(["bare", pair.b.median, pair.b.spread, pair.b.n])
    columns = ["API", ("throughput", "tokens/s"), ("spread", "tokens/s"), "rounds"]
    run.table(Table(f"{CLIENTS} clients, answers of {TOKENS} tokens", columns, rows))
    BARS.most("watched and bare, apart", abs(told.value - 1), THROUGHPUT)
    between = "" if told.low is None else f", 95 %: {told.low:.4f} to {told.high:.4f}"
    run.conclude(
        f"Watched over bare: {told.value:.4f}{between} (bar: within {THROUGHPUT:.0%})."
    )


async def tokens_per_s(app: Any) -> float:
    async def caller(http: httpx.AsyncClient) -> None:
        for _ in range(EACH):
            body = trials.small_talk(8, TOKENS)
            (await http.post(trials.CHAT, json=body)).raise_for_status()

    async with client(app) as http:
        began = time.perf_counter()
        await asyncio.gather(*(caller(http) for _ in range(CLIENTS)))
        return CLIENTS * EACH * TOKENS / (time.perf_counter() - began)


SECTIONS = [
    lesson.Section("A request", a_request),
    lesson.Section("A scrape", a_scrape),
    lesson.Section("Throughput", throughput),
]


def main(argv: list[str] | None = None) -> int:
    """Measure all three and print the tables."""
    BARS.missed.clear()
    return BARS.code(
        lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)
    )


if __name__ == "__main__":
    raise SystemExit(main())
