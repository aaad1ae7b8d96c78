"""What the lesson's demonstrations do to functions, and the pictures of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as MappingOf
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course import draw, process
from course.lesson import Run, Skip
from course.measure import Series
from course.show import Table
from local_cloud.functions import invoke_url
from local_cloud.functions.cold_starts import Call, Phase, burst, call, private_mb
from local_cloud.functions.errors import FunctionError, TooManyRequests
from local_cloud.functions.events import Bucket, Mapping
from local_cloud.functions.platform import REPOSITORY, Function, Platform
from local_cloud.functions.queue import Queue

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from local_cloud.functions.idempotency import SQLitePersistenceLayer

DEADLINE_S, PIPELINE_S = 60.0, 300.0
LOOK_S = 0.01  # between the killer's looks: a document takes 30 times as long
GOOGLE = REPOSITORY / "deploy/functions/google/main.py"

# What the pipeline is given to summarise. The first one cannot be: it is blank.
DOCUMENTS = {
    "blank.txt": " ",
    "tides.txt": "Tides are the rise and fall of the sea. The Moon's gravity pulls on "
    "the water, so most coasts have two high and two low tides a day.",
    "bread.txt": "Bread dough is left to rest so that yeast can eat its sugar. The gas "
    "that the yeast gives off makes the loaf rise and keeps it soft.",
    "maps.txt": "A map of the whole world is always wrong somewhere. A round surface "
    "cannot be laid flat without stretching either its areas or its angles.",
    "ports.txt": "A port number tells the operating system which program a packet is "
    "for. Ports below 1024 are reserved for services started by the administrator.",
    "iron.txt": "Iron rusts when it meets water and oxygen. Paint keeps both away, and "
    "zinc rusts in its place, which is why railings are galvanised.",
    "bees.txt": "Bees tell each other where flowers are by dancing. The angle of the "
    "dance shows the direction, and its length shows how far to fly.",
    "snow.txt": "Fresh snow is quiet because it is full of air. Sound gets lost in the "
    "small gaps between its crystals and does not come back.",
}


def empty(event: Any, context: Any) -> None:
    """A handler that does nothing: what remains is the platform's own time."""


EMPTY = Function("empty", "local_cloud.functions.trials.empty", memory_mb=1769)


def platform(run: Run) -> Platform:
    """The platform, one for all sections; its sandboxes end with the lesson."""
    try:
        return run.keep("platform", Platform)
    except FunctionError as missing:
        raise Skip(str(missing), "pip install -r requirements.txt") from None


def three_calls(cloud: Platform, name: str, event: Any) -> dict[str, Call]:
    """The first call, one at once again, and one that finds the sandbox frozen."""
    calls = {
        "first, a sandbox starts": call(cloud, name, event),
        "at once again": call(cloud, name, event),
    }
    freeze(cloud, name)
    return {**calls, "later, it was frozen": call(cloud, name, event)}


def overhead(cloud: Platform, calls: int, *, frozen: bool = False) -> Series:
    """What the platform adds to a warm call, in milliseconds, by an empty handler.

    `frozen` waits before each call until the sandbox is: then a thaw is part of it.
    """
    cloud.deploy(EMPTY)
    cloud.invoke(EMPTY.name, {})
    took = []
    for _ in range(calls):
        if frozen:
            freeze(cloud, EMPTY.name)
        begin = time.perf_counter()
        cloud.invoke(EMPTY.name, {})
        took.append(1000 * (time.perf_counter() - begin))
    return Series(tuple(took), "ms")


def lambda_client(url: str) -> Any:
    """AWS's own client, told another endpoint: asks once, and without a proxy."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "lambda",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="local",
        aws_secret_access_key="local",
        config=Config(retries={"max_attempts": 0}, proxies={}),
    )


def by_boto3(cloud: Platform, name: str, event: Any) -> Any:
    """The answer as AWS's own SDK gets it."""
    with invoke_url.serve(cloud) as url, closing(lambda_client(url)) as client:
        told = client.invoke(FunctionName=name, Payload=json.dumps(event))
        return json.loads(told["Payload"].read())


def refused(cloud: Platform, name: str, event: Any, callers: int) -> int:
    """How many of so many calls at once find no room: 429."""
    with ThreadPoolExecutor(callers) as pool:
        calls = [pool.submit(cloud.invoke, name, event) for _ in range(callers)]
    return sum(isinstance(call.exception(), TooManyRequests) for call in calls)


