"""Balancing policies on real HAProxy, and what its members' accidents cost.

The replicas are stand-ins that wait a service time instead of computing, so that two
cores hold eight of them. Every policy gets the same requests at the same moments with
the same service times, and the simulator gets them too; theory knows only their rates.

The last section has no stand-ins: two processes of the real API answer, and one of them
is killed.

Run it:     python -m tests.benchmarks.balancer [--quick]     seven minutes, or one
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from course import lesson, load
from course.load import Outcome
from course.measure import Series
from course.process import Child, child, free_port, wait_until
from course.show import Cell, Table
from local_cloud.scaling import standin, theory, traffic
from local_cloud.scaling.balancer import Balancer, wait_up
from local_cloud.scaling.haproxy import HAProxy
from local_cloud.scaling.policies import Picker
from local_cloud.scaling.proxy import Proxy
from local_cloud.scaling.replicas import ReplicaSet
from local_cloud.scaling.simulator import Fleet, simulate
from local_cloud.scaling.traffic import Floats
from scaling_strategies import LeastConnections, PowerOfTwo, RoundRobin
from serving.service import MODEL_NAME
from tests.benchmarks import AFTER_LESSONS

PATH = "/v1/chat/completions"
# At 90 % a queue of one server takes 19 s to forget that it was empty, at 80 % 4.5 s:
# within the first quarter of a long run, which is not counted.
SERVERS, MEAN_S, RHO = 8, 0.05, 0.8
LONG_S, QUICK_S = 20.0, 5.0  # of traffic, each policy and turn
UNCOUNTED = 1 / 4
TURNS, QUICK_TURNS = 3, 1
API_RATE, API_TOKENS = 2.0, 16  # requests a second to two real models, and answers
NOTE = f"each replica {standin.NOTICE}"


@dataclass(frozen=True)
class Policy:
    """A way to balance, on HAProxy, in the simulator and in theory."""

    name: str
    haproxy: str
    picker: Callable[[], Picker | None]
    theory_s: float | None  # mean time in the system
    slots: int | None = None


LOAD = SERVERS * RHO
POLICIES = [
    Policy(
        "central queue",
        "queue",
        lambda: None,
        MEAN_S + theory.mmc_wait(SERVERS, LOAD, MEAN_S),
        slots=1,
    ),
    Policy("least connections", "leastconn", LeastConnections, None),
    Policy(
        "round robin",
        "roundrobin",
        RoundRobin,
        theory.round_robin(RHO, MEAN_S, SERVERS),
    ),
    Policy(
        "power of two",
        "random(2)",
        lambda: PowerOfTwo(seed=1),
        theory.power_of_choices(RHO, MEAN_S),
    ),
]


@dataclass(frozen=True)
class Requests:
    """The same for all: when each is due, and how long it takes."""

    due: Floats
    services: Floats

    @classmethod
    def drawn(cls, seconds: float, seed: int) -> Requests:
        rng = np.random.default_rng(seed)
        count = round(seconds * LOAD / MEAN_S)
        return cls(*traffic.steady(rng, SERVERS, RHO, MEAN_S, count))

    @property
    def uncounted(self) -> int:
        """So many came first, when the queues had not settled."""
        return int(UNCOUNTED * len(self.due))

    def simulated_s(self, policy: Policy) -> float:
        """The mean time in the system that these requests have in virtual time."""
        trace = simulate(self.due, self.services, Fleet(SERVERS), policy.picker())
        return trace.after(self.uncounted).mean_s


def send_all(
    url: str,
    due: Sequence[float],
    services: Sequence[float],
    *acts: tuple[float, Callable[[], object]],
) -> list[Outcome]:
    """Open-loop traffic of these service times; see `send_bodies`."""
    bodies = [{"service_ms": 1000 * service} for service in services]
    return send_bodies(url, due, bodies, *acts)


def send_bodies(
    url: str,
    due: Sequence[float],
    bodies: Sequence[Mapping[str, Any]],
    *acts: tuple[float, Callable[[], object]],
) -> list[Outcome]:
    """Open-loop traffic, and what happens meanwhile: (seconds, function)."""

    async def work() -> list[Outcome]:
        async def act(when: float, what: Callable[[], object]) -> None:
            await asyncio.sleep(when)
            await asyncio.to_thread(what)

        async with load.client(url) as http, asyncio.TaskGroup() as group:

            async def send(index: int) -> Outcome:
                return await load.post(http, PATH, bodies[index])

            for one in acts:
                group.create_task(act(*one))
            return await load.run_open_loop(send, due)

    return asyncio.run(work())


@contextmanager
def replica(name: str, balancer: Balancer, *options: str):
    """A stand-in that serves behind the balancer; gives it, and when it was ready."""
    port = free_port()
    ready = f"http://127.0.0.1:{port}/health/ready"
    with child(standin.command(port, *options), ready=ready, stop_s=1) as running:
        was_ready = time.perf_counter()
        balancer.add(name, "127.0.0.1", port)
        yield running, was_ready


def compare_policies(run: lesson.Run) -> None:
    """Mean and median time in the system under each policy, beside the predictions."""
    seconds = QUICK_S if run.quick else LONG_S
    turns = QUICK_TURNS if run.quick else TURNS
    run.predict(
        "One line for all waits least. Sending each request to the least busy comes "
        "close; looking at two by chance is worse, taking turns blindly the worst."
    )
    told: dict[str, list[list[float]]] = {policy.name: [] for policy in POLICIES}
    simulated: dict[str, list[float]] = {policy.name: [] for policy in POLICIES}
    failed = 0
    with (
        ReplicaSet(standin.command, least=SERVERS, most=SERVERS) as replicas,
        run.progress("policies", turns * len(POLICIES)) as advance,
    ):
        ports = [int(r.url.rpartition(":")[2]) for r in replicas.wait(SERVERS)]
        for turn in range(turns):
            requests = Requests.drawn(seconds, seed=turn)
            for policy in POLICIES[:: 1 if turn % 2 else -1]:
                outcomes = through(policy, ports, requests)
                failed += sum(not outcome.ok for outcome in outcomes)
                counted = outcomes[requests.uncounted :]
                told[policy.name].append([o.total_s for o in counted if o.ok])
                simulated[policy.name].append(requests.simulated_s(policy))
                advance()
    show_policies(run, told, simulated, failed)


def through(policy: Policy, ports: Sequence[int], requests: Requests) -> list[Outcome]:
    """The requests through a fresh HAProxy of this policy."""
    with HAProxy(policy.haproxy, slots=policy.slots, slow_start_s=0) as balancer:
        names = [f"replica-{port}" for port in ports]
        for name, port in zip(names, ports, strict=True):
            balancer.add(name, "127.0.0.1", port)
        wait_up(balancer, names)
        due, services = requests.due.tolist(), requests.services.tolist()
        return send_all(balancer.url, due, services)


def show_policies(
    run: lesson.Run,
    told: dict[str, list[list[float]]],
    simulated: dict[str, list[float]],
    failed: int,
) -> None:
    rows: list[list[Cell]] = []
    for policy in POLICIES:
        turns = told[policy.name]
        whole = Series(tuple(value for turn in turns for value in turn))
        low, high = min(map(fmean, turns)), max(map(fmean, turns))
        known = None if policy.theory_s is None else 1000 * policy.theory_s
        row = [policy.name, known, 1000 * fmean(simulated[policy.name])]
        row += [1000 * whole.mean, f"{1000 * low:.0f} to {1000 * high:.0f}"]
        rows.append([*row, 1000 * whole.median, 1000 * whole.p99, whole.n])
    columns = ["policy", ("theory, mean", "ms"), ("simulated, mean", "ms")]
    columns += [("measured, mean", "ms"), ("turns' means", "ms")]
    columns += [("median", "ms"), ("p99", "ms"), "n"]
    title = (
        f"{SERVERS} replicas, rho {RHO}, exponential service of {MEAN_S * 1000:.0f} ms"
    )
    note = (
        f"{NOTE}; the first quarter is not counted; simulated: the same requests in "
        "virtual time; theory of two: for "
        "infinitely many replicas, and HAProxy may draw the same one twice"
    )
    run.table(Table(title, columns, rows, note))
    order = sorted(rows, key=lambda row: row[3])  # type: ignore[arg-type, return-value]
    run.conclude(
        " < ".join(f"{row[0]} {row[3]:.0f}" for row in order)
        + f" ms; {failed} requests failed."
    )


def accidents(run: lesson.Run) -> None:
    """What a fleet's comings, goings and deaths cost the requests, and how long."""
    run.predict(
        "No request of more than a thousand fails, whatever happens to members."
    )
    rows: list[list[Cell]] = []
    for name, made in balancers().items():
        with (
            made() as balancer,
            ReplicaSet(
                lambda port: standin.command(port, "--slots", "8"),
                balancer=balancer,
                least=2,
                most=6,
            ) as replicas,
        ):
            rows.append([name, *storm(balancer, replicas)])
    columns = ["balancer", ("requests", ""), ("failed", ""), ("sent again", "")]
    columns += [("median", "ms"), ("slowest", "ms")]
    title = "2 replicas, then 4, one killed, then 2, one killed; 20 ms of service"
    run.table(Table(title, columns, rows, NOTE))
    turns = 3 if run.quick else 15
    spans = times(turns)
    columns = ["HAProxy", ("median", "ms"), ("slowest", "ms"), ("bar", "ms"), "n"]
    rows = [
        [name, 1000 * span.median, 1000 * span.max, bar, span.n]
        for name, (span, bar) in spans.items()
    ]
    run.table(Table("How long it takes", columns, rows))
    run.conclude(
        "At the slowest, " + "; ".join(f"{row[0]}: {row[2]:.0f} ms" for row in rows)
    )


