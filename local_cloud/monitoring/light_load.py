"""What the lesson asks of a running API to have something to measure.

Everything is read as Prometheus reads it: from /metrics, twice, and subtracted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from course.load import (
    Outcome,
    client,
    poisson_arrivals,
    post,
    run_closed_loop,
    run_open_loop,
    stream_chat,
)
from course.machine import cpu_quota
from course.measure import Paired, Percentile, Series
from course.show import Cell, Table
from local_cloud.monitoring.drift import WINDOW, Score, Watch
from local_cloud.monitoring.energy import Interval, Meter
from local_cloud.monitoring.scrape import Scrape, parse, quantile, scrape, share_under
from local_cloud.monitoring.traces import SQLiteSpans, Tracing
from serving import trials

HTTP = "http_server_request_duration_seconds"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SETTLED_S = 2.0
SCRAPE_S = 0.25  # Prometheus asks every 15 s or so
ALONE = 2  # answers a turn: enough for the 10 ms steps in which CPU time is counted
TYPO_EVERY = 9  # requests; a client's mistake, that no server can mend
SEED = 1
Body = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """A few seconds of traffic, by the server's metrics and by its clients."""

    counted: Scrape  # increases
    gauges: list[Scrape]
    outcomes: list[Outcome]

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Each wait for a next token, of all answers."""
        return tuple(gap for outcome in self.outcomes for gap in outcome.gaps_s)

    def requests(self, status: str = "") -> float:
        """Chat requests whose status begins like this."""
        return _requests(self.counted, status)

    def highest(self, gauge: str) -> float:
        """Of all scrapes; what came and went between two of them is not seen."""
        return max(moment.total(gauge) for moment in self.gauges)


async def load(url: str, ask: Callable[[], Body], rate: float, seconds: float) -> Seen:
    """Chats as users send them: by a schedule, whatever became of those before.

    Some have a typo and are refused with a status of 4xx.
    """
    async with client() as http:

        async def send(number: int) -> Outcome:
            typo = {"max_token": 1} if number % TYPO_EVERY == TYPO_EVERY - 1 else {}
            return await stream_chat(http, url + CHAT, {**ask(), **typo})

        start = await asyncio.to_thread(scrape, url)
        await send(0)  # warms up
        before = await _after(url, start, 1)
        gauges: list[Scrape] = []
        watching = asyncio.create_task(_watch(url, gauges))
        try:
            arrivals = poisson_arrivals(rate, seconds, SEED)
            outcomes = await run_open_loop(send, arrivals)
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        after = await _after(url, before, len(outcomes))
    return Seen(after - before, [*gauges, after], outcomes)


async def _after(url: str, before: Scrape, requests: int) -> Scrape:
    """The first scrape that has them all: a server counts when it has said the last."""
    end = time.monotonic() + SETTLED_S
    while True:
        after = await asyncio.to_thread(scrape, url)
        if _requests(after - before) >= requests or time.monotonic() > end:
            return after
        await asyncio.sleep(SETTLED_S / 100)


def _requests(counted: Scrape, status: str = "") -> float:
    return sum(
        count
        for labels, count in counted.series(f"{HTTP}_count").items()
        if (known := dict(labels))["http_route"] == CHAT
        and known["http_response_status_code"].startswith(status)
    )


async def _watch(url: str, gauges: list[Scrape]) -> None:
    while True:
        gauges.append(await asyncio.to_thread(scrape, url))
        await asyncio.sleep(SCRAPE_S)


def as_histogram(values: Sequence[float], edges: Sequence[float]) -> Scrape:
    """The values as a server with these buckets would export them, named "it"."""
    registry = CollectorRegistry()
    histogram = Histogram("it", "It.", buckets=sorted(edges), registry=registry)
    for value in values:
        histogram.observe(value)
    return parse(generate_latest(registry).decode())


def told_by_histograms(
    gaps_s: Sequence[float], edges: Sequence[float], promise_s: float
) -> Table:
    """What is true of waits for a next token, and what two histograms say of it.

    One has these edges, the other one more, on the promise.
    """
    gaps = Series(tuple(gaps_s))
    kept = sum(gap <= promise_s for gap in gaps_s) / gaps.n
    rows: list[list[Cell]] = [["each wait, by the clients", 1000 * gaps.p99, kept]]
    for name, own in (("the API's buckets", []), ("one edge more", [promise_s])):
        buckets = as_histogram(gaps_s, [*edges, *own]).buckets("it")
        p99, kept = quantile(0.99, buckets), share_under(promise_s, buckets)
        rows.append([name, 1000 * p99, kept])
    columns = ["by", ("p99", "ms"), (f"up to {1000 * promise_s:g} ms", "share")]
    note = f"n = {gaps.n}, mean {1000 * gaps.mean:.3g} ms"
    return Table("From token to token: truth and histograms", columns, rows, note)


def first_errors(made_up_front: bool, errors: int = 3) -> int:
    """How many of a counter's first errors an increase between two scrapes shows."""
    registry = CollectorRegistry()
    counter = Counter("it", "It.", ["status"], registry=registry)
    if made_up_front:
        counter.labels("500")
    before = parse(generate_latest(registry).decode())
    counter.labels("500").inc(errors)
    after = parse(generate_latest(registry).decode())
    return int((after - before).total("it_total"))


