"""Exercise 3: the same model as a function and as a container.

Goal      From calls that were measured and the times at which callers come, tell what
          callers would wait and what a month would cost, on a platform for functions
          and in a container that is always up; then choose, with reasons.
Why       "Serverless is cheaper" and "cold starts are terrible" are both true, of some
          traffic. Which traffic is yours can be computed before anything is deployed.
Points    25, of which 3 need the built model and 2 a Docker engine
Minutes   60
Before    serverless_deployment.py, sections 1 to 3
Check     python -m exercises check 3      (or at each save: watch 3)
Try it    python -m exercises.ex3_serverless_vs_container

The grader starts both for real: what you predict of the platform is compared with what
the platform did, and what you choose with what was measured in the same minute.
"""

from __future__ import annotations

# BEGIN SOLUTION
import heapq
import math
import statistics

# END SOLUTION
from collections.abc import Sequence
from dataclasses import dataclass

from local_cloud.functions import costs

DAYS = costs.MONTH_S / 86_400  # of a month, as bills count


@dataclass(frozen=True)
class Call:
    """One measured call of a function."""

    total_ms: float  # that its caller waited
    ready_ms: float  # of it, init before the handler ran; 0 if a sandbox was there
    billed_ms: int
    cold: bool


@dataclass(frozen=True)
class Typical:
    """What a call takes, cold and warm: seconds that the caller waits, and billed."""

    cold_s: float
    warm_s: float
    cold_billed_s: float
    warm_billed_s: float


@dataclass(frozen=True)
class Replayed:
    """A day of calls: what each of them waited, in the order in which they came."""

    latencies_s: tuple[float, ...]
    cold: int = 0  # of them
    billed_s: float = 0.0  # of all; a container is not billed by the call


@dataclass(frozen=True)
class Sizes:
    """What is paid for: the function's memory, and the container."""

    function_mb: float = 1769
    vcpus: float = 1
    memory_gb: float = 2


@dataclass(frozen=True)
class Comparison:
    """What came of both, under "function" and "container", and what follows."""

    p50_s: dict[str, float]
    p99_s: dict[str, float]
    usd_per_month: dict[str, float]
    break_even: float  # calls a month from which the container costs less
    choice: str | None  # "function", "container", or None
    reasons: set[str]


def typical(calls: Sequence[Call]) -> Typical:
    """What a cold and a warm call take, by those that were measured.

    Checked:
    - medians of the cold calls and of the warm ones, whichever order they came in; the
      first of them need not be cold, and a slow one is not a cold one;
    - what the caller waits is all of it; init is billed, too, and in `billed_ms`;
    - ValueError where no cold, or no warm, call was measured.
    """
    # TODO(1a): sort the calls into two lists first.
    # BEGIN SOLUTION
    cold = [call for call in calls if call.cold]
    warm = [call for call in calls if not call.cold]
    if not cold or not warm:
        raise ValueError(f"Expected both kinds, found {len(cold)} cold, {len(warm)}.")

    def waits_s(some: list[Call]) -> float:
        return statistics.median(call.total_ms for call in some) / 1000

    def billed_s(some: list[Call]) -> float:
        return statistics.median(call.billed_ms for call in some) / 1000

    return Typical(waits_s(cold), waits_s(warm), billed_s(cold), billed_s(warm))
    # END SOLUTION


def by_function(times: Sequence[float], each: Typical, keep_alive_s: float) -> Replayed:
    """A platform for functions gets calls at these seconds, in order.

    A sandbox does one call at a time: cold_s if it had to be started, else warm_s. It
    ends when nobody has used it for `keep_alive_s` after its last call was done. Of
    those that wait, a call gets the one that was used last.

    Checked: the latencies, how many are cold, and billed_s, for calls one by one, at
    once, after gaps and in bursts; and on the real platform, that as many are cold.
    """
    # TODO(1b): which sandboxes are there when a call comes, and since when idle?
    # BEGIN SOLUTION
    busy: list[float] = []  # until when; a heap
    idle: list[float] = []  # since when; the one used last is last
    latencies = []
    for now in times:
        while busy and busy[0] <= now:
            idle.append(heapq.heappop(busy))
        idle = [since for since in idle if now - since <= keep_alive_s]
        took = each.warm_s if idle else each.cold_s
        if idle:
            idle.pop()
        heapq.heappush(busy, now + took)
        latencies.append(took)
    cold = latencies.count(each.cold_s)
    warm = len(latencies) - cold
    billed_s = cold * each.cold_billed_s + warm * each.warm_billed_s
    return Replayed(tuple(latencies), cold, billed_s)
    # END SOLUTION


