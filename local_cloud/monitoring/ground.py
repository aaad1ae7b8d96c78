"""Where a drill takes place: real API servers, edges, traffic, and who watches.

    with Ground(groups, {"steady": "api", "broken": "api"}) as ground:
        ground.edges["broken"].inject(errors=1.0)
        ground.watch.alerts()

Each experiment has an edge and traffic of its own, under a job of its own: so several
faults can be tried at one time, and none shows in another's windows.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from course.load import Outcome, client, constant_arrivals, post, run_open_loop
from course.process import Child, answers, child, free_port, wait_until
from local_cloud.monitoring import stack
from local_cloud.monitoring.evaluator import Evaluator
from local_cloud.monitoring.faults import Edge
from local_cloud.monitoring.receivers import Mailbox, Notification, Webhook
from local_cloud.monitoring.stack import Group, Stack

ROOT = Path(__file__).parents[2]
COMPLETIONS = "/v1/completions"
MODEL = "smollm2-135m-instruct"
ROWS, CONTEXT = 4, 512  # small servers: several run on one machine
RATE = 4.0  # requests a second on each edge
LONGEST_S = 900.0  # that traffic goes on
WARM_ANSWERS, WARM_S = 5, 60.0  # good ones on each edge, and how long they may take
LEAK_MIB_S = 20.0
ALWAYS_LONG = {"0": -100, "2": -100}  # the tokens that end an answer never come


def short_request(_: str) -> dict[str, Any]:
    """The least an API can be asked: one token."""
    return {"model": MODEL, "prompt": "The weather is", "max_tokens": 1}


def long_request() -> dict[str, Any]:
    """What keeps a row busy."""
    body = {"model": MODEL, "prompt": "Tell me all.", "max_tokens": 400}
    return {**body, "logit_bias": ALWAYS_LONG}


class Traffic:
    """Coroutines in a loop and thread of their own, ended with the block."""

    def __init__(self, *work: Callable[[], Any]) -> None:
        self._work = work

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(ready),))
        self._thread.start()
        wait_until(ready.is_set, 10, "the traffic to begin")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _run(self, ready: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        tasks = [asyncio.ensure_future(work()) for work in self._work]
        ready.set()
        await self._over.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def steady(
    url: str, ask: Callable[[], dict[str, Any]], rate: float, after_s: float
) -> None:
    """Requests by the clock, whatever becomes of them."""
    await asyncio.sleep(after_s)
    async with client() as http:

        async def send(_: int) -> Outcome:
            return await post(http, url + COMPLETIONS, ask(), deadline_s=30)

        arrivals = constant_arrivals(rate, LONGEST_S)
        await run_open_loop(send, arrivals, deadline_s=LONGEST_S + 60)


async def flood(url: str, at_once: int) -> None:
    """Long requests, always so many at once."""
    async with client() as http:

        async def user() -> None:
            while True:
                await post(http, url + COMPLETIONS, long_request(), deadline_s=300)

        async with asyncio.TaskGroup() as users:
            for _ in range(at_once):
                users.create_task(user())


class Server:
    """One API server as a child process, that can be stopped, and made to leak."""

    def __init__(self, running: Child, port: int) -> None:
        self.child, self.address = running, f"127.0.0.1:{port}"
        self.url = f"http://{self.address}"
        self._flood: Traffic | None = None

    def freeze(self) -> None:
        """SIGSTOP: it keeps its sockets and answers nothing."""
        os.kill(self.child.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT; harmless if it runs."""
        with suppress(ProcessLookupError):
            os.kill(self.child.pid, signal.SIGCONT)

    def leak(self) -> None:
        """Lose LEAK_MIB_S from now on."""
        os.kill(self.child.pid, signal.SIGUSR1)

    def mend(self) -> None:
        """Lose no more, and give back what was lost."""
        with suppress(ProcessLookupError):
            os.kill(self.child.pid, signal.SIGUSR2)

    def overload(self) -> None:
        """Four times as many long answers at once as it has rows for."""
        self._flood = Traffic(lambda: flood(self.url, 4 * ROWS)).__enter__()

    def relieve(self) -> None:
        """The overload leaves."""
        if self._flood:
            self._flood.__exit__()
            self._flood = None

    def restore(self) -> None:
        """Whatever was done to it is undone."""
        self.relieve()
        self.thaw()
        self.mend()


