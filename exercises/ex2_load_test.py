"""Exercise 2: a load test that finds the bottleneck.

Goal      Write the parts of a load test that tells the truth: requests by a schedule,
          latencies from when each was due, percentiles of all requests. Then let it
          find which route of an unknown server breaks first, and at which rate.
Why       The usual loop (ask, wait, ask again) slows down together with the server:
          the worse it gets, the fewer requests see it. And the mean of four workers'
          p99 is the p99 of nobody.
Points    25
Minutes   60
Before    model_api.py, section 2; scaling_strategies.py, section 2
Check     python -m exercises check 2      (or at each save: watch 2)
Try it    python -m exercises.ex2_load_test

The server is a real one, on loopback. Each of its routes, asked alone, is well; one of
them is not under load. Only a load test can tell which.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Sample:
    """What became of one request. Times in seconds since the run began."""

    due_s: float  # when the schedule wanted it sent
    done_s: float  # when its answer, or its failure, was there
    ok: bool

    @property
    def latency_s(self) -> float:
        """From due, not from sent: who sends late has made the caller wait, too."""
        return self.done_s - self.due_s


@dataclass(frozen=True)
class Bottleneck:
    """What a load test found: the route that breaks first, and a rate it still bore."""

    route: str
    sustained_per_s: float


def schedule(rate_per_s: float, duration_s: float, seed: int) -> list[float]:
    """When requests of independent users are due: seconds from the start, in order.

    Checked:
    - on average `rate_per_s` of them a second, all from 0 to below `duration_s`;
    - the gaps between them are exponential (Poisson arrivals), not even;
    - the same seed gives the same schedule, another seed another one, and the
      program's own random numbers (`random.random()`) are not disturbed.
    """
    # TODO(1a): draw gaps until the time is over.
    raise NotImplementedError


async def fire(
    send: Callable[[int], Awaitable[object]], due: Sequence[float]
) -> list[Sample]:
    """Awaits `send(i)` for each request, begun when due; one sample each, in order.

    `send` raises where a request fails.

    Checked:
    - open loop: no request waits for the answer to another one;
    - `due_s` is what the schedule says and `done_s` when it ended, so that a request
      which this program itself sent late counts as slow, too;
    - a failure is a sample with ok=False and ends no other request.
    """
    # TODO(1b): one task a request; note one start for all of them.
    raise NotImplementedError


def percentile(groups: Sequence[Sequence[float]], q: float) -> float:
    """The q-th percentile (0 < q <= 100) of what several workers measured, together.

    Checked:
    - nearest rank: the smallest of the measured values such that at least q percent of
      all values are no larger; never a value that nobody measured;
    - of all values of all groups, however many each has, not a mean of percentiles;
    - ValueError where there is no value at all; the groups stay as they are.
    """
    # TODO(2a): which rank, among how many?
    raise NotImplementedError


async def find_bottleneck(
    ask: Callable[[str], Awaitable[object]], routes: Sequence[str]
) -> Bottleneck:
    """Load-tests each route alone and tells which breaks first, and what it sustains.

    `await ask(route)` sends one request; it raises where the server refuses. Alone, a
    route answers within 0.1 s. One of them cannot stand 100 requests a second; the
    others can stand more. The whole test may take 20 s.

    Checked, on servers with different faults:
    - the route is named, also where another one is slower at any rate, but steadily so;
    - and also where the route that breaks answers fast: by refusing;
    - `sustained_per_s` is a rate that the route still bore: on two of these servers,
      from 0.3 to 1.5 times what its pool of connections can do at most.
    """
    # TODO(2b): compare each route with itself, at a low and at a high rate.
    raise NotImplementedError


async def try_on_a_server() -> Bottleneck:
    """Lets find_bottleneck test a server whose /chat serves one request at a time."""
    from exercises.unknown_server import ask_at, started

    routes = {"/report": {"wait_s": 0.06}, "/chat": {"at_once": 1}, "/search": {}}
    with started(routes) as port:
        ask = partial(ask_at, port)
        return await find_bottleneck(ask, list(routes))


if __name__ == "__main__":
    from exercises.tryout import tryout

    raise SystemExit(
        tryout(
            __file__,
            schedule=lambda: [round(at, 2) for at in schedule(10, 1.0, seed=1)],
            percentile=lambda: percentile([[0.1] * 99, [2.0]], 99.5),
            find_bottleneck=try_on_a_server,
        )
    )
