"""Past one machine: the model on Ray Serve, and a node that is killed under load.

A fleet behind HAProxy ends at the machine's edge. Ray joins machines to one cluster:
whoever asks for a replica names what it needs, and Ray finds a node that has it. Here
two nodes are two sets of processes on 127.0.0.1; nothing else is emulated. Each has
room for one replica. The one without the cluster's head is killed, all its processes
at once, and a new node joins, as a cloud would send one.

What Serve cannot know is whether a request that broke with its replica may be asked
again. The client knows: an answer may be computed twice, so `ask` asks again.

The head itself must not die: with it goes the list of who is where. Sources: Ray's
documentation, Ray Serve, End-to-End Fault Tolerance.
"""

# Ray is optional:
# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from course import load
from course.load import Outcome
from course.process import free_port

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "pip install -r requirements-ray.txt"
SETTINGS = {  # read when Ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",  # it would report to its makers
    "RAY_enable_metrics_collection": "0",
    # On Windows and macOS Ray stays on 127.0.0.1, to spare people the firewall's
    # questions. The same switch keeps it there on Linux.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",  # or the second gets nothing
    # A silent node counts as dead after 3 s; by default it takes about 15.
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
NODE = {
    "num_cpus": 1,
    "object_store_memory": 80 << 20,  # requests and answers are small
    "node_ip_address": "127.0.0.1",
}
ROWS = 8  # answers of a replica at a time
TRIES, PAUSE_S = 5, 0.2  # of one request, the second after so long, then twice as long
PATIENCE_S = 20.0  # for one try
DEADLINE_S = 180.0  # for a whole trial


class NoRay(RuntimeError):
    """Ray is not installed."""


@dataclass(frozen=True)
class Trial:
    """A steady load, and when the node dies."""

    rate_per_s: float = 8.0
    seconds: float = 20.0
    kill_at_s: float = 4.0
    tokens: int = 16


@dataclass(frozen=True)
class Killed:
    """What became of the requests, and of the cluster."""

    sent: int
    answered: int
    failed_tries: int
    retried: int  # requests that were asked more than once
    reasons: dict[str, int]  # of the failed tries
    served_before: int  # replicas that answered before the kill
    last_failure_s: float | None  # after the kill; None: nothing failed
    healthy_s: float | None  # from the kill to an answer of a new replica
    median_s: float
    longest_s: float


def is_installed() -> bool:
    """Whether Ray Serve can be imported here."""
    return importlib.util.find_spec("ray") is not None


def kill_a_node(trial: Trial | None = None) -> Killed:
    """Run a trial in a process of its own; nothing of Ray is left after it.

    Raises:
        NoRay: it is not installed.
        RuntimeError: the trial failed; with its last lines.
    """
    if not is_installed():
        raise NoRay(f"Expected Ray Serve, found none. {INSTALL}")
    argv = [sys.executable, "-m", "local_cloud.scaling.ray_serve"]
    argv.append(json.dumps(asdict(trial or Trial())))
    with ExitStack() as stack:
        # A short path: the names of Ray's sockets below it have room for 107 bytes.
        short = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")
        folder = stack.enter_context(short)
        running = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, **SETTINGS, "RAY_TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        child = stack.enter_context(running)
        stack.callback(kill_session, child.pid)
        told, words = child.communicate(timeout=DEADLINE_S)
    if child.returncode:
        raise RuntimeError(f"Expected a trial with Ray, found:\n{words[-2000:]}")
    return Killed(**json.loads(told.splitlines()[-1]))


def kill_session(leader: int) -> None:
    """End what a trial that ended early has left: all who share its session."""
    for _ in range(3):  # they start each other
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(path.name)) == leader:
                    os.kill(int(path.name), signal.SIGKILL)
            except ProcessLookupError:  # it ended meanwhile
                continue


# In the trial's own process.


class Answers:
    """A replica: the shared model, and which node it is on."""

    def __init__(self) -> None:
        import ray

        import models

        self.model = models.load(rows=ROWS, context=512, threads=1)
        self.node = ray.get_runtime_context().get_node_id()

    async def __call__(self, request: Any) -> dict[str, str]:
        from models import Sampling

        asked = await request.json()
        ids = self.model.prompt(asked["prompt"])
        stream = self.model.submit(ids, Sampling(max_tokens=asked["max_tokens"]))
        return {"text": "".join([p.text async for p in stream]), "node": self.node}


def deployed() -> Any:
    """`Answers` as an application of Serve: one replica a node."""
    from ray import serve

    made = serve.deployment(
        Answers,
        # As many as there are nodes; a third once each has more to do than rows.
        autoscaling_config={
            "min_replicas": 2,
            "max_replicas": 3,
            "target_ongoing_requests": ROWS,
        },
        max_ongoing_requests=2 * ROWS,
        max_replicas_per_node=1,
        ray_actor_options={"num_cpus": 1},
        health_check_period_s=1,
        health_check_timeout_s=5,
    )
    return made.bind()


