"""Traffic for a server, and an honest account of what it did with it.

*Open loop*: requests arrive when the schedule says, however slow the answers are, as
users do. *Closed loop*: each client sends the next request once its last is answered,
so a server that stalls also stops being asked, and the requests that would have met
the stall are missing from the figures ("coordinated omission"). Here every latency
counts from the moment a request was due, not from when it could be sent.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from course.measure import Series
from course.request import Outcome, check_target, client, post, stream_chat

__all__ = [
    "LoadReport",
    "Outcome",
    "check_target",
    "client",
    "constant_arrivals",
    "meets",
    "poisson_arrivals",
    "post",
    "run_closed_loop",
    "run_open_loop",
    "stream_chat",
    "summarise",
]

MAX_REQUESTS = 100_000  # in one run; more is a mistake in the rate, not a lesson

Send = Callable[[int], Awaitable[Outcome]]  # sends the request of this number


@dataclass(frozen=True)
class LoadReport:
    """A run in figures. Rates are per second from first due to last finished."""

    requests: int
    ok: int
    refused: int
    failed: int
    seconds: float
    requests_per_s: float  # answered well
    tokens_per_s: float
    goodput_per_s: float  # answered well and within both objectives
    first_token: Series | None
    gap: Series | None
    total: Series | None
    late: Series  # if this is not far below `first_token`, distrust the whole run


def constant_arrivals(rate_per_s: float, duration_s: float) -> list[float]:
    """Due times in seconds, evenly spaced."""
    _check_size(rate_per_s, duration_s)
    return [i / rate_per_s for i in range(round(rate_per_s * duration_s))]


def poisson_arrivals(rate_per_s: float, duration_s: float, seed: int) -> list[float]:
    """Due times in seconds of independent users: exponential gaps, so clumps too."""
    _check_size(rate_per_s, duration_s)
    draw = random.Random(seed)
    arrivals: list[float] = []
    due = draw.expovariate(rate_per_s)
    while due < duration_s:
        arrivals.append(due)
        due += draw.expovariate(rate_per_s)
    return arrivals


def _check_size(rate_per_s: float, duration_s: float) -> None:
    if not (rate_per_s > 0 and 0 < rate_per_s * duration_s <= MAX_REQUESTS):
        raise ValueError(
            f"Expected a run of at most {MAX_REQUESTS:,} requests, found "
            f"{rate_per_s:g} a second for {duration_s:g} s. Lower the rate or time."
        )


async def run_open_loop(
    send: Send,
    arrivals: Sequence[float],
    *,
    max_in_flight: int = 1000,
    deadline_s: float = 300.0,
) -> list[Outcome]:
    """Sends request i at `arrivals[i]` seconds, whatever became of those before.

    Beyond `max_in_flight` a request waits, and its waiting counts as latency. What is
    not finished `deadline_s` after the start ends as an error.
    """
    start = time.perf_counter()
    room = asyncio.Semaphore(max_in_flight)

    async def one(index: int) -> Outcome:
        due = arrivals[index]
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.sleep(start + due - time.perf_counter())
                async with room:
                    late = time.perf_counter() - start - due
                    return _from_due(await send(index), due, late)
        except TimeoutError:
            total = max(0.0, time.perf_counter() - start - due)
            error = f"not finished {deadline_s:g} s after the run began"
            return Outcome(error=error, total_s=total, due_s=due)

    return await _all(one(index) for index in range(len(arrivals)))


def _from_due(outcome: Outcome, due: float, late: float) -> Outcome:
    first = outcome.first_token_s
    return replace(
        outcome,
        due_s=due,
        late_s=late,
        first_token_s=None if first is None else first + late,
        total_s=outcome.total_s + late,
    )


async def run_closed_loop(send: Send, clients: int, requests: int) -> list[Outcome]:
    """`clients` users who each send the next request once the last is answered.

    It finds the most a server can do; it cannot show what users wait for.
    """
    _check_size(requests, 1)
    start = time.perf_counter()
    numbers = iter(range(requests))
    outcomes: list[Outcome] = []

    async def user() -> None:
        for index in numbers:  # shared: each number goes to one user
            due = time.perf_counter() - start
            outcomes.append(replace(await send(index), due_s=due))

    await _all(user() for _ in range(clients))
    return outcomes


async def _all(work: Any) -> list[Any]:
    """Runs all coroutines; if one fails, the others are ended before it is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failures:  # a thousand requests fail for one reason
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def summarise(
    outcomes: Sequence[Outcome], ttft_slo_s: float, gap_slo_s: float
) -> LoadReport:
    """Counts and rates of a run, and its goodput under two objectives.

    A request counts as good if its first token came within `ttft_slo_s` of when it
    was due and its tokens then followed within `gap_slo_s` of each other on average.
    """
    if not outcomes:
        raise ValueError("Expected at least one outcome, found none.")
    good = [outcome for outcome in outcomes if outcome.ok]
    met = [o for o in good if meets(o, ttft_slo_s, gap_slo_s)]
    refused = sum(outcome.refused for outcome in outcomes)
    start = min(o.due_s for o in outcomes)
    seconds = max(o.due_s + o.total_s for o in outcomes) - start
    seconds = max(seconds, 1e-9)
    return LoadReport(
        requests=len(outcomes),
        ok=len(good),
        refused=refused,
        failed=len(outcomes) - len(good) - refused,
        seconds=seconds,
        requests_per_s=len(good) / seconds,
        tokens_per_s=sum(o.tokens for o in good) / seconds,
        goodput_per_s=len(met) / seconds,
        first_token=_series(o.first_token_s for o in good),
        gap=_series(gap for o in good for gap in o.gaps_s),
        total=_series(o.total_s for o in good),
        late=Series(tuple(o.late_s for o in outcomes)),
    )


def meets(outcome: Outcome, ttft_slo_s: float, gap_slo_s: float) -> bool:
    """Whether one request was answered well and within both objectives."""
    first = outcome.first_token_s
    first = outcome.total_s if first is None else first  # an answer in one piece
    per_token = outcome.time_per_token_s or 0.0
    return outcome.ok and first <= ttft_slo_s and per_token <= gap_slo_s


def _series(values: Any) -> Series | None:
    kept = tuple(value for value in values if value is not None)
    return Series(kept) if kept else None
