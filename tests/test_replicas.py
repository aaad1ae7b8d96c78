"""Replicas come, fail, are replaced and leave; the loop and the regions around them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from course import load, process
from course.load import Outcome
from course.process import wait_until
from local_cloud.scaling import regions, standin
from local_cloud.scaling.haproxy import HAProxy
from local_cloud.scaling.loop import ControlLoop, scraped
from local_cloud.scaling.policies import Load
from local_cloud.scaling.proxy import Proxy
from local_cloud.scaling.replicas import FIRST_PAUSE_S, Command, Event, ReplicaSet
from tests.conftest import ROOT

METRIC = "standin_in_flight"
PATH = "/v1/chat/completions"


def serving(*options: str) -> Command:
    """The command of stand-ins with these options."""
    return lambda port: standin.command(port, *options)


FAST = serving("--slots", "8")


@contextlib.contextmanager
def fleet(
    command: Command = FAST, *, least: int = 2, most: int = 6, **settings: Any
) -> Iterator[tuple[HAProxy, ReplicaSet]]:
    """HAProxy and a set behind it."""
    with (
        HAProxy(slow_start_s=0.2) as balancer,
        ReplicaSet(
            command, balancer=balancer, least=least, most=most, stop_s=0.2, **settings
        ) as replicas,
    ):
        yield balancer, replicas


def open_loop(
    url: str, rate: float, seconds: float, *acts: tuple[float, Callable], **body: float
) -> list[Outcome]:
    """Traffic, and what happens meanwhile: (seconds, function)."""

    async def work() -> list[Outcome]:
        async def act(when: float, what: Callable) -> None:
            await asyncio.sleep(when)
            await asyncio.to_thread(what)

        async with load.client(url) as http, asyncio.TaskGroup() as group:

            async def send(_: int) -> Outcome:
                return await load.post(http, PATH, body, deadline_s=60)

            for one in acts:
                group.create_task(act(*one))
            due = load.poisson_arrivals(rate, seconds, seed=2)
            return await load.run_open_loop(send, due, deadline_s=120)

    return asyncio.run(work())


def under_load(url: str, act: Callable[[], object], least: int) -> list[Outcome]:
    """Eight callers, until `act` is over and `least` requests were answered."""

    async def work() -> list[Outcome]:
        outcomes: list[Outcome] = []
        async with load.client(url) as http, asyncio.TaskGroup() as group:
            acting = group.create_task(asyncio.to_thread(act))

            async def call() -> None:
                while not acting.done() or len(outcomes) < least:
                    body = {"service_ms": 20}
                    outcomes.append(await load.post(http, PATH, body, deadline_s=60))

            for _ in range(8):
                group.create_task(call())
        return outcomes

    return asyncio.run(work())


async def one_by_one(url: str, count: int) -> list[Outcome]:
    """Requests that are never two at once."""
    async with load.client(url) as http:
        body = {"service_ms": 20}
        return [await load.post(http, PATH, body, deadline_s=20) for _ in range(count)]


def errors(outcomes: Sequence[Outcome]) -> list[str]:
    return [o.error or str(o.status) for o in outcomes if not o.ok]


def happened(replicas: ReplicaSet, what: str) -> list[Event]:
    return [event for event in replicas.events if event.what == what]


def gone(pid: int | None) -> bool:
    assert pid
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_thousand_requests_survive_growing_shrinking_and_kills() -> None:
    with fleet() as (balancer, replicas):

        def kill(victim: str, times: int) -> None:
            replicas.kill(victim)
            crashed = partial(happened, replicas, "crashed")
            wait_until(lambda: len(crashed()) == times, 20, "the kill to be seen")

        def act() -> None:
            replicas.scale(4)
            kill(replicas.wait(4)[0].id, 1)
            replicas.wait(4)
            replicas.scale(2)
            kill(replicas.wait(2)[-1].id, 2)
            replicas.wait(2)

        replicas.wait(2)
        outcomes = under_load(balancer.url, act, 1000)
        assert len(balancer.stats().members) == 2
    assert len(outcomes) >= 1000
    assert errors(outcomes) == []
    assert len(happened(replicas, "left")) >= 2


def test_scaling_is_bounded_and_leaves_no_process() -> None:
    with fleet(least=1, most=3) as (balancer, replicas):
        assert replicas.scale(99) == 3
        pids = [replica.pid for replica in replicas.wait(3)]
        assert len(balancer.stats().members) == 3
        assert replicas.scale(0) == 1
        replicas.wait(1)
        assert sum(gone(pid) for pid in pids) == 2
        assert len(balancer.stats().members) == 1
    assert all(gone(pid) for pid in pids)


def test_one_can_be_drained_by_name() -> None:
    with fleet() as (_, replicas):
        first, second = replicas.wait(2)
        replicas.drain(first.id)
        assert replicas.wait(1) == [second]
        with pytest.raises(KeyError, match=second.id):
            replicas.drain(first.id)


def test_a_replica_that_hangs_is_replaced() -> None:
    with fleet(hang_s=2) as (balancer, replicas):
        hung = replicas.wait(2)[0]
        stop = (0.2, lambda: replicas.kill(hung.id, signal.SIGSTOP))
        outcomes = open_loop(balancer.url, 60, 1, stop, service_ms=10)
        wait_until(lambda: gone(hung.pid), 30, "the hung one to be ended")
        replicas.wait(2)
    assert errors(outcomes) == []
    assert [event.replica for event in happened(replicas, "hung")] == [hung.id]


def test_a_replica_that_comes_up_broken_is_tried_again_and_never_asked() -> None:
    ports: list[int] = []

    def command(port: int) -> list[str]:
        ports.append(port)
        return standin.command(port, *(["--broken"] if len(ports) == 2 else []))

    with fleet(command, ready_s=5) as (balancer, replicas):

        def broken() -> list[str]:
            url = f"http://127.0.0.1:{ports[1]}" if ports[1:] else None
            return [one.id for one in replicas.members if one.url == url]

        wait_until(lambda: len(replicas.ready()) == 1, 20, "the good one")
        (name,) = wait_until(broken, 20, "the broken one")
        outcomes = open_loop(balancer.url, 50, 1.0, service_ms=2)
        replicas.wait(2)
    assert errors(outcomes) == []
    (failed,) = happened(replicas, "failed")
    assert failed.replica == name
    assert "within 5 s" in failed.detail


def test_a_replica_that_cannot_start_is_explained_and_tried_ever_more_slowly() -> None:
    def broken(port: int) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('no model here')"]

    with ReplicaSet(broken, least=1) as replicas:
        wait_until(lambda: len(happened(replicas, "failed")) == 3, 30, "three tries")
        with pytest.raises(TimeoutError, match="no model here"):
            replicas.wait(1, deadline_s=0.1)
    began = [event.time_s for event in happened(replicas, "started")]
    ended = [event.time_s for event in happened(replicas, "failed")]
    assert began[1] - ended[0] >= FIRST_PAUSE_S
    assert began[2] - ended[1] >= 2 * FIRST_PAUSE_S


def test_a_program_that_does_not_exist_is_explained() -> None:
    with ReplicaSet(lambda port: ["/no/such/program"]) as replicas:
        wait_until(lambda: happened(replicas, "failed"), 20, "an event")
    assert "No such file" in happened(replicas, "failed")[0].detail


def test_a_slow_starter_gets_no_request_before_it_is_ready() -> None:
    seen: list[Event] = []
    command = serving("--start-s", "0.6")
    with fleet(command, least=1, on_change=seen.append) as (balancer, replicas):
        first = wait_until(lambda: replicas.members, 20, "one that starts")
        assert [one.state for one in first] == ["starting"]
        replicas.wait(1)
        assert errors(open_loop(balancer.url, 20, 0.5, service_ms=1)) == []
    times = {event.what: event.time_s for event in seen}
    assert times["ready"] - times["started"] > 0.6


def test_leaving_while_starting_is_no_failure() -> None:
    with fleet(serving("--start-s", "60"), least=0) as (_, replicas):
        replicas.scale(2)
        wait_until(lambda: len(replicas.members) == 2, 20, "two that start")
        replicas.scale(0)
        replicas.wait(0)
    assert happened(replicas, "failed") == []


def test_the_balancer_may_die_first() -> None:
    with fleet() as (balancer, replicas):
        pids = [replica.pid for replica in replicas.wait(2)]
        os.kill(balancer.pid, signal.SIGKILL)
    assert all(gone(pid) for pid in pids)


SCRIPT = """
import sys, time
from local_cloud.scaling import standin
from local_cloud.scaling.haproxy import HAProxy
from local_cloud.scaling.replicas import ReplicaSet
with HAProxy() as lb, ReplicaSet(standin.command, balancer=lb, least=3) as replicas:
    print(lb.pid, *[replica.pid for replica in replicas.wait(3)], flush=True)
    time.sleep(60)