def freeze(cloud: Platform, name: str) -> None:
    """Wait until the function's sandboxes are frozen: some 50 ms after their call."""

    def frozen() -> bool:
        return all(box.frozen for box in cloud.sandboxes(name))

    process.wait_until(frozen, DEADLINE_S, f"the sandboxes of {name} to be frozen")


# ## Deadlines


def deadlines(
    cloud: Platform, ways: MappingOf[str, Function], event: Any, after: Any
) -> Table:
    """By way of writing it: a call that has no time to finish, and the next caller."""
    rows = [[how, *deadline(cloud, way, event, after)] for how, way in ways.items()]
    columns = ["handler", ("duration", "ms"), ("tokens given", ""), "how it ended"]
    return Table("The deadline", [*columns, ("the next caller waits", "ms")], rows)


def deadline(cloud: Platform, function: Function, event: Any, after: Any) -> list[Any]:
    """One call that has no time to finish, and what the next caller waits.

    Returns:
        Milliseconds, tokens given, how it ended, milliseconds of the next call.
    """
    cloud.deploy(function)
    result = cloud.invoke(function.name, event)
    answer = json.loads(result.payload)
    ended = answer.get("finish_reason") or answer["errorMessage"].split("Error: ")[-1]
    begin = time.perf_counter()
    cloud.invoke(function.name, after)
    next_ms = 1000 * (time.perf_counter() - begin)
    return [result.report.duration_ms, answer.get("tokens", 0), ended, next_ms]


# ## The pipeline


def run_pipeline(
    cloud: Platform,
    function: Function,
    data: Path,
    *,
    kills: int,
    batch_size: int,
    **settings: Any,
) -> tuple[Table, str]:
    """Bucket, queue, batches, dead letters; workers are killed within a document.

    One batch at a time, so that it is known whose work a kill interrupts.

    Args:
        function: deployed; finds `data` in its environment.
        data: a folder: documents, queues, summaries, and what was done.
        settings: of the queue.

    Returns:
        What became of the documents, and one of the summaries.
    """
    # Here, because the sandboxes of `empty` import this file, and this takes 0.15 s.
    from local_cloud.functions.storage import Storage

    dead = Queue(data / "dead")
    queue = Queue(data / "queue", dead_letters=dead, **settings)
    with dead, queue, closing(Storage(data)) as store:
        bucket = Bucket(data / "documents", queue)
        for name, text in DOCUMENTS.items():
            bucket.put(name, text.encode())
        bucket.close()
        with (
            killer(cloud, function.name, store.done, kills) as interrupted,
            Mapping(
                queue, cloud, function.name, batch_size=batch_size, concurrency=1
            ) as mapping,
        ):
            process.wait_until(
                lambda: not queue.counts().total, PIPELINE_S, "the queue to be empty"
            )
        told, letters = store.summaries(), dead.counts().total
    names = [name for name, _ in told]
    rows = [
        ["documents put", len(DOCUMENTS)],
        ["batches handed to the function", mapping.tally.invocations],
        ["workers killed by kill -9 within a document", len(interrupted)],
        ["messages that failed and came again", mapping.tally.failed],
        ["documents with a summary", len(set(names))],
        ["summaries written twice", len(names) - len(set(names))],
        ["dead letters (the blank document)", letters],
    ]
    table = Table("From an object to its summary", ["what", ("count", "")], rows)
    return table, f"{told[0][0]}: {told[0][1]}"


@contextmanager
def killer(
    cloud: Platform, name: str, done: SQLitePersistenceLayer, times: int
) -> Iterator[list[str]]:
    """kill -9 the function's worker within a document, so many times.

    Lists the documents (their keys among the records) that were begun and, the worker
    being dead, not finished. A kill that came too late for that is not counted.
    """
    seen: set[tuple[str, int]] = set()
    interrupted: list[str] = []
    over = threading.Event()

    def hunt() -> None:
        while len(interrupted) < times and not over.wait(LOOK_S):
            begun, workers = done.begun() - seen, cloud.sandboxes(name)
            if not begun or len(workers) != 1:
                continue
            (worker,) = workers  # one batch at a time: it is this one's document
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(worker.pid, signal.SIGKILL)
            process.wait_until(
                lambda worker=worker: not worker.alive, DEADLINE_S, "the worker's end"
            )
            seen.update(begun)
            interrupted.extend(key for key, _ in begun & done.begun())

    thread = threading.Thread(target=hunt, name="killer")
    thread.start()
    try:
        yield interrupted
    finally:
        over.set()
        thread.join()


