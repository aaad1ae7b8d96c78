"""What the API adds to the bare engine: time and CPU a request and a token.

The same short answer to the same prompt, which the prefix cache holds, once through
HTTP and once by `model.submit` in a process of its own. The two take turns.

Wall time is the whole way of a request, with the client's share: it writes and reads
bytes on a connection that stays open. CPU time is that of the main thread, which
runs the event loop: everything but the engine's own thread and onnxruntime's, whose
waiting costs CPU too and would drown the rest.

Run it:     python -m tests.benchmarks.overhead [--quick]        about a minute
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from course import lesson
from course.measure import Series
from course.show import Cell, Table
from tests.benchmarks import AFTER_LESSONS, servers
from tests.benchmarks.prompts import request
from tests.benchmarks.servers import CHAT, Server
from tests.benchmarks.turns import Bystanders, Worker, in_turns, worker

REQUESTS = 40  # in one turn
WARM = 5
ROUNDS, QUICK_ROUNDS = 9, 3
LONG = 65  # tokens of the answers that show what a token costs
LONG_REQUESTS = 5
BAR_MS = 1.0  # a request, beside the bare engine

Figures = dict[str, float]  # wall_s and cpu_s of one request


def through_http(server: Server, tokens: int, requests: int, stream: bool) -> Figures:
    """Median wall time and mean CPU time of a request, in seconds."""
    body = json.dumps({**request(1, tokens), "stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
    message = f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body
    times, cpu = [], 0.0
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        for number in range(WARM + requests):
            if number == WARM:
                cpu = main_thread_s(server.pid)
            started = time.perf_counter()
            answer = exchange(connection, message)
            times.append(time.perf_counter() - started)
            if not answer.startswith(b"HTTP/1.1 200"):
                raise ValueError(f"Expected status 200, found {answer!r}.")
        cpu = main_thread_s(server.pid) - cpu
    return {"wall_s": Series(tuple(times[WARM:])).median, "cpu_s": cpu / requests}


def exchange(connection: socket.socket, message: bytes) -> bytes:
    """Sends a request and reads its answer to the end."""
    connection.sendall(message)
    answer = b""
    while not is_whole(answer):
        if not (more := connection.recv(65_536)):
            raise EOFError(f"Expected a whole answer, found an end after {answer!r}.")
        answer += more
    return answer


def is_whole(answer: bytes) -> bool:
    """Whether the body is complete: as long as announced, or its last chunk is here."""
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return len(body) >= int(length[1]) if length else body.endswith(b"\r\n0\r\n\r\n")


def main_thread_s(pid: int) -> float:
    """CPU seconds of a process's main thread, to the nanosecond."""
    text = Path(f"/proc/{pid}/task/{pid}/schedstat").read_text()
    return int(text.split()[0]) / 1e9


@contextmanager
def rivals(run: lesson.Run) -> Iterator[tuple[Server, Worker]]:
    """The server, and a process with the engine alone."""
    argv = [sys.executable, "-m", "tests.benchmarks.overhead_bare", run.device]
    with servers.ours(run.device) as server, worker(argv) as bare:
        bare.ask("answer", tokens=1, requests=1)  # it is up
        yield server, bare


def compare(run: lesson.Run, tokens: int, requests: int, stream: bool) -> list[Any]:
    """Rounds of [figures through HTTP, figures of the bare engine]."""
    server, bare = run.keep("rivals", lambda: rivals(run))

    def http() -> Figures:
        return through_http(server, tokens, requests, stream)

    def alone() -> Figures:
        return bare.ask("answer", tokens=tokens, requests=requests)

    turns = [(server.pid, http), (bare.pid, alone)]
    bystanders = Bystanders()
    rounds = range(QUICK_ROUNDS if run.quick else ROUNDS)
    results = [in_turns(turns, number, bystanders) for number in rounds]
    bystanders.tell(run)
    return results


def table_row(name: str, results: list[Any], what: str, scale: float) -> list[Cell]:
    """Medians of both, and of the difference with its interval."""
    http, bare = (
        Series(tuple(figures[what] * scale for figures in column))
        for column in zip(*results, strict=True)
    )
    added = Series(tuple(a - b for a, b in zip(http.values, bare.values, strict=True)))
    told = added.percentile(50)
    between = "" if told.low is None else f"{told.low:.3f} to {told.high:.3f}"
    return [name, http.median, bare.median, added.median, between, added.n]


COLUMNS = ["", "HTTP", "bare engine", "added", "95 % interval", "rounds"]


def a_request(run: lesson.Run) -> None:
    """An answer of one token, in one piece and streamed."""
    run.predict("Parsing, limits, metrics and HTTP cost less than one decode step.")
    rows: list[list[Cell]] = []
    for name, stream in {"in one piece": False, "streamed": True}.items():
        results = compare(run, 1, REQUESTS, stream)
        rows.append(table_row(f"{name}: wall, ms", results, "wall_s", 1e3))
        rows.append(table_row(f"{name}: CPU, ms", results, "cpu_s", 1e3))
    run.table(Table("A request for one token, its prompt cached", COLUMNS, rows))
    wall, cpu = rows[0][3], rows[1][3]
    run.conclude(
        f"The API adds {wall:.2f} ms and {cpu:.2f} ms of CPU to a request "
        f"(bar: {BAR_MS:g} ms)."
    )


def a_token(run: lesson.Run) -> None:
    """A streamed answer of many tokens, less one of a single token."""
    run.predict("A token costs one event: a dictionary, its JSON and a write.")
    long = compare(run, LONG, LONG_REQUESTS, stream=True)
    short = compare(run, 1, LONG_REQUESTS, stream=True)
    each = [
        [
            {what: (a[what] - b[what]) / (LONG - 1) for what in a}
            for a, b in zip(more, less, strict=True)
        ]
        for more, less in zip(long, short, strict=True)
    ]
    rows = [
        table_row("wall, µs", each, "wall_s", 1e6),
        table_row("CPU, µs", each, "cpu_s", 1e6),
    ]
    run.table(Table("One more streamed token", COLUMNS, rows))
    run.conclude(f"The API adds {rows[1][3]:.0f} µs of CPU to a streamed token.")


SECTIONS = [
    lesson.Section("A request", a_request),
    lesson.Section("A streamed token", a_token),
]


def main(argv: list[str] | None = None) -> int:
    """Measure both and print the tables."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
