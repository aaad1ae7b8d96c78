"""Coordinated omission: who asks only when answered does not notice that one stalls.

    for row in asyncio.run(measure()):
        print(row.what, row.requests, row.p99_s)

One worker serves requests in turn and stops once, for two seconds. A closed loop has a
few clients, each of which waits out the stall with one request: a handful of slow ones
among thousands. Users do not coordinate with the server like that. They keep coming,
and meet the stall in hundreds. The open loop lets them come by a schedule; the truth is
computed from the server's own record and the same schedule, without any client.

The server stands in for a model: it waits its service time instead of computing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from course.load import Outcome, poisson_arrivals, run_closed_loop, run_open_loop
from course.measure import Series

SEED = 1


@dataclass(frozen=True)
class Experiment:
    """One stall in a few seconds of traffic."""

    seconds: float = 6.0
    rate_per_s: float = 100.0  # of the open loop
    clients: int = 4  # of the closed one
    service_s: float = 0.004
    stall_at_s: float = 2.0
    stall_s: float = 2.0

    def __post_init__(self) -> None:
        fits = 0 < self.stall_at_s < self.stall_at_s + self.stall_s < self.seconds
        if not fits or not 0 < self.rate_per_s * self.service_s < 1 or self.clients < 1:
            raise ValueError(
                "Experiment: expected the stall within the run, a server that is fast "
                f"enough for the rate, and a client, found {self}"
            )


@dataclass
class Server:
    """A server of lines on loopback: one worker, one queue, and one stall."""

    experiment: Experiment
    port: int = 0
    began: float = 0.0  # its clock's zero
    stalled: tuple[float, float] = (0.0, 0.0)  # when it did, by its own record
    services: list[float] = field(default_factory=list)
    worker: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while await reader.readline():
                async with self.worker:
                    await self.work()
                writer.write(b"done\n")
        finally:
            writer.close()

    async def work(self) -> None:
        started = time.perf_counter()
        await asyncio.sleep(self.experiment.service_s)
        self.services.append(time.perf_counter() - started)

    async def stall(self) -> None:
        """What a collection of garbage or a swapped page does: the worker stands."""
        await asyncio.sleep(self.experiment.stall_at_s)
        async with self.worker:
            started = time.perf_counter()
            await asyncio.sleep(self.experiment.stall_s)
            self.stalled = (started - self.began, time.perf_counter() - self.began)


@asynccontextmanager
async def running(experiment: Experiment):
    """The server for the length of the block; its clock starts with it."""
    server = Server(experiment)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, backlog=1024)
    server.port = listener.sockets[0].getsockname()[1]
    server.began = time.perf_counter()
    stall = asyncio.create_task(server.stall())
    try:
        yield server
    finally:
        stall.cancel()
        listener.close()


async def request(port: int) -> Outcome:
    """One request on a connection of its own."""
    started = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"work\n")
            answer = await reader.readline()
        finally:
            writer.close()
    except OSError as error:
        total_s = time.perf_counter() - started
        return Outcome(error=repr(error), total_s=total_s)
    total_s = time.perf_counter() - started
    return Outcome(status=200 if answer == b"done\n" else None, total_s=total_s)


@dataclass(frozen=True)
class Row:
    """What one way of looking saw; seconds."""

    what: str
    requests: int
    p50_s: float
    p99_s: float
    worst_s: float
    met_stall: int  # requests that took longer than half of it


async def measure(experiment: Experiment | None = None) -> list[Row]:
    """Closed loop, open loop and truth, in as many seconds as the experiment lasts.

    Both loops run at once, each against a server of its own.
    """
    experiment = experiment or Experiment()
    closed, (opened, truth) = await asyncio.gather(
        _closed(experiment), _open(experiment)
    )
    half = experiment.stall_s / 2
    return [
        _row(f"closed loop, {experiment.clients} clients", closed, half),
        _row("open loop, from when due", opened, half),
        _row("truth, by the server's record", truth, half),
    ]


async def _closed(experiment: Experiment) -> list[float]:
    """Latencies in s of users who each wait before they ask again."""
    async with running(experiment) as server:
        end = server.began + experiment.seconds
        latencies: list[float] = []

        async def send(number: int) -> Outcome:
            outcome = await request(server.port)
            latencies.append(_checked(outcome))
            return outcome

        # Rounds of a few requests, because the loop ends by a count and not by a time.
        while time.perf_counter() < end:
            await run_closed_loop(send, experiment.clients, 10 * experiment.clients)
    return latencies


async def _open(experiment: Experiment) -> tuple[list[float], list[float]]:
    """Latencies in s from when each was due: as measured, and as they had to be."""
    due = poisson_arrivals(experiment.rate_per_s, experiment.seconds, SEED)
    async with running(experiment) as server:
        outcomes = await run_open_loop(lambda _: request(server.port), due)
        measured = [_checked(outcome) for outcome in outcomes]
    return measured, true_latencies(due, server.services, server.stalled)


def true_latencies(
    due: Sequence[float], services: Sequence[float], stalled: tuple[float, float]
) -> list[float]:
    """How long each had to stay: one worker, in order of arrival, one stall; seconds.

    Arithmetic on the server's record. Who is next when the stall begins waits for its
    end: that is all there is to it (Lindley's recursion).
    """
    free, stays = 0.0, []
    begin, end = stalled
    for at, service in zip(due, services, strict=True):
        start = max(at, free)
        if begin <= start < end:
            start = end
        free = start + service
        stays.append(free - at)
    return stays


def _checked(outcome: Outcome) -> float:
    if not outcome.ok:
        raise ConnectionError(f"expected an answer of the server, found {outcome}")
    return outcome.total_s


def _row(what: str, latencies: Sequence[float], half_s: float) -> Row:
    series = Series(tuple(latencies))
    met = sum(latency > half_s for latency in latencies)
    return Row(what, series.n, series.median, series.p99, series.max, met)