# ## Many callers, on two kinds of platforms


@dataclass(frozen=True)
class Served:
    """So many calls at once: who answered them, and how."""

    processes: int
    memory_mb: float
    took_ms: float
    answer: str


def sandboxes_at_once(
    cloud: Platform, function: Function, event: Any, callers: int
) -> Served:
    """So many calls at once, a sandbox each."""
    cloud.deploy(function)
    burst(cloud, function.name, event, callers)  # the sandboxes are there now
    took, calls = burst(cloud, function.name, event, callers)
    boxes = cloud.sandboxes(function.name)
    memory = sum(private_mb(box.pid) for box in boxes if box.pid)
    return Served(len(boxes), memory, took, calls[0].answer["text"])


def process_at_once(event: Any, callers: int) -> Served:
    """So many calls at once to one process, as on Cloud Run."""
    with google() as (port, pid), ThreadPoolExecutor(callers) as pool:
        text = ask_google(port, event)["text"]
        begin = time.perf_counter()
        list(pool.map(lambda _: ask_google(port, event), range(callers)))
        took = 1000 * (time.perf_counter() - begin)
        return Served(1, tree_mb(pid), took, text)


def two_platforms(lambdas: Served, cloud_run: Served, callers: int) -> Table:
    """Both, side by side."""
    columns = ["platform", ("processes", ""), ("memory of their own", "MB")]
    columns += [(f"{callers} callers answered", "ms"), "the answer"]
    rows = [
        ["Lambda: one request a sandbox", *astuple(lambdas)],
        ["Cloud Run: many a process", *astuple(cloud_run)],
    ]
    return Table("One handler, two platforms (both on this machine)", columns, rows)


@contextmanager
def google() -> Iterator[tuple[int, int]]:
    """The handler under functions-framework, as Cloud Run runs it: its port and pid."""
    port = process.free_port()
    program = str(Path(sys.executable).with_name("functions-framework"))
    argv = [program, "--source", str(GOOGLE), "--target", "answer"]
    argv += ["--host", "127.0.0.1", "--port", str(port)]
    env = {"PYTHONPATH": str(REPOSITORY)}

    def listens() -> bool:
        with socket.socket() as knock:
            return knock.connect_ex(("127.0.0.1", port)) == 0

    with process.child(argv, env=env, ready=listens, deadline_s=DEADLINE_S) as running:
        yield port, running.pid


def ask_google(port: int, event: Any) -> Any:
    """Send a question as a CloudEvent in binary mode; gives the answer's data."""
    about = {"id": "1", "source": "/lesson", "type": "course.question.v1"}
    headers = {f"ce-{name}": value for name, value in about.items()}
    headers |= {"ce-specversion": "1.0", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request("POST", "/", json.dumps(event), headers)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(
            f"Expected functions-framework to answer, found {response.status}: {body!r}"
        )
    return json.loads(body)


def tree_mb(pid: int) -> float:
    """What a process and those it has started hold for themselves."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return private_mb(pid) + sum(tree_mb(int(child)) for child in children)


# ## Pictures


def draw_phases(starts: MappingOf[str, Sequence[Phase]], ax: Axes) -> None:
    """Cold starts as stacked bars of CPU time, one a way of writing the function."""
    names = list(dict.fromkeys(p.name for start in starts.values() for p in start))
    colours = (*draw.COLOURS, "#999999", "#DDDDDD", "#8B5A2B")
    drawn = set()
    for place, phases in enumerate(starts.values()):
        left = 0.0
        for phase in phases:
            colour = colours[names.index(phase.name)]
            (bar,) = ax.barh(place, phase.cpu_ms, left=left, height=0.55, color=colour)
            bar.set_edgecolor("white")
            bar.set_label("_" if phase.name in drawn else phase.name)
            drawn.add(phase.name)
            left += phase.cpu_ms
        total = f"{left:.0f} ms"
        ax.annotate(
            total, (left, place), (6, 0), textcoords="offset points", va="center"
        )
    ax.set_yticks(range(len(starts)), list(starts))
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.margins(x=0.12)
    ax.set_xlabel("CPU time until the first token (ms)")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=5, fontsize=10)