class Nodes:
    """A cluster of two nodes with a replica each, until the block ends."""

    def __enter__(self) -> Nodes:
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        with ExitStack() as stack:
            head = {**NODE, "include_dashboard": False}
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
            stack.callback(self._cluster.shutdown)
            self._second = self._cluster.add_node(**NODE)
            ray.init(address=self._cluster.address, logging_level="ERROR")
            stack.callback(ray.shutdown)
            port = free_port()
            self.url = f"http://127.0.0.1:{port}/"
            options = {"host": "127.0.0.1", "port": port}
            serve.start(proxy_location="HeadOnly", http_options=options)
            stack.callback(serve.shutdown)
            serve.run(deployed())
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def lose_one(self) -> None:
        """SIGKILL to every process of the second node."""
        import psutil  # Ray brings it along

        raylet = psutil.Process(self._second.all_processes["raylet"][0].process.pid)
        for process in [*raylet.children(recursive=True), raylet]:
            process.kill()

    def join(self) -> None:
        """A new node; Ray gives it what has no place elsewhere."""
        self._cluster.add_node(wait=False, **NODE)


@dataclass
class Client:
    """Asks, and asks again where nothing came of it; remembers what it saw."""

    url: str
    tokens: int
    began: float = 0.0
    failures: list[tuple[float, str]] = field(default_factory=list)  # when, why
    answers: list[tuple[float, str]] = field(default_factory=list)  # when, which node
    retried: set[int] = field(default_factory=set)

    async def ask(self, http: Any, number: int) -> Outcome:
        import httpx

        began, pause_s = time.perf_counter(), PAUSE_S
        body = {"prompt": f"Name number {number}.", "max_tokens": self.tokens}
        for attempt in range(TRIES):
            if attempt:
                self.retried.add(number)
                await asyncio.sleep(pause_s)
                pause_s *= 2
            try:
                answer = await http.post(self.url, json=body, timeout=PATIENCE_S)
                answer.raise_for_status()
            except httpx.HTTPStatusError as error:
                self._failed(f"status {error.response.status_code}")
            except httpx.TransportError as error:
                self._failed(type(error).__name__)
            else:
                self.answers.append((self.now(), answer.json()["node"]))
                total_s = time.perf_counter() - began
                return Outcome(status=200, total_s=total_s)
        return Outcome(error=f"none of {TRIES} tries was answered")

    def _failed(self, why: str) -> None:
        self.failures.append((self.now(), why))

    def now(self) -> float:
        return time.perf_counter() - self.began


def load_and_kill(nodes: Nodes, trial: Trial) -> Killed:
    """Send the load, kill the node in the midst of it, and tell what came of it."""
    asking = Client(nodes.url, trial.tokens)
    with ThreadPoolExecutor(1) as beside:  # Ray starts nodes in the main thread only
        asyncio.run(send(asking, load.constant_arrivals(8, 1)))  # warm
        asking.answers.clear()
        asking.began = time.perf_counter()
        due = load.constant_arrivals(trial.rate_per_s, trial.seconds)
        sending = beside.submit(asyncio.run, send(asking, due))
        time.sleep(trial.kill_at_s)
        nodes.lose_one()
        killed_s = asking.now()
        nodes.join()
        outcomes = sending.result()
    old = {node for at, node in asking.answers if at <= killed_s}
    new = [at for at, node in asking.answers if node not in old]
    after = [at - killed_s for at, _ in asking.failures if at > killed_s]
    took = sorted(outcome.total_s for outcome in outcomes if outcome.ok)
    return Killed(
        sent=len(outcomes),
        answered=len(took),
        failed_tries=len(asking.failures),
        retried=len(asking.retried),
        reasons=dict(Counter(why for _, why in asking.failures)),
        served_before=len(old),
        last_failure_s=max(after, default=None),
        healthy_s=min(new) - killed_s if new else None,
        median_s=took[len(took) // 2],
        longest_s=took[-1],
    )


async def send(asking: Client, due: list[float]) -> list[Outcome]:
    async with load.client() as http:
        return await load.run_open_loop(lambda number: asking.ask(http, number), due)


def main(argv: list[str] | None = None) -> int:
    """The trial's process: settings in, result out, both JSON."""
    (settings,) = sys.argv[1:] if argv is None else argv
    trial = Trial(**json.loads(settings))
    with Nodes() as nodes:
        found = load_and_kill(nodes, trial)
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