class Ground:
    """All that a drill needs, for the length of a `with` block.

    Args:
        groups: rule groups.
        edges: a job for each experiment -> the job of the server behind its edge.
        scale: 60 where a minute passes in a second.
        portable: without Prometheus, even where it is installed.
        ask: what the traffic of a job asks.
        more: further targets, job to "host:port".
        edges_s: thresholds that must be bucket edges.
        rate: requests a second on each edge.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        edges: Mapping[str, str],
        *,
        scale: float = 60.0,
        portable: bool = False,
        ask: Callable[[str], dict[str, Any]] = short_request,
        more: Mapping[str, str] | None = None,
        edges_s: Sequence[float] = (),
        rate: float = RATE,
    ) -> None:
        self.groups, self.jobs, self.scale = groups, edges, scale
        self.portable = portable or bool(stack.found())
        self.ask, self.more, self.edges_s = ask, more or {}, edges_s
        self.rate = rate
        self.servers: dict[str, Server] = {}
        self.edges: dict[str, Edge] = {}

    def __enter__(self) -> Self:
        with ExitStack() as inside:
            for job in dict.fromkeys(self.jobs.values()):
                self.servers[job] = self._start(inside)
            for job, behind in self.jobs.items():
                edge = Edge(self.servers[behind].url, edges_s=self.edges_s)
                self.edges[job] = inside.enter_context(edge)
            self.webhook = inside.enter_context(Webhook())
            self.mailbox = inside.enter_context(Mailbox())
            for job, server in self.servers.items():
                ready = f"{server.url}/health/ready"
                wait_until(lambda url=ready: answers(url), 120, f"{job} to be ready")
            work = [self._traffic(job) for job in self.jobs]
            inside.enter_context(Traffic(*work))
            # The first answers of a new server are slow. Whoever begins to watch then
            # has a bad past to judge by.
            wait_until(self._is_warm, WARM_S, "each edge to give good answers")
            kind = Evaluator if self.portable else Stack
            targets = {job: edge.address for job, edge in self.edges.items()}
            targets |= {job: server.address for job, server in self.servers.items()}
            receivers = [self.webhook, self.mailbox]
            self.watch = inside.enter_context(
                kind(self.groups, {**targets, **self.more}, receivers, scale=self.scale)
            )
            self.watch.await_scraped()
            self._inside = inside.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._inside.close()

    def _start(self, inside: ExitStack) -> Server:
        port = free_port()
        module = ["-m", "local_cloud.monitoring.leak", str(LEAK_MIB_S)]
        program = [str(ROOT / "model_api.py"), "--serve", "--port", str(port)]
        limits = {"ROWS": ROWS, "CONTEXT": CONTEXT, "TTFT_TARGET_MS": 600_000}
        env = {name: str(value) for name, value in limits.items()}
        env |= {"REQUESTS_PER_MINUTE": "0", "TOKENS_PER_MINUTE": "0"}
        env |= {"PYTHONPATH": str(ROOT)}
        running = child([sys.executable, *module, *program], env=env)
        server = Server(inside.enter_context(running), port)
        inside.callback(server.restore)  # who is stopped cannot end
        return server

    def _traffic(self, job: str) -> Callable[[], Any]:
        url = self.edges[job].url
        # In turns: requests that come all at once wait for each other.
        turn_s = list(self.jobs).index(job) / len(self.jobs) / self.rate
        return lambda: steady(url, lambda: self.ask(job), self.rate, turn_s)

    def _is_warm(self) -> bool:
        return all(
            edge.answered >= WARM_ANSWERS and edge.waiting <= 1
            for edge in self.edges.values()
        )

    @property
    def notifications(self) -> list[Notification]:
        """By webhook and by mail."""
        return [*self.webhook.notifications, *self.mailbox.notifications]
