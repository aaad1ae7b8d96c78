"""Caches: one answer for many, one prefix on one replica, and one false friend.

The first section asks the real API the same question a hundred times at once, with the
cache and without. The second has three replicas, each an engine on a thread of its own
with a prefix cache of its own, and sends them the same conversations at the same
moments by turns, by prefix, and by prefix with bounded load. The third asks a semantic
cache for the opposite.

Run it:     python -m tests.benchmarks.cache [--quick]     a minute and a half, or one
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

import models
from course import lesson
from course.load import Outcome, poisson_arrivals, run_open_loop
from course.measure import Series
from course.show import Cell, Table
from local_cloud.scaling import semantic
from local_cloud.scaling.cache import CachedApp, ResponseCache
from local_cloud.scaling.reuse import ask_at_once
from local_cloud.scaling.ring import BALANCE, Ring, prefix
from model_api import create_app
from serving.settings import Settings
from tests.benchmarks import AFTER_LESSONS

MODEL = "smollm2-135m-instruct"
AT_ONCE = 100
# Nearly twice as many beginnings as one replica keeps, and fewer than all three do. A
# replica answers two at a time on one thread.
REPLICAS, SHELF, SYSTEMS, ROWS = ("one", "two", "three"), 8, 15, 2
WORDS = 80  # of a beginning


@dataclass(frozen=True)
class Demand:
    """Who asks for what, and how much of it."""

    favourite: float  # share of the requests that begin with the first beginning
    rate_per_s: float
    answer: int  # tokens


EVEN = Demand(1 / SYSTEMS, 6.0, 4)
HOT = Demand(0.5, 12.0, 16)  # more than the replica that knows it has time for
LONG_S, QUICK_S = 9.0, 3.0
WARM_UP = 45  # requests that fill the caches and are not counted
BAR = 25  # points


def open_model(device: str) -> models.Model:
    return models.load(device, rows=16, context=1024)


# One answer for many.


def single_flight(run: lesson.Run) -> None:
    """A hundred at once: without a cache, with an empty one, with a full one."""
    run.predict(f"{AT_ONCE} equal requests at once cost one answer.")
    model = run.keep("model", lambda: open_model(run.device))
    plain = create_app(Settings(ttft_target_ms=600_000), model=model)
    cached = CachedApp(plain, ResponseCache(), revision=model.revision)
    rows: list[list[Cell]] = []
    answers: list[int] = []
    for name, app in (("none", plain), ("empty", cached), ("full", cached)):
        before = sum(model.engine.snapshot().finished.values())
        seconds, each = asyncio.run(ask_at_once(app, MODEL, AT_ONCE, 24))
        answers.append(sum(model.engine.snapshot().finished.values()) - before)
        rows.append([name, answers[-1], 1000 * seconds, 1000 * each.median])
    columns = ["cache", ("answers", "of the model"), ("all", "ms"), ("median", "ms")]
    note = f"n = {AT_ONCE} callers at once, 24 tokens each, without sockets"
    run.table(Table("The same question", columns, rows, note))
    run.conclude(
        f"Without a cache the model answered {answers[0]} times, with an empty one "
        f"{answers[1]} times (bar: 1), with a full one {answers[2]} times."
    )


# One prefix on one replica.


@dataclass(frozen=True)
class Traffic:
    """Conversations and when they are due: the same for every way of routing."""

    prompts: list[list[int]]
    due: list[float]
    answer: int


def conversations(
    model: models.Model, demand: Demand, seconds: float, seed: int = 1
) -> Traffic:
    """Prompts that share one of a few long beginnings; the first ones warm up."""
    draw = random.Random(seed)
    words = ("red", "salt", "wind", "moon", "tree", "road", "lamp", "stone")
    systems = [" ".join(draw.choices(words, k=WORDS)) for _ in range(SYSTEMS)]
    others = (1 - demand.favourite) / (SYSTEMS - 1)
    weights = [demand.favourite] + [others] * (SYSTEMS - 1)
    due = poisson_arrivals(demand.rate_per_s, seconds, seed)
    chosen = draw.choices(systems, weights, k=WARM_UP + len(due))
    prompts = [
        model.prompt(
            [
                {"role": "system", "content": system},
                {"role": "user", "content": f"Question {number}: what is it about?"},
            ]
        )
        for number, system in enumerate(chosen)
    ]
    return Traffic(prompts, due, demand.answer)


@dataclass(frozen=True)
class Routed:
    """What became of a run."""

    prompt_tokens: int
    cached_tokens: int
    first_token: Series
    shares: Counter[str]

    @property
    def hits(self) -> float:
        """Per cent of the prompt tokens."""
        return 100 * self.cached_tokens / self.prompt_tokens

    @property
    def p95_ms(self) -> float:
        return self.first_token.at(95)


Pick = Callable[[list[int], Counter[str]], str]


def ways() -> dict[str, Pick]:
    """Who gets a prompt, given the requests in flight."""
    turns, free = itertools.cycle(REPLICAS), Ring(REPLICAS, balance=None)
    bounded = Ring(REPLICAS, balance=BALANCE)
    return {
        "by turns": lambda ids, loads: next(turns),
        "by prefix": lambda ids, loads: free.pick(prefix(ids), loads),
        f"by prefix, at most {100 * BALANCE:.0f} %": (
            lambda ids, loads: bounded.pick(prefix(ids), loads)
        ),
    }


async def route(
    replicas: dict[str, models.Model], traffic: Traffic, pick: Pick
) -> Routed:
    """Send all prompts when they are due."""
    loads: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    told: list[tuple[int, int]] = []
    sampling = models.Sampling(max_tokens=traffic.answer)

    async def send(number: int) -> Outcome:
        ids = traffic.prompts[number]
        name = pick(ids, loads)
        loads[name] += 1
        started = time.perf_counter()
        stream = replicas[name].submit(ids, sampling)
        async for _ in stream:
            pass
        loads[name] -= 1
        if number >= WARM_UP:
            shares[name] += 1
            told.append((stream.prompt_tokens, stream.cached_tokens))
        total = time.perf_counter() - started
        first = stream.first_token_s
        return Outcome(status=200, first_token_s=first, total_s=total)

    for number in range(WARM_UP):  # one after the other: only the caches matter
        await send(number)
    outcomes = await run_open_loop(lambda n: send(n + WARM_UP), traffic.due)
    first = Series(tuple(1000 * (o.first_token_s or 0) for o in outcomes))
    prompt_tokens, cached_tokens = map(sum, zip(*told, strict=True))
    return Routed(prompt_tokens, cached_tokens, first, shares)


def routed(run: lesson.Run, demand: Demand, pick: Pick) -> Routed:
    """A run on new replicas: nobody inherits a cache."""
    with ExitStack() as stack:
        replicas = {
            name: stack.enter_context(
                models.load(run.device, rows=ROWS, context=512, threads=1, shelf=SHELF)
            )
            for name in REPLICAS
        }
        seconds = QUICK_S if run.quick else LONG_S
        traffic = conversations(replicas[REPLICAS[0]], demand, seconds)
        return asyncio.run(route(replicas, traffic, pick))


def prefix_routing(run: lesson.Run) -> None:
    """By turns, by prefix, and by prefix with bounded load, on real engines."""
    run.predict("Routed by prefix, the replicas' caches add up instead of repeating.")
    with run.progress("routing", 2 * len(ways()) - 1) as advance:

        def told(demand: Demand, names: list[str]) -> dict[str, Routed]:
            found = {}
            for name in names:
                found[name] = routed(run, demand, ways()[name])
                advance()
            return found

        names = list(ways())
        even, hot = told(EVEN, names), told(HOT, names[1:])
    run.table(routing_table("All beginnings equally popular", even))
    run.table(routing_table("Half of all ask for the same one", hot))
    by_turns, *by_prefix = even.values()
    free, bounded = hot.values()
    more = [one.hits - by_turns.hits for one in by_prefix]
    less, before, after = free.hits - bounded.hits, free.p95_ms, bounded.p95_ms
    run.conclude(
        f"By prefix the replicas knew {more[0]:+.1f} points more of their prompts than "
        f"by turns (bar: {BAR}), with the load bounded {more[1]:+.1f}. Where one "
        f"beginning is in demand, the bound takes {less:.1f} points of hits, and p95 "
        f"goes from {before:.0f} to {after:.0f} ms."
    )


def routing_table(title: str, found: dict[str, Routed]) -> Table:
    """A way of routing a row."""
    rows: list[list[Cell]] = []
    for name, one in found.items():
        most = 100 * max(one.shares.values()) / one.shares.total()
        median, n = one.first_token.median, one.first_token.n
        rows.append([name, one.hits, most, median, one.p95_ms, n])
    columns = ["who gets it", ("prefix hits", "% of tokens"), ("busiest replica", "%")]
    columns += [("first token, median", "ms"), ("p95", "ms"), "n"]
    note = f"{SYSTEMS} beginnings, {len(REPLICAS)} replicas that keep {SHELF} prompts"
    return Table(title, columns, rows, note)


# One false friend.


def false_hits(run: lesson.Run) -> None:
    """Paraphrases and opposites, by threshold."""
    run.predict("A vector says what a question is about, not what it asks.")
    model = run.keep("model", lambda: open_model(run.device))
    embed = semantic.embedder(model.tokenizer)
    rates = semantic.trial(embed)
    rows: list[list[Cell]] = [
        [row.threshold, 100 * row.right, 100 * row.false] for row in rates
    ]
    columns = [("threshold", "cosine"), ("paraphrases found", "%")]
    columns += [("opposites taken for them", "%")]
    count = len(semantic.PARAPHRASES), len(semantic.OPPOSITES)
    note = f"{count[0]} pairs that mean the same, {count[1]} that mean the opposite"
    run.table(Table("A semantic cache", columns, rows, note))
    best = max(rates, key=lambda row: row.right - row.false)
    likeness = {
        same: np.median([float(embed(p.first) @ embed(p.second)) for p in chosen])
        for same in (True, False)
        for chosen in ([p for p in semantic.PAIRS if p.same is same],)
    }
    run.conclude(
        f"Opposites are nearer (median cosine {likeness[False]:.2f}) than paraphrases "
        f"({likeness[True]:.2f}): at its best threshold, {best.threshold:g}, it finds "
        f"{best.right:.0%} of the paraphrases and confuses {best.false:.0%} of the "
        "opposites. Off by default."
    )


SECTIONS = [
    lesson.Section("One answer for many", single_flight),
    lesson.Section("One prefix on one replica", prefix_routing),
    lesson.Section("One false friend", false_hits),
]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
