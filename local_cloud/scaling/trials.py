"""The lesson's trials of balancing: in virtual time, and with real processes.

`live` lets a policy scale replicas behind a balancer while the load rises and falls,
and plays the same requests to the simulator. `balance` plays one load to each way of
choosing a replica. `one_stall` is the experiment with coordinated omission, `failover`
that with two regions.

The replicas are stand-ins, which wait where a GPU would work. Everything else is real.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from course import draw, load
from course.load import Outcome
from course.show import Cell, Table
from local_cloud.scaling import standin, theory, traffic
from local_cloud.scaling.balancer import Balancer
from local_cloud.scaling.haproxy import INSTALL, HAProxy, NoHAProxy, find
from local_cloud.scaling.loop import ControlLoop, Tick
from local_cloud.scaling.omission import Experiment, Row, measure
from local_cloud.scaling.policies import Autoscaler, Picker
from local_cloud.scaling.proxy import Proxy
from local_cloud.scaling.regions import front, region
from local_cloud.scaling.replicas import ReplicaSet
from local_cloud.scaling.simulator import Fleet, Trace, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from course.lesson import Run

PATH = "/v1/chat/completions"
SEED = 1
STEADY = 0.9  # busier than this, a queue takes longer to settle than the trial lasts


@dataclass(frozen=True)
class SteadyFleet:
    """Replicas that never change, each loaded alike: what theory has formulas for."""

    replicas: int
    rho: float  # load of each
    mean_s: float  # a request takes

    def known_s(self) -> dict[str, float | None]:
        """What theory says of the mean stay, by way of balancing."""
        return theory.known(self.rho, self.mean_s, self.replicas)


def one_queue(picker: Picker, slots: int, queue_s: float = 30.0) -> Balancer:
    """HAProxy with one queue for all members, or the portable proxy where it is not.

    Args:
        picker: the proxy's, among the members that have a free slot.
        slots: requests a member gets at a time.
        queue_s: a request waits for a slot at most; then it is refused with 503.
    """
    try:
        find()
    except NoHAProxy:
        return Proxy(picker, slots=slots, queue_s=queue_s)
    return HAProxy("queue", slots=slots, queue_s=queue_s)


async def send_all(url: str, bodies: list[Any], due: list[float]) -> list[Outcome]:
    """Post each body when it is due, whatever became of those before."""
    async with load.client() as http:
        return await load.run_open_loop(
            lambda number: load.post(http, url, bodies[number]), due
        )


# One load by each way of choosing.


def balance(
    run: Run,
    pickers: Mapping[str, Callable[[], Picker | None]],
    fleet: SteadyFleet,
    requests: int,
) -> dict[str, float]:
    """The same requests by each way, beside theory; gives the mean stays in ms."""
    rng = np.random.default_rng(SEED)
    steady = fleet.replicas, fleet.rho, fleet.mean_s
    drawn = traffic.steady(rng, *steady, requests)
    known, rows, means = fleet.known_s(), [], {}
    with run.progress("balancing", len(pickers)) as advance:
        for name, make in pickers.items():
            trace = simulate(*drawn, Fleet(fleet.replicas), make())
            trace = trace.after(requests // 2)
            means[name] = 1000 * trace.mean_s
            formula = known[name]
            p95 = 1000 * trace.quantile(0.95)
            rows.append([name, formula and 1000 * formula, means[name], p95])
            advance()
    columns = ["who gets it", ("theory", "ms"), ("simulation", "ms"), ("p95", "ms")]
    note = f"{fleet.replicas} replicas, {fleet.rho:.0%} load, "
    note += f"{1000 * fleet.mean_s:g} ms; n = {requests:,}, the first half not counted"
    run.table(Table("From arrival to end, mean", columns, rows, note))
    return means


# A stall.


def one_stall(stall_s: float) -> list[Row]:
    """A stall as a closed loop, an open loop and the truth have it."""
    seconds = 1.5 + stall_s
    short = Experiment(seconds=seconds, clients=2, stall_at_s=0.75, stall_s=stall_s)
    return asyncio.run(measure(short))


def stall_table(told: Sequence[Row]) -> Table:
    """Who tells what of the stall."""
    rows: list[list[Cell]] = [
        [row.what, row.requests, row.met_stall, 1000 * row.p50_s, 1000 * row.p99_s]
        for row in told
    ]
    columns = [
        "who tells it",
        "requests",
        "met the stall",
        ("p50", "ms"),
        ("p99", "ms"),
    ]
    note = "a server that waits instead of computing, and once stops for a while"
    return Table("Coordinated omission", columns, rows, note)


# Load rises and falls, and replicas come and go.


@dataclass(frozen=True)
class Wave:
    """A day in a few seconds: few requests, many, few."""

    seconds: float = 10.0
    low: float = 6.0  # requests a second
    high: float = 70.0
    service_s: float = 0.05  # mean; exponential
    most: int = 8  # replicas
    tick_s: float = 0.5
    after_s: float = 1.0  # that the loop goes on for

    def rate(self, time_s: float) -> float:
        """Requests a second that are meant to come at this moment."""
        share = (1 - np.cos(2 * np.pi * time_s / self.seconds)) / 2
        return float(self.low + (self.high - self.low) * share)


@dataclass(frozen=True)
class Live:
    """What became of a wave: measured, and simulated with the same requests."""

    wave: Wave
    ticks: list[Tick]
    outcomes: list[Outcome]
    simulated: Trace
    balancer: str
    start_s: float  # a replica took to serve, on average

    @property
    def failed(self) -> int:
        return sum(not outcome.ok for outcome in self.outcomes)

    @property
    def sojourns(self) -> traffic.Floats:
        """Seconds from when each request was due to its answer."""
        return np.array([outcome.total_s for outcome in self.outcomes])

    @property
    def most(self) -> int:
        """Replicas that served at once."""
        return max(tick.load.ready for tick in self.ticks)


def live(autoscaler: Autoscaler, picker: Picker, wave: Wave | None = None) -> Live:
    """Scale real processes through a wave, then simulate the same with what it cost."""
    wave = wave or Wave()
    rng = np.random.default_rng(SEED)
    due = traffic.daily(rng, wave.low, wave.high, wave.seconds)
    services = traffic.exponential(rng, wave.service_s, len(due))
    bodies = [{"service_ms": 1000 * float(service)} for service in services]
    with ExitStack() as stack:
        balancer = stack.enter_context(one_queue(picker, slots=1))
        replicas = stack.enter_context(
            ReplicaSet(standin.command, balancer=balancer, most=wave.most)
        )
        replicas.wait(1)
        loop = stack.enter_context(
            ControlLoop(autoscaler, replicas, balancer, every_s=wave.tick_s)
        )
        outcomes = asyncio.run(send_all(balancer.url + PATH, bodies, due.tolist()))
        time.sleep(wave.after_s)  # the loop sees the end, too
        ticks, start_s = list(loop.history), started_s(replicas)
    autoscaler.reset()
    fleet = Fleet(1, start_s=start_s, tick_s=wave.tick_s)
    trace = simulate(due, services, fleet, None, autoscaler)
    name = type(balancer).__name__
    return Live(wave, ticks, outcomes, trace, name, start_s)


def started_s(replicas: ReplicaSet) -> float:
    """How long replicas took from being asked for to serving, on average."""
    began = {e.replica: e.time_s for e in replicas.events if e.what == "started"}
    took = [
        event.time_s - began[event.replica]
        for event in replicas.events
        if event.what == "ready"
    ]
    return fmean(took)


def show_live(run: Run, hpa: Autoscaler, picker: Picker, wave: Wave) -> None:
    """Real processes behind a real balancer; then the same, simulated."""
    run.say(f"Now live: each replica is a process that {standin.NOTICE}.")
    with run.progress("load rises and falls"):
        found = live(hpa, picker, wave)
    run.table(live_table(found))
    run.picture(partial(draw_live, found), "live", panels=3, size=(12, 4.6))


def live_table(found: Live) -> Table:
    """The real fleet beside the simulated one."""
    rows: list[list[Cell]] = []
    for name, stays, ticks in (
        (f"real, behind {found.balancer}", found.sojourns, found.ticks),
        ("simulated, same requests", found.simulated.sojourns, found.simulated.ticks),
    ):
        ready = [tick.load.ready for tick in ticks]
        times = [1000 * float(np.quantile(stays, share)) for share in (0.5, 0.95)]
        rows.append([name, max(ready), ready[-1], *times, len(stays)])
    columns = [
        "fleet",
        "most replicas",
        "at the end",
        ("p50", "ms"),
        ("p95", "ms"),
        "n",
    ]
    note = f"{found.failed} failed; a replica took {found.start_s:.2f} s to serve; "
    note += f"it {standin.NOTICE}"
    return Table("Replicas come and go", columns, rows, note)


def draw_live(found: Live, scaling: Axes, waiting: Axes, latency: Axes) -> None:
    """Replicas, requests in the system and latency: real, simulated, by formula."""
    blue, orange, green = draw.COLOURS[:3]
    wave, ticks = found.wave, found.ticks
    times = np.array([tick.time_s for tick in ticks])
    offered = np.array([wave.rate(t) if t < wave.seconds else 0.0 for t in times])
    work = offered * wave.service_s
    ready = np.array([tick.load.ready for tick in ticks])
    scaling.fill_between(times, work, color="#dddddd", label="work (Erlang)")
    scaling.step(times, ready, color=blue, where="post", label="real")
    looks = found.simulated.ticks
    at = [look.load.time_s for look in looks]
    served = [look.load.ready for look in looks]
    scaling.step(at, served, "--", color=orange, where="post", label="simulated")
    stays = stay_by_theory(ready, work, wave.service_s)
    inside = [tick.load.concurrency for tick in ticks]
    waiting.plot(times, inside, color=blue, label="real")
    simulated = [look.load.concurrency for look in looks]
    waiting.plot(at, simulated, "--", color=orange, label="simulated")
    waiting.plot(times, offered * stays, ":", color=green, label="M/M/c at this load")
    arrivals, trace = [o.due_s for o in found.outcomes], found.simulated
    for stay, colour, dash in (
        (found.sojourns, blue, "-"),
        (trace.sojourns, orange, "--"),
    ):
        latency.plot(*by_second(arrivals, stay), dash, color=colour)
    latency.plot(times, 1000 * stays, ":", color=green)
    named = {"replicas that serve": scaling, "requests inside": waiting}
    for label, axes in {**named, "latency, mean (ms)": latency}.items():
        axes.set_title(label)
        axes.set_xlabel("time (s)")
        axes.set_xlim(0, max(times))
        axes.set_ylim(bottom=0)
    scaling.set_ylim(0, 1.6 * wave.most)
    scaling.legend(loc="upper right")
    waiting.legend(loc="upper right")


def stay_by_theory(ready: Any, work: Any, service_s: float) -> traffic.Floats:
    """Mean seconds in an M/M/c of so many servers; NaN where it cannot settle."""
    stays = [
        theory.mmc_wait(int(servers), float(erlang), service_s) + service_s
        if erlang < STEADY * servers
        else np.nan
        for servers, erlang in zip(ready, work, strict=True)
    ]
    return np.array(stays)


def by_second(times: Any, stays: Any) -> tuple[list[float], list[float]]:
    """The mean stay in ms of those who came within each second."""
    seconds = np.asarray(times).astype(int)
    there = sorted(set(seconds.tolist()))
    means = [1000 * float(np.mean(stays[seconds == one])) for one in there]
    return [one + 0.5 for one in there], means


# Two regions.


@dataclass(frozen=True)
class Failover:
    """Requests to two regions, the near one of which is killed halfway."""

    outcomes: list[Outcome]
    failed_at_s: float

    @property
    def failed(self) -> int:
        return sum(not outcome.ok for outcome in self.outcomes)

    def median_ms(self, *, after: bool) -> float:
        """Of those who came before the region was killed, or after it."""
        taken = [
            1000 * outcome.total_s
            for outcome in self.outcomes
            if (outcome.due_s >= self.failed_at_s) == after
        ]
        return float(np.median(taken))


def failover(round_trip_s: float, seconds: float = 2.0) -> Failover:
    """One stand-in here, one a round trip away; the balancer here is killed halfway.

    Raises:
        NoHAProxy: the regions need it.
    """
    due = load.constant_arrivals(40, seconds)
    bodies = [{"service_ms": 20}] * len(due)

    def command(port: int) -> list[str]:
        return standin.command(port, "--slots", "8")  # so that nobody queues

    with (
        region("near", command, replicas=1) as near,
        region("far", command, replicas=1, round_trip_s=round_trip_s) as far,
        front([near, far]) as door,
    ):

        async def send() -> list[Outcome]:
            asyncio.get_running_loop().call_later(seconds / 2, near.fail)
            return await send_all(door.url + PATH, bodies, due)

        return Failover(asyncio.run(send()), seconds / 2)


def fail_over(run: Run, round_trip_s: float) -> None:
    """Two regions behind one address; the near one is killed under load."""
    try:
        found = failover(round_trip_s, seconds=1.2)
    except NoHAProxy as missing:
        run.skip(f"regions: {missing}", INSTALL)
        return
    before, after = found.median_ms(after=False), found.median_ms(after=True)
    name = f"near region killed, the next is {1000 * round_trip_s:g} ms away (emulated)"
    told = f"{found.failed} of {len(found.outcomes)} failed"
    run.fact(name, f"{told}; {before:.0f}, then {after:.0f} ms")