def balancers() -> dict[str, Callable[[], Balancer]]:
    return {"HAProxy": HAProxy, "portable": lambda: Proxy(LeastConnections())}


def storm(balancer: Balancer, replicas: ReplicaSet) -> list[Cell]:
    """Scale out, kill, scale in, kill, all under open-loop load."""
    replicas.wait(2)
    due = load.poisson_arrivals(150, 10, seed=1)
    outcomes = send_all(
        balancer.url,
        due,
        [0.02] * len(due),
        (1.0, lambda: replicas.scale(4)),
        (3.5, lambda: replicas.kill(replicas.ready()[0].id)),
        (5.5, lambda: replicas.scale(2)),
        (7.5, lambda: replicas.kill(replicas.ready()[-1].id)),
    )
    total = Series(tuple(1000 * outcome.total_s for outcome in outcomes))
    failed = sum(not outcome.ok for outcome in outcomes)
    retried = balancer.stats().retried
    return [len(outcomes), failed, retried, total.median, total.max]


def times(turns: int) -> dict[str, tuple[Series, int | None]]:
    """Seconds of what happens to HAProxy and its members, and the bars in ms."""
    start, serving, crashed, hung = [], [], [], []
    for _ in range(turns):
        began = time.perf_counter()
        with HAProxy() as balancer, ExitStack() as stack:
            start.append(time.perf_counter() - began)
            one, _ = stack.enter_context(replica("one", balancer, "--slots", "8"))
            wait_up(balancer, ["one"])
            two, ready = stack.enter_context(replica("two", balancer, "--slots", "8"))
            serving.append(first_request(balancer, "two") - ready)
            crashed.append(until_down(balancer, "two", two, signal.SIGKILL))
            hung.append(until_down(balancer, "one", one, signal.SIGSTOP))
    return {
        "start to ready for members": (Series(tuple(start)), None),
        "member ready to its first request": (Series(tuple(serving)), 500),
        "kill -9 to out of rotation": (Series(tuple(crashed)), 1000),
        "kill -STOP to out of rotation": (Series(tuple(hung)), None),
    }