# ## Drift

# fmt: off
ENGLISH = (
    "the", "house", "garden", "water", "light", "small", "green", "morning", "train",
    "letter", "window", "paper", "music", "evening", "market", "people", "friend",
)
CODE = (
    "def", "return", "import", "self", "print(x)", "for", "while", "if", "else:",
    "None", "True", "len(x)", "range(10)", "=", "==", "+=", "[]", "{}", "lambda",
)
# fmt: on


def prompts(words: Sequence[str], count: int, seed: int) -> list[str]:
    """What users type: one to three of these words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(count)]


# What one window of requests looks like: a feature's values, one a request.
Window = dict[str, list[float]]
FEATURES = {"words": "input", "prompt_tokens": "input", "confidence": "output"}


def windows(
    url: str, model: str, people: Mapping[str, Sequence[str]], size: int
) -> dict[str, Window]:
    """A window of answers for each kind of people, who are known by their words."""
    return {
        who: asyncio.run(window(url, model, prompts(words, size, seed)))
        for seed, (who, words) in enumerate(people.items())
    }


async def window(url: str, model: str, texts: Sequence[str]) -> Window:
    """Ask the model for the next token of each text; confidence is its log-probability.

    A closed loop: how long it takes is of no interest here.
    """
    async with client() as http:

        async def send(number: int) -> Outcome:
            body = {"model": model, "prompt": texts[number], "max_tokens": 1}
            asked = {**body, "temperature": 0, "logprobs": 0}
            return _answered(await post(http, url + COMPLETIONS, asked))

        told = await run_closed_loop(send, clients=4, requests=len(texts))
    said = [json.loads(outcome.text) for outcome in told]
    logprobs = [one["choices"][0]["logprobs"]["token_logprobs"][0] for one in said]
    return {
        "words": [float(len(text.split())) for text in texts],
        "prompt_tokens": [float(one["usage"]["prompt_tokens"]) for one in said],
        "confidence": logprobs,
    }


def watched(
    asked: Mapping[str, Window], score: Score
) -> Iterator[tuple[str, str, Watch]]:
    """Each feature and kind of people, and the watch after a window of them."""
    for feature, of in FEATURES.items():
        watch = Watch(feature, asked["baseline"][feature], score, of=of)
        for who, seen in asked.items():
            if who != "baseline":
                for value in seen[feature]:
                    watch.observe(value)
                yield feature, who, watch


def scores(asked: Mapping[str, Window], score: Score) -> tuple[Table, list[str]]:
    """How far each window is from the baseline, and what is beyond its limit."""
    rows: list[list[Cell]] = []
    over = []
    for feature, who, watch in watched(asked, score):
        rows.append([feature, who, watch.value(), watch.limit])
        over += [f"{feature} ({who})"] if watch.value() > watch.limit else []
    columns = ["feature", "users", "PSI", "limit, p99 without drift"]
    return Table(f"Drift, windows of {WINDOW} answers", columns, rows), over


# ## Sampling


def sampled(
    url: str, tracing: Tracing, store: SQLiteSpans, good: int, refused: int
) -> Table:
    """Of how many requests a trace is kept, of good ones and of refused ones."""
    before = len(store.roots())
    asyncio.run(trials.mixed(url, good=good, refused=refused))
    tracing.flush()
    kept = [root.error for root in store.roots()[before:]]
    rows: list[list[Cell]] = [["answered", good, kept.count(None)]]
    rows.append(["refused", refused, kept.count("429")])
    return Table("What sampling keeps", ["requests", "sent", "traces"], rows)


# ## Energy


@dataclass(frozen=True)
class Work:
    """What a token of some answers took."""

    joules: Interval
    seconds: float


def cpu_seconds(url: str) -> Callable[[], float]:
    """Reads the CPU time of the process that serves there."""
    return lambda: scrape(url).total("process_cpu_seconds_total")


async def work(
    url: str, ask: Callable[[], Body], meter: Meter, at_once: int, answers: int
) -> Work:
    """Have so many answers written, `at_once` at a time."""
    async with client() as http:

        async def send(_: int) -> Outcome:
            return _answered(await stream_chat(http, url + CHAT, ask()))

        before, start = meter.joules(), time.perf_counter()
        told = await run_closed_loop(send, at_once, answers)
        seconds = time.perf_counter() - start
        used = meter.joules().since(before)
    tokens = sum(outcome.tokens for outcome in told)
    return Work(used * (1 / tokens), seconds / tokens)


def in_turns(
    url: str, ask: Callable[[], Body], meter: Meter, together: int, rounds: int
) -> tuple[list[Work], list[Work]]:
    """Answers alone and together, in paired turns; who goes first alternates."""
    alone, shared = (1, ALONE), (together, together)
    told: dict[tuple[int, int], list[Work]] = {alone: [], shared: []}
    for turn in range(rounds):
        for way in (alone, shared) if turn % 2 == 0 else (shared, alone):
            told[way].append(asyncio.run(work(url, ask, meter, *way)))
    return told[alone], told[shared]


def middle(works: Sequence[Work]) -> Work:
    """The medians of the turns."""
    low = median(one.joules.low for one in works)
    high = median(one.joules.high for one in works)
    return Work(Interval(low, high), median(one.seconds for one in works))


def per_token(
    ways: Mapping[str, Sequence[Work]],
    sci: Callable[[Interval, float], Interval],
    title: str,
) -> Table:
    """A row for each way of doing the same work; `sci(joules, thread_s)` in grams."""
    rows: list[list[Cell]] = []
    for name, works in ways.items():
        token = middle(works)
        grams = sci(token.joules * 1000, token.seconds * 1000 * cpu_quota())
        rows.append([name, str(token.joules), str(grams), len(works)])
    columns = ["answers", ("energy", "J/token"), ("SCI", "g/1,000 tokens"), "n"]
    return Table(title, columns, rows)


def ratio(a: Sequence[Work], b: Sequence[Work]) -> Percentile:
    """How many times the energy of b is that of a, turn by turn."""
    turns = (Series(tuple(one.joules.high for one in works)) for works in (a, b))
    return Paired(*turns).ratio()


def _answered(outcome: Outcome) -> Outcome:
    if not outcome.ok:
        raise ConnectionError(f"expected an answer, found {outcome}")
    return outcome
