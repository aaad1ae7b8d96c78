"""A prompt whose beginning is known: time to first token, cold and from the cache.

A system message of 512 tokens, then a question: first new to the server, then the same
prompt again, then the same beginning with another question, then the first prompt from
another tenant, who must not gain from what is not theirs.

Run it:     python -m tests.benchmarks.prefix [--quick]          under half a minute
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from typing import Any

from course import lesson
from course.measure import Paired, Series
from course.show import Cell, Table
from tests.benchmarks import AFTER_LESSONS, servers
from tests.benchmarks.client import Reply, ask
from tests.benchmarks.prompts import request
from tests.benchmarks.rows import spelled
from tests.benchmarks.servers import Server
from tests.benchmarks.turns import Bystanders

ROUNDS, QUICK_ROUNDS = 9, 3
REPEATS = 168  # of three tokens each: with what surrounds them, 512 tokens
BAR = 20  # times sooner
COLD, SAME, OTHER, TENANT = (
    "new to the server",
    "the same again",
    "another question",
    "another tenant",
)
NUMBERS = itertools.count(10_000)


def prompt(number: int, question: str) -> dict[str, Any]:
    """A request with a long beginning that depends on the number alone."""
    messages = [
        {"role": "system", "content": f"{number:05d}" + " and so on" * REPEATS},
        {"role": "user", "content": question},
    ]
    return {**request(number, tokens=1), "messages": messages}


async def round_of(server: Server, mine: str, theirs: str) -> dict[str, Reply]:
    """The four cases, one after the other on an idle server."""
    number = next(NUMBERS)
    first = prompt(number, "What is this about?")
    other = prompt(number, "Who wrote these words, and when?")
    return {
        COLD: await ask(server, first, mine),
        SAME: await ask(server, first, mine),
        OTHER: await ask(server, other, mine),
        TENANT: await ask(server, first, theirs),
    }


def known_beginning(run: lesson.Run) -> None:
    """Cold, hit, and another tenant's."""
    run.predict("A hit copies 512 tokens in milliseconds instead of computing them.")
    mine, theirs = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    rounds = QUICK_ROUNDS if run.quick else ROUNDS
    told, bystanders = [], Bystanders()
    with servers.ours(run.device, API_KEYS=f"{mine},{theirs}") as server:

        def one_round() -> dict[str, Reply]:
            return asyncio.run(round_of(server, mine, theirs))

        one_round()  # warms up
        with run.progress("prefix", rounds) as advance:
            for _ in range(rounds):
                told.append(bystanders.watch([server.pid], one_round))
                advance()
    bystanders.tell(run)
    for reply in (reply for replies in told for reply in replies.values()):
        if not reply.ok:
            raise ValueError(f"Expected an answer, found {reply.error}.")
    show_results(run, told)


def show_results(run: lesson.Run, told: list[dict[str, Reply]]) -> None:
    """The table, each case beside its bar."""
    times = {
        case: Series(
            tuple(1000 * (replies[case].first_token_s or 0) for replies in told)
        )
        for case in told[0]
    }
    bars = {COLD: "", SAME: f">= {BAR}", OTHER: "", TENANT: "0 cached"}
    rows: list[list[Cell]] = []
    for case, series in times.items():
        reply, sooner = told[-1][case], Paired(times[COLD], series).ratio()
        row = [case, reply.prompt_tokens, reply.cached_tokens, series.median]
        rows.append([*row, series.spread, spelled(sooner), bars[case], series.n])
    columns = ["prompt", ("length", "tokens"), ("cached", "tokens")]
    columns += [("first token, median", "ms"), ("spread", "ms")]
    columns += [("sooner", "times"), "bar", "n"]
    note = "What is not cached is read: another question takes as long as it is."
    run.table(Table("Time to first token", columns, rows, note))
    strangers = max(replies[TENANT].cached_tokens for replies in told)
    sooner = Paired(times[COLD], times[SAME]).ratio().value
    run.conclude(
        f"A hit brings the first token {sooner:.0f} times sooner (bar: {BAR}); another "
        f"tenant got {strangers} tokens from the cache (bar: 0)."
    )


SECTIONS = [lesson.Section("A known beginning", known_beginning)]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
