"""A control loop and a set of replicas when what they call fails: neither stops."""

from __future__ import annotations

import threading
import time

import pytest

from course.load import client, post
from course.process import wait_until
from local_cloud.scaling import standin
from local_cloud.scaling.balancer import BalancerError, Traffic
from local_cloud.scaling.loop import ControlLoop
from local_cloud.scaling.policies import Load
from local_cloud.scaling.proxy import Proxy
from local_cloud.scaling.replicas import Event, ReplicaSet
from scaling_strategies import LeastConnections

DEADLINE_S = 60.0


class One:
    """Wants one replica, always."""

    def desired(self, load: Load) -> int:
        return 1

    def reset(self) -> None: ...


def test_the_loop_goes_on_when_the_balancer_answers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent = threading.Event()
    silent.set()  # from the very first look on
    with Proxy(LeastConnections()) as balancer, ReplicaSet(standin.command) as replicas:
        whole = balancer.stats

        def stats() -> Traffic:
            if silent.is_set():
                raise BalancerError("not now")
            return whole()

        monkeypatch.setattr(balancer, "stats", stats)
        with ControlLoop(One(), replicas, balancer, every_s=0.1) as loop:
            for _ in range(2):
                missed, ticks = loop.missed, len(loop.history)
                wait_until(lambda m=missed: loop.missed > m + 2, DEADLINE_S, "looks")
                silent.clear()
                wait_until(
                    lambda t=ticks: len(loop.history) > t + 2, DEADLINE_S, "ticks"
                )
                silent.set()
    assert loop.failure is None


def test_a_command_that_raises_is_told_and_tried_again() -> None:
    ports: list[int] = []

    def command(port: int) -> list[str]:
        ports.append(port)
        if len(ports) == 1:
            raise LookupError("no free accelerator")
        return standin.command(port)

    with ReplicaSet(command) as replicas:
        replicas.wait(1, DEADLINE_S)
    failed = [event for event in replicas.events if event.what == "failed"]
    assert [event.detail for event in failed] == ["no free accelerator"]


def test_who_watches_and_raises_ends_no_replica() -> None:
    def watch(event: Event) -> None:
        raise LookupError(f"nobody to tell of {event.what}")

    with ReplicaSet(standin.command, on_change=watch) as replicas:
        replicas.wait(1, DEADLINE_S)
    told = [event.what for event in replicas.events]
    assert told[::2] == ["started", "ready", "draining", "left"]
    assert set(told[1::2]) == {"untold"}
    assert "nobody to tell of started" in replicas.events[1].detail


def test_the_end_of_the_block_ends_a_drain() -> None:
    import asyncio

    def ask(url: str) -> None:
        async def send() -> None:
            async with client() as http:
                await post(http, url, {"service_ms": 600_000})

        asyncio.run(send())

    with Proxy(LeastConnections()) as balancer:
        with ReplicaSet(
            standin.command, balancer=balancer, least=0, drain_s=600, stop_s=0.2
        ) as replicas:
            replicas.scale(1)
            replicas.wait(1, DEADLINE_S)
            asks = threading.Thread(target=ask, args=(balancer.url + "/",))
            asks.start()
            wait_until(lambda: balancer.stats().in_flight, DEADLINE_S, "a request")
            replicas.scale(0)
            wait_until(
                lambda: [one.state for one in replicas.members] == ["draining"],
                DEADLINE_S,
                "a drain",
            )
            began = time.monotonic()
        assert time.monotonic() - began < 300  # of the 600 that a drain may take
        asks.join()
