"""Too many requests: what is still answered well, and how soon the rest is told.

Capacity is what sixteen clients get who ask again once they are answered. Then
requests arrive at random, at 1 to 4 times that rate, whatever became of those before.
Good are answers whose first token came within two seconds of when it was due, and
whose tokens followed within a quarter of a second of each other on average.

Run it:     python -m tests.benchmarks.overload                  about two minutes
            python -m tests.benchmarks.overload --quick          half a minute
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from course import lesson
from course.load import poisson_arrivals, run_closed_loop, run_open_loop, summarise
from course.measure import Series
from course.request import Outcome
from course.show import Cell, Table
from tests.benchmarks import AFTER_LESSONS, servers
from tests.benchmarks.client import ask
from tests.benchmarks.prompts import request
from tests.benchmarks.servers import Server
from tests.benchmarks.turns import Bystanders

LOADS = (1, 2, 3, 4)  # times capacity
SECONDS, QUICK_SECONDS = 20.0, 5.0  # of arrivals at each load
TOKENS = 24  # of each answer
CLIENTS, ANSWERS = 16, 4  # that find the capacity
TARGET_MS = 1000  # of waiting that the server accepts
FIRST_TOKEN_S, GAP_S = 2.0, 0.25  # the objectives
KEPT_BAR, REFUSAL_BAR_MS = 0.8, 10.0
NUMBERS = itertools.count(10_000)


def sender(server: Server) -> Callable[[int], Awaitable[Outcome]]:
    """Sends a request that no other is like."""
    return lambda _: ask(server, request(next(NUMBERS), TOKENS))


async def capacity(server: Server) -> float:
    """Requests a second that are answered when clients wait for each other."""
    send = sender(server)
    await run_closed_loop(send, CLIENTS, CLIENTS)
    told = await run_closed_loop(send, CLIENTS, CLIENTS * ANSWERS)
    return summarise(told, FIRST_TOKEN_S, GAP_S).requests_per_s


async def arrive(
    server: Server, rate: float, seconds: float, seed: int
) -> list[Outcome]:
    """Random arrivals at this rate."""
    arrivals = poisson_arrivals(rate, seconds, seed)
    return await run_open_loop(sender(server), arrivals)


def more_than_capacity(run: lesson.Run) -> None:
    """One to four times what the server can do."""
    run.predict("Refusing early keeps the answers good that are given.")
    seconds = QUICK_SECONDS if run.quick else SECONDS
    results: dict[int, Sequence[Outcome]] = {}
    bystanders = Bystanders()
    with servers.ours(run.device, TTFT_TARGET_MS=str(TARGET_MS)) as server:

        def told(what: Callable[..., Any], *details: float) -> Any:
            work = lambda: asyncio.run(what(server, *details))  # noqa: E731
            return bystanders.watch([server.pid], work)

        best = told(capacity)
        with run.progress("overload", len(LOADS)) as advance:
            for load in LOADS:
                results[load] = told(arrive, load * best, seconds, load)
                advance()
    bystanders.tell(run)
    show_results(run, best, results)


def show_results(
    run: lesson.Run, best: float, results: dict[int, Sequence[Outcome]]
) -> None:
    """One row a load, and the two bars."""
    rows: list[list[Cell]] = []
    refusals: list[float] = []
    goodput: dict[int, float] = {}
    for load, told in results.items():
        report = summarise(told, FIRST_TOKEN_S, GAP_S)
        goodput[load] = report.goodput_per_s
        # How late this client itself was is no fault of the server.
        refused = [1000 * (o.total_s - o.late_s) for o in told if o.refused]
        refusals += refused
        p50, p99 = (
            (Series(tuple(refused)).p50, Series(tuple(refused)).p99)
            if refused
            else (None,) * 2
        )
        first = report.first_token
        row = [f"{load}x", report.requests, report.ok, report.refused, report.failed]
        row += [report.goodput_per_s, first and first.p50, first and first.p99]
        rows.append([*row, p50, p99, 1000 * report.late.p99])
    columns = ["load", "sent", "answered", "refused", "failed", ("good", "1/s")]
    columns += [("first token, p50", "s"), ("first token, p99", "s")]
    columns += [("refusal, p50", "ms"), ("refusal, p99", "ms")]
    columns += [("client late, p99", "ms")]
    run.table(Table(f"Arrivals, in multiples of {best:.1f} a second", columns, rows))
    kept = goodput[LOADS[-1]] / max(goodput.values())
    slowest = f"{Series(tuple(refusals)).p99:.1f} ms" if refusals else "none"
    run.conclude(
        f"At {LOADS[-1]} times capacity {kept:.0%} of the best rate of good answers "
        f"remained (bar: {KEPT_BAR:.0%}); refusals, p99: {slowest} "
        f"(bar: {REFUSAL_BAR_MS:g} ms, n = {len(refusals)})."
    )


SECTIONS = [lesson.Section("More than capacity", more_than_capacity)]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