"""


def test_ctrl_c_leaves_nothing() -> None:
    argv = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    ) as run:
        assert run.stdout
        pids = [int(word) for word in run.stdout.readline().split()]
        assert len(pids) == 4
        run.send_signal(signal.SIGINT)
        run.wait(30)
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize(
    "wrong",
    [
        {"least": -1},
        {"least": 3, "most": 2},
        {"most": 0},
        {"ready_s": 0},
        {"hang_s": float("nan")},
        {"drain_s": -1},
    ],
)
def test_impossible_sets_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected .* between .* found"):
        ReplicaSet(FAST, **wrong)


def test_impossible_sizes_are_refused() -> None:
    with ReplicaSet(FAST, least=0) as replicas:
        for wrong in (-1, float("nan")):
            with pytest.raises(ValueError, match="Expected the replicas wanted"):
                replicas.scale(wrong)  # type: ignore[arg-type]


# The control loop.


@dataclass
class PerReplica:
    """So many requests a replica: the simplest policy there is."""

    requests: float
    seen: list[Load] = field(default_factory=list)

    def desired(self, load: Load) -> int:
        self.seen.append(load)
        return round(load.concurrency / self.requests)

    def reset(self) -> None:
        self.seen.clear()


def test_the_loop_follows_the_load_and_no_request_fails() -> None:
    policy = PerReplica(4)
    with (
        fleet(least=1, most=4) as (balancer, replicas),
        ControlLoop(policy, replicas, balancer, every_s=0.4) as loop,
    ):
        replicas.wait(1)
        outcomes = open_loop(balancer.url, 120, 2.5, service_ms=100)
        wait_until(lambda: replicas.size == 1, 30, "the set to shrink")
        replicas.wait(1)
    assert errors(outcomes) == []
    assert max(tick.size for tick in loop.history) >= 2
    assert [tick.load for tick in loop.history] == policy.seen
    times = [tick.time_s for tick in loop.history]
    assert times == sorted(times)
    busiest = max(loop.history, key=lambda tick: tick.load.concurrency)
    assert busiest.load.metric is not None
    assert (busiest.latency_s or 0) > 0.05  # by Little's law; a service takes 0.1


def test_the_loop_reads_the_replicas_own_metrics() -> None:
    policy = PerReplica(100)
    with (
        fleet() as (balancer, replicas),
        ControlLoop(
            policy,
            replicas,
            balancer,
            every_s=0.2,
            measure=scraped("standin_in_flight"),
        ) as loop,
    ):
        replicas.wait(2)
        open_loop(balancer.url, 60, 0.8, service_ms=200)
        stopped = replicas.ready()[0]
        replicas.kill(stopped.id, signal.SIGSTOP)
        wait_until(lambda: loop.history[-1].load.missing == 1, 30, "one to be missing")
        replicas.kill(stopped.id, signal.SIGCONT)
    assert max(tick.load.metric or 0 for tick in loop.history) > 1
    assert scraped("no_such_metric")(stopped) is None


def test_the_loop_ignores_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = iter([1e12, -1e12] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    with (
        fleet(least=1) as (balancer, replicas),
        ControlLoop(PerReplica(1), replicas, balancer, every_s=0.1) as loop,
    ):
        wait_until(lambda: len(loop.history) >= 5, 30, "five ticks")
    times = [tick.time_s for tick in loop.history]
    assert times == sorted(times)
    assert times[-1] < 60


class Wrong(PerReplica):
    def desired(self, load: Load) -> int:
        return -3


def test_a_policy_that_fails_stops_scaling_not_serving() -> None:
    with fleet(least=1) as (balancer, replicas):
        replicas.wait(1)
        loop = ControlLoop(Wrong(1), replicas, balancer, every_s=0.1).__enter__()
        wait_until(lambda: loop.failure, 20, "the failure")
        assert errors(open_loop(balancer.url, 20, 0.5, service_ms=1)) == []
        with pytest.raises(ValueError, match=r"Expected replicas from .* found -3"):
            loop.__exit__(None)
        assert replicas.size == 1


@pytest.mark.parametrize("every_s", [0, -1, float("nan"), 1e9])
def test_impossible_loops_are_refused(every_s: float) -> None:
    with (
        fleet(least=0) as (balancer, replicas),
        pytest.raises(ValueError, match="every"),
    ):
        ControlLoop(PerReplica(1), replicas, balancer, every_s=every_s)


# Regions.


def test_a_dead_region_costs_no_request_and_the_distance_shows() -> None:
    with (
        regions.region("near", FAST, replicas=1) as near,
        regions.region("far", FAST, replicas=1, round_trip_s=0.2) as far,
        regions.front([near, far]) as balancer,
    ):
        before = open_loop(balancer.url, 40, 0.5, service_ms=5)
        assert balancer.stats().member("far").taken == 0  # type: ignore[union-attr]
        after = open_loop(balancer.url, 40, 0.6, (0.2, near.fail), service_ms=5)

        def down() -> bool:
            return balancer.stats().member("near").state == "down"  # type: ignore[union-attr]

        wait_until(down, 20, "the near region to be out")
        late = open_loop(balancer.url, 40, 0.3, service_ms=5)
    assert errors(before) == errors(after) == errors(late) == []
    assert min(outcome.total_s for outcome in late) >= 0.2


def test_what_a_region_cannot_take_bursts_to_the_next() -> None:
    with (
        regions.region("own", serving("--slots", "2"), replicas=1, slots=2) as own,
        regions.region("cloud", FAST, replicas=1) as cloud,
        regions.front([own, cloud], spill_at=2) as balancer,
    ):
        calm = asyncio.run(one_by_one(balancer.url, 3))
        taken = balancer.stats().member("cloud").taken  # type: ignore[union-attr]
        peak = open_loop(balancer.url, 60, 1, service_ms=100)
        members = {one.name: one.taken for one in balancer.stats().members}
    assert errors(calm) == errors(peak) == []
    assert taken == 0
    assert members["cloud"] > len(peak) / 3
    assert members["own"] > len(calm)


def test_a_stream_keeps_its_pieces_over_a_distance() -> None:
    port = process.free_port()
    ready = f"http://127.0.0.1:{port}/health/ready"
    command = standin.command(port)
    with (
        process.child(command, ready=ready),
        regions.distance(port, 0.1) as far,
    ):
        import httpx

        with (
            httpx.Client(trust_env=False) as http,
            http.stream(
                "POST",
                f"http://127.0.0.1:{far}/",
                json={"pieces": 5, "service_ms": 250},
            ) as answer,
        ):
            pieces = list(answer.iter_text())
    assert len(pieces) >= 5
    assert pieces[-1].endswith("[DONE]\n\n")


@pytest.mark.parametrize("round_trip_s", [-1, float("nan"), 1e6])
def test_impossible_distances_are_refused(round_trip_s: float) -> None:
    with pytest.raises(ValueError, match="round_trip_s"):
        regions.distance(1, round_trip_s).__enter__()


def test_the_set_works_with_the_portable_balancer_too() -> None:
    class First:
        def pick(self, loads: Sequence[int]) -> int:
            return loads.index(min(loads))

    with (
        Proxy(First()) as balancer,
        ReplicaSet(FAST, balancer=balancer, least=2, stop_s=0.2) as replicas,
    ):
        replicas.wait(2)
        kill = (0.3, lambda: replicas.kill(replicas.ready()[0].id))
        outcomes = open_loop(balancer.url, 60, 1.2, kill, service_ms=10)
        replicas.wait(2)
    assert errors(outcomes) == []
