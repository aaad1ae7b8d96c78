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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course import draw, process
from course.measure import Series
from local_cloud.functions.cold_starts import Phase, burst, private_mb
from local_cloud.functions.errors import TooManyRequests
from local_cloud.functions.platform import REPOSITORY, Function, Platform

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEADLINE_S = 60.0
GOOGLE = REPOSITORY / "deploy/functions/google/main.py"

# What the pipeline is given to summarise. The last one cannot be: it is blank.
DOCUMENTS = {
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
    "blank.txt": " ",
}


def empty(event: Any, context: Any) -> None:
    """A handler that does nothing: what remains is the platform's own time."""


EMPTY = Function("empty", "local_cloud.functions.trials.empty", memory_mb=1769)


def overhead(cloud: Platform, calls: int) -> Series:
    """What the platform adds to a warm call, in milliseconds, by an empty handler."""
    cloud.deploy(EMPTY)
    cloud.invoke(EMPTY.name, {})
    took = []
    for _ in range(calls):
        begin = time.perf_counter()
        cloud.invoke(EMPTY.name, {})
        took.append(1000 * (time.perf_counter() - begin))
    return Series(tuple(took), "ms")


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


@contextmanager
def killer(cloud: Platform, name: str, times: int) -> Iterator[list[int]]:
    """kill -9 so many of the function's sandboxes while they work; lists their ids."""
    killed: list[int] = []
    over = threading.Event()

    def hunt() -> None:
        while len(killed) < times and not over.wait(0.02):
            busy = len(cloud.sandboxes(name)) > cloud.warm(name)
            for box in cloud.sandboxes(name) if busy else []:
                if box.pid and not box.frozen and box.pid not in killed:
                    with suppress(ProcessLookupError):  # it has ended by itself
                        os.kill(box.pid, signal.SIGKILL)
                        killed.append(box.pid)
                    break

    thread = threading.Thread(target=hunt, name="killer")
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


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


# ## Many callers, on two kinds of platforms


def sandboxes_at_once(
    cloud: Platform, function: Function, event: Any, callers: int
) -> list[Any]:
    """So many calls at once, a sandbox each: processes, their MB, ms, the answer."""
    cloud.deploy(function)
    burst(cloud, function.name, event, callers)  # the sandboxes are there now
    took, calls = burst(cloud, function.name, event, callers)
    boxes = cloud.sandboxes(function.name)
    memory = sum(private_mb(box.pid) for box in boxes if box.pid)
    return [len(boxes), memory, took, calls[0].answer["text"]]


def process_at_once(event: Any, callers: int) -> list[Any]:
    """So many calls at once to one process, as on Cloud Run: the same figures."""
    with google() as (port, pid), ThreadPoolExecutor(callers) as pool:
        text = ask_google(port, event)["text"]
        begin = time.perf_counter()
        list(pool.map(lambda _: ask_google(port, event), range(callers)))
        took = 1000 * (time.perf_counter() - begin)
        return [1, tree_mb(pid), took, text]


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


def draw_phases(starts: Mapping[str, Sequence[Phase]], ax: Axes) -> None:
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