def by_container(
    times: Sequence[float], service_s: float, slots: int, start_s: float
) -> Replayed:
    """A container gets them. It is started at second 0 and stays for the day.

    From `start_s` on it serves `slots` calls at once, each for `service_s`. Who finds
    no slot free waits for one; first come, first served.

    Checked: the latencies, from when each call came, in order; nothing cold or billed.
    """
    # TODO(2a): when is each slot free?
    # BEGIN SOLUTION
    free = [start_s] * slots
    latencies = []
    for now in times:
        end = max(now, heapq.heappop(free)) + service_s
        heapq.heappush(free, end)
        latencies.append(end - now)
    return Replayed(tuple(latencies))
    # END SOLUTION


def compare(
    function: Replayed, container: Replayed, sizes: Sizes, slo_s: float
) -> Comparison:
    """What the same day was on both, and which one to choose.

    Checked:
    - p50 and p99 by nearest rank: the smallest latency such that at least so many
      percent of all are no larger;
    - dollars for a month of such DAYS (by costs.lambda_cost and costs.container_cost,
      which is up for costs.MONTH_S);
    - break_even: calls a month, each as dear to the function as those of this day are
      on average, that cost as much as the container;
    - choice: the cheaper one of those whose p99_s is at most slo_s; None if neither is;
    - reasons: of "the function is too slow", "the container is too slow", "the function
      costs less" and "the container costs less" those that hold.
    """
    # TODO(2b): figures first; then let the reasons follow, and the choice from them.
    # BEGIN SOLUTION
    calls = len(function.latencies_s)
    billed_s = DAYS * function.billed_s
    usd = {
        "function": costs.lambda_cost(DAYS * calls, billed_s, sizes.function_mb),
        "container": costs.container_cost(costs.MONTH_S, sizes.vcpus, sizes.memory_gb),
    }
    both = {"function": function, "container": container}
    p50, p99 = (
        {name: _percentile(side.latencies_s, q) for name, side in both.items()}
        for q in (50, 99)
    )
    cheaper = min(usd, key=lambda name: usd[name])
    slow = [name for name in both if p99[name] > slo_s]
    left = [name for name in both if name not in slow]
    reasons = {f"the {name} is too slow" for name in slow}
    return Comparison(
        p50_s=p50,
        p99_s=p99,
        usd_per_month=usd,
        break_even=usd["container"] / usd["function"] * DAYS * calls,
        choice=min(left, key=lambda name: usd[name], default=None),
        reasons=reasons | {f"the {cheaper} costs less"},
    )
    # END SOLUTION


# BEGIN SOLUTION
def _percentile(values: Sequence[float], q: float) -> float:
    return sorted(values)[math.ceil(q / 100 * len(values)) - 1]


# END SOLUTION
# Measured on two busy cores: a token by the lesson's function, and by a container of
# the course's image. The grader measures both anew, on your machine.
MEASURED = (
    Call(409.0, 354.5, 408, cold=True),
    Call(49.5, 0.0, 50, cold=False),
    Call(68.2, 0.0, 68, cold=False),
    Call(538.0, 486.6, 536, cold=True),
    Call(357.8, 309.3, 355, cold=True),
)
SERVICE_S, START_S = 0.094, 1.31


def a_day(calls_per_hour: int) -> list[float]:
    """When callers come who come at random, day and night."""
    from local_cloud.fireworks.traffic import Hour, arrivals

    return arrivals([Hour(calls_per_hour, 0)] * 24)


def try_to_compare(calls_per_hour: int = 20) -> Comparison:
    """Both ways, for callers who want an answer within half a second."""
    times = a_day(calls_per_hour)
    function = by_function(times, typical(MEASURED), keep_alive_s=300.0)
    container = by_container(times, SERVICE_S, slots=1, start_s=START_S)
    return compare(function, container, Sizes(), slo_s=0.5)


if __name__ == "__main__":
    from exercises.tryout import tryout

    raise SystemExit(
        tryout(
            __file__,
            typical=lambda: typical(MEASURED),
            by_function=lambda: by_function([0, 1, 1, 400], typical(MEASURED), 300.0),
            by_container=lambda: by_container([0, 1, 1, 400], SERVICE_S, 1, START_S),
            compare=try_to_compare,
        )
    )