def first_request(balancer: HAProxy, name: str) -> float:
    """Ask until this member has had a request; gives when."""

    async def work() -> float:
        async with load.client(balancer.url) as http:
            while not (seen := balancer.stats().member(name)) or not seen.taken:
                await load.post(http, PATH, {"service_ms": 1})
            return time.perf_counter()

    return asyncio.run(work())


def until_down(
    balancer: HAProxy, name: str, running: Child, number: signal.Signals
) -> float:
    """Seconds from the signal until the member gets no more requests."""

    def down() -> bool:
        member = balancer.stats().member(name)
        return member is not None and member.state == "down"

    began = time.perf_counter()
    os.kill(running.pid, number)
    wait_until(down, 10, f"{name} to be out", every_s=0.005)
    return time.perf_counter() - began


def real_models(run: lesson.Run) -> None:
    """Two processes of the real API behind HAProxy; one is killed halfway."""
    run.predict("No request fails; until the killed one is back, answers take longer.")
    seconds = 10.0 if run.quick else 30.0
    with (
        HAProxy() as balancer,
        ReplicaSet(api, balancer=balancer, least=2, most=2, ready_s=180) as replicas,
    ):
        names = [replica.id for replica in replicas.wait(2, deadline_s=200)]
        due = load.poisson_arrivals(API_RATE, seconds, seed=1)
        killed_s = seconds / 2
        outcomes = ask_all(
            balancer.url, due, (killed_s, lambda: replicas.kill(names[0]))
        )
        replicas.wait(2, deadline_s=200)
        back_s = served_again(replicas)
        retried = balancer.stats().retried
    rows: list[list[Cell]] = []
    for what, low, high in (
        ("both serve", 0.0, killed_s),
        ("after the kill", killed_s, seconds),
    ):
        some = [o for o in outcomes if low <= o.due_s < high]
        total = Series(tuple(1000 * o.total_s for o in some))
        failed = sum(not o.ok for o in some)
        rows.append([what, len(some), failed, total.median, total.max])
    columns = ["when", ("requests", ""), ("failed", ""), ("median", "ms")]
    columns += [("slowest", "ms")]
    note = f"the real model, {API_TOKENS} tokens, {API_RATE:g} requests/s; "
    note += f"{retried} sent again"
    run.table(Table("Two replicas of model_api.py, one killed", columns, rows, note))
    run.conclude(
        f"Of {len(outcomes)} requests {sum(not o.ok for o in outcomes)} failed; the "
        f"killed replica's successor served {back_s:.1f} s after the kill."
    )


def api(port: int) -> list[str]:
    """The real API on a port."""
    return [sys.executable, "model_api.py", "--serve", "--port", str(port)]


def ask_all(
    url: str, due: Sequence[float], *acts: tuple[float, Callable[[], object]]
) -> list[Outcome]:
    """Questions to the real model, open loop, and what happens meanwhile."""
    bodies = [
        {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": f"Tell me of {number}."}],
            "max_tokens": API_TOKENS,
        }
        for number in range(len(due))
    ]
    return send_bodies(url, due, bodies, *acts)


def served_again(replicas: ReplicaSet) -> float:
    """Seconds from the crash to the successor's first being ready."""
    crashed = next(e.time_s for e in replicas.events if e.what == "crashed")
    return next(
        e.time_s - crashed
        for e in replicas.events
        if e.what == "ready" and e.time_s > crashed
    )


SECTIONS = [
    lesson.Section("Policies", compare_policies),
    lesson.Section("Accidents", accidents),
    lesson.Section("Real models", real_models),
]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
