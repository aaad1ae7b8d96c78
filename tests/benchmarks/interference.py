"""A long prompt among short gaps: what four streams feel of a 900-token newcomer.

Reading 900 tokens at once would stop every stream for a second. The engine reads a
chunk a step, so that a stream waits for one chunk at most. A chunk's time is taken from
the same prompt on the idle server.

Run it:     python -m tests.benchmarks.interference [--quick]    half a minute
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass
from typing import Any

from course import lesson
from course.measure import Series
from course.show import Table
from models.engine import CHUNK
from tests.benchmarks import AFTER_LESSONS, servers
from tests.benchmarks.client import Reply, ask
from tests.benchmarks.prompts import request
from tests.benchmarks.servers import Server
from tests.benchmarks.turns import Bystanders

NEIGHBOURS = 4
TOKENS = 96  # of their answers
REPEATS = 292  # of three tokens each: with what surrounds them, 900 tokens
HEAD_START_S = 0.6  # until the newcomer: the neighbours' prompts are read by then
ROUNDS, QUICK_ROUNDS = 10, 3
NUMBERS = itertools.count(10_000)


@dataclass(frozen=True)
class Round:
    """One newcomer's visit, in seconds."""

    alone_s: float  # the newcomer's first token on the idle server
    prompt_tokens: int
    quiet: list[float]  # the neighbours' gaps before and after
    during: list[float]  # and while the newcomer's prompt was read


def long_prompt() -> dict[str, Any]:
    number = next(NUMBERS)
    messages = [
        {"role": "system", "content": f"{number:05d}" + " and so on" * REPEATS},
        {"role": "user", "content": "What is this about?"},
    ]
    return {**request(number, tokens=4), "messages": messages}


async def visit(server: Server) -> Round:
    """The newcomer alone, then amid its neighbours' streams."""
    alone = checked(await ask(server, long_prompt()))
    streams = [
        asyncio.create_task(ask(server, request(next(NUMBERS), TOKENS)))
        for _ in range(NEIGHBOURS)
    ]
    await asyncio.sleep(HEAD_START_S)
    newcomer = checked(await ask(server, long_prompt()))
    neighbours = [checked(await stream) for stream in streams]
    begun = max(reply.token_times[0] for reply in neighbours)
    read = newcomer.token_times[0]
    quiet, during = [], []
    for reply in neighbours:
        for before, after in itertools.pairwise(reply.token_times):
            if before >= read or (begun <= before and after <= newcomer.sent_at):
                quiet.append(after - before)
            elif before >= begun:
                during.append(after - before)
    assert alone.first_token_s
    return Round(alone.first_token_s, alone.prompt_tokens, quiet, during)


def checked(reply: Reply) -> Reply:
    """The reply, if it is whole and nothing of it came from the cache."""
    if not reply.token_times or reply.cached_tokens:
        raise ValueError(f"Expected a fresh answer, found {reply}.")
    return reply


def a_long_prompt(run: lesson.Run) -> None:
    """Gaps between tokens, quiet and while a long prompt is read."""
    run.predict(f"A gap grows by at most one chunk of {CHUNK} tokens.")
    rounds = QUICK_ROUNDS if run.quick else ROUNDS
    visits, bystanders = [], Bystanders()
    with servers.ours(run.device) as server:

        def one_visit() -> Round:
            return asyncio.run(visit(server))

        one_visit()  # warms up
        with run.progress("interference", rounds) as advance:
            for _ in range(rounds):
                visits.append(bystanders.watch([server.pid], one_visit))
                advance()
    bystanders.tell(run)
    show_results(run, visits)


def show_results(run: lesson.Run, visits: list[Round]) -> None:
    """Both kinds of gaps, the rise, and the chunk it is held against."""
    quiet = Series(tuple(1000 * gap for one in visits for gap in one.quiet))
    during = Series(tuple(1000 * gap for one in visits for gap in one.during))
    per_token = Series(tuple(one.alone_s / one.prompt_tokens for one in visits))
    chunk_ms = 1000 * CHUNK * per_token.median
    rows = [
        [name, of(quiet), of(during), of(during) - of(quiet), chunk_ms]
        for name, of in {
            "median": lambda series: series.median,
            "p99": lambda series: series.p99,
            "largest": lambda series: series.max,
        }.items()
    ]
    columns = ["gap", ("quiet", "ms"), ("meanwhile", "ms"), ("rise", "ms")]
    columns += [("one chunk, the bar", "ms")]
    title = f"{NEIGHBOURS} streams and a prompt of {visits[0].prompt_tokens} tokens"
    note = f"{quiet.n} quiet gaps, {during.n} while the prompt was read."
    run.table(Table(title, columns, rows, note))
    run.conclude(
        f"The median gap rose by {rows[0][3] / chunk_ms:.2f} of a chunk, the largest "
        f"by {rows[2][3] / chunk_ms:.2f} (bar: 1)."
    )


SECTIONS = [lesson.Section("A long prompt", a_long_prompt)]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
