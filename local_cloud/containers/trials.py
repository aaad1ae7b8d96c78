"""What the Docker lesson does to processes and containers: ask, watch, attack, stop."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
from course import process
from course.request import Outcome, client, stream_chat
from local_cloud.containers import compose
from local_cloud.containers.engine import ROOT, Container, ContainerError, Engine

NAME = "smollm2-135m-instruct"
CHAT = "/v1/chat/completions"
READY = "/health/ready"
PORT = 8000  # inside every container
START_S = 60.0  # until a container must be ready; it takes one or two
SECRET = "/run/secrets/api_keys"
MB = 1e6
TEMPLATE = 48  # tokens at most that a prompt has beside its words
# The two tokens that end an answer. Without them it has exactly max_tokens tokens.
FULL_LENGTH = {"0": -100, "2": -100}


# -- asking


def ask(
    url: str, key: str, *, callers: int = 1, tokens: int = 32, words: int = 30
) -> list[Outcome]:
    """Lets so many callers ask at once, each for an answer of so many tokens."""

    async def all_of_them() -> list[Outcome]:
        async with client() as http:
            return await asyncio.gather(
                *(_chat(http, url, key, tokens, words) for _ in range(callers))
            )

    told = asyncio.run(all_of_them())
    if bad := next((outcome for outcome in told if not outcome.ok), None):
        raise RuntimeError(
            f"Expected an answer of {tokens} tokens from {url}, found status "
            f"{bad.status}: {bad.error}."
        )
    return told


async def _chat(
    http: Any, url: str, key: str, tokens: int, words: int, **how: Any
) -> Outcome:
    # A beginning that no cache has seen.
    text = f"{secrets.token_hex(4)} " + "and so on " * (words // 3)
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "logit_bias": FULL_LENGTH,
    }
    headers = {"authorization": f"Bearer {key}"}
    # "Remote" is the address that the engine of this machine gave a container of ours.
    return await stream_chat(http, url + CHAT, body, headers, allow_remote=True, **how)


def tokens_per_s(url: str, key: str, tokens: int = 24) -> float:
    """What one caller alone gets."""
    (outcome,) = ask(url, key, tokens=tokens)
    assert outcome.time_per_token_s
    return 1 / outcome.time_per_token_s


def work(box: Container, key: str) -> list[float]:
    """Seconds to its start, tokens/s; cores taken since then, MiB, and tasks."""
    start_s = box.wait_ready(READY, START_S)
    rate, used = tokens_per_s(box.url, key), box.stats()
    taken = used.cpu_s / (time.perf_counter() - box.started)
    return [start_s, rate, taken, used.memory_bytes / 2**20, used.pids]


def fill(url: str, key: str, rows: int, context: int) -> None:
    """Fills every row to its end at the same time, then the shelf of kept prompts.

    After that the cache of keys and values holds all that it ever can.
    """
    answer = context // 4  # so long that the last prompt is in before the first ends
    words = context - answer - TEMPLATE
    ask(url, key, callers=rows, tokens=answer, words=words)
    for _ in range(-(-models.SHELF // rows)):
        ask(url, key, callers=rows, tokens=8, words=context - 8 - TEMPLATE)


def endure(
    docker: Engine,
    image: str,
    key: str,
    options: dict[str, Any],
    *,
    callers: int = 32,
    words: int = 1000,
) -> list[Any]:
    """Starts the API; if it serves, lets many callers come with long prompts.

    Gives its exit code (None: it lives), the seconds until then, and what happened.
    """
    with docker.container(image, **options) as box:
        when, answered, code = "while it started", False, None
        with suppress(RuntimeError):  # it ended, or cut them off
            box.wait_ready(READY, START_S)
            when = f"when {callers} long prompts came"
            ask(box.url, key, callers=callers, tokens=8, words=words)
            answered = True
        if not answered:
            with suppress(ContainerError):  # it refused them, and lives
                code = box.wait_exit(START_S)
        took, killed = time.perf_counter() - box.started, box.state["OOMKilled"]
    by = "killed by the kernel" if killed else "ended"
    return [code, took, f"{by if code is not None else 'not killed'} {when}"]


# -- a process, as the kernel sees it


@dataclass(frozen=True)
class Usage:
    """What a process uses, by /proc."""

    memory_bytes: int  # resident
    peak_bytes: int
    cpu_s: float
    threads: int


def usage(pid: int) -> Usage:
    """Reads /proc, so on Linux only."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    # After the name in brackets, which may hold anything: state is field 3.
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(times[11]) + int(times[12])  # user and system
    return Usage(
        memory_bytes=int(fields["VmRSS"].split()[0]) * 1024,
        peak_bytes=int(fields["VmHWM"].split()[0]) * 1024,
        cpu_s=ticks / os.sysconf("SC_CLK_TCK"),
        threads=int(fields["Threads"]),
    )


@contextmanager
def api_outside(key: str) -> Iterator[tuple[str, process.Child, float]]:
    """The API as a plain process; gives its address, itself, and seconds to ready."""
    port = process.free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, str(ROOT / "model_api.py"), "--serve", "--port", str(port)]
    env = {"API_KEYS": key, "TTFT_TARGET_MS": "60000", "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    with process.child(argv, env=env, ready=url + READY, deadline_s=120) as child:
        yield url, child, time.perf_counter() - start


def profile(callers: tuple[int, ...]) -> tuple[list[list[Any]], Usage]:
    """Memory and CPU of the API, idle and with so many callers at once."""
    key, tokens = secrets.token_urlsafe(32), 16
    with api_outside(key) as (url, child, _):
        now = usage(child.pid)
        rows: list[list[Any]] = [["idle", *sizes(now), 0, None]]
        for count in callers:
            before = now
            ask(url, key, callers=count, tokens=tokens, words=30)
            now = usage(child.pid)
            cost_ms = 1000 * (now.cpu_s - before.cpu_s) / (count * tokens)
            name = f"{count} caller{'s' if count > 1 else ''}"
            rows.append([name, *sizes(now), count * tokens, cost_ms])
        return rows, now


def sizes(used: Usage) -> list[float]:
    return [used.memory_bytes / MB, used.peak_bytes / MB, used.threads]


# -- what an intruder would try

TRY = "try:\n {}\nexcept OSError as error: print('refused:', error.strerror)"
CAPABILITIES = "print(sum(int(x.split()[1], 16).bit_count() for x in "
CAPABILITIES += "open('/proc/self/status') if x.startswith('CapEff')), 'capabilities')"
FORK_MOST = 300  # processes at most, where nothing stops them
FORK = f"""
import os, time
children, why = [], 'nothing stopped it'
try:
    while len(children) < {FORK_MOST}:
        child = os.fork()
        if not child:
            time.sleep(20)
            os._exit(0)
        children.append(child)
except OSError as error:
    why = 'refused: ' + error.strerror
for child in children:
    os.kill(child, 9)
    os.waitpid(child, 0)
print(len(children), 'processes, then', why)
"""
ATTEMPTS = {
    "see who it is": "import os; print('user', os.getuid())",
    "change the program": TRY.format(
        "open('/app/model_api.py', 'a').close(); print('done')"
    ),
    "drop a file in /usr": TRY.format("open('/usr/x', 'w').close(); print('done')"),
    "drop a file in /tmp": TRY.format("open('/tmp/x', 'w').close(); print('done')"),
    "run what it dropped": TRY.format(
        "import os, shutil; shutil.copy(os.path.realpath('/proc/self/exe'), '/tmp/x'); "
        "os.chmod('/tmp/x', 0o755); "
        "import subprocess; subprocess.run(['/tmp/x', '-c', ''], check=True, "
        "env={'PYTHONHOME': '/usr/local'}); print('done')"
    ),
    "give a file away": TRY.format("import os; os.chown('/tmp', 1, 1); print('done')"),
    "count what root left it": CAPABILITIES,
    "start processes without end": FORK,
}


# A program that belongs to root and says so (setuid), started by somebody else.
BORROW = """
import os, shutil, subprocess
shutil.copy(os.path.realpath('/proc/self/exe'), '/tmp/x')
os.chmod('/tmp/x', 0o4755)
look = ['/tmp/x', '-c', 'import os; print("user", os.geteuid())']
subprocess.run(look, user=10001, env={'PYTHONHOME': '/usr/local'}, check=True)
"""


def attack(box: Container) -> dict[str, str]:
    """Runs every attempt inside; what came of each."""
    return {
        name: box.run("python", "-c", code)[1].splitlines()[-1]
        for name, code in ATTEMPTS.items()
    }


def borrow_root(docker: Engine, image: str, *precautions: str) -> str:
    """Who a program runs as that user 10001 starts and that is root's, setuid.

    Tried apart: elsewhere a read-only, noexec or nosuid file system stops it earlier.
    """
    command = ["python", "-c", BORROW]
    options = {"user": "0:0", "security_opt": list(precautions)}
    with docker.container(image, command=command, **options) as box:
        box.wait_exit(START_S)
        return box.logs()


# -- stopping in the middle of an answer


@dataclass(frozen=True)
class Drained:
    """What became of an answer whose server was told to stop."""

    before: int  # pieces that had come when the stop was asked for
    after: int  # that came later
    whole: bool
    exit_code: int
    seconds: float  # from asking to the end of the container

    @property
    def how(self) -> str:
        return "whole" if self.whole else "cut"


def drain(
    box: Container, key: str, stop: Callable[[], None], tokens: int = 160
) -> Drained:
    """Asks for an answer, stops the server in the middle of it, reads on."""

    pieces = 0

    async def both() -> tuple[Outcome, int, float]:
        begun = asyncio.Event()

        def count(so_far: int) -> None:
            nonlocal pieces
            pieces = so_far
            if so_far == 3:
                begun.set()

        async with client() as http:
            answer = asyncio.create_task(
                _chat(http, box.url, key, tokens, 30, on_piece=count)
            )
            answer.add_done_callback(lambda _: begun.set())  # none came: no wait
            await begun.wait()
            before, asked = pieces, time.perf_counter()
            await asyncio.to_thread(stop)
            took_s = time.perf_counter() - asked
            return await answer, before, took_s

    outcome, before, took_s = asyncio.run(both())
    whole = outcome.ok and outcome.tokens == tokens
    code = box.state["ExitCode"]
    return Drained(before, pieces - before, whole, code, took_s)


def crash(box: Container, deadline_s: float = START_S) -> tuple[float, int]:
    """Kills the server from inside; seconds until it serves again, and restarts.

    Not `docker kill`: the engine takes that for your wish, and restarts nothing. Nor a
    signal to process 1 by itself, which the kernel shields from its own container: so
    init is process 1 there (`init: true`), and the server, its child, can be killed.
    """
    before = box.made.attrs["RestartCount"]
    start = time.perf_counter()
    code, said = box.run("python", "-c", KILL_SERVER)
    if code not in (0, 137):  # 137: gone with the container before it could say so
        raise ContainerError(f"Expected to kill the server, found exit {code}: {said}")
    process.wait_until(
        lambda: (
            box.state["Status"] == "running" and box.made.attrs["RestartCount"] > before
        ),
        deadline_s,
        f"{box.made.name} to be restarted",
    )
    process.wait_until(
        lambda: process.answers(box.url + READY),
        deadline_s,
        f"{box.made.name} to be ready again",
    )
    return time.perf_counter() - start, box.made.attrs["RestartCount"] - before


def rehearse(
    docker: Engine, file: Path, override: dict[str, Any], key: str
) -> tuple[list[list[Any]], int]:
    """Compose's service `api` up, asked, crashed, down: (event, s, found); leftovers.

    Args:
        docker: the engine.
        file: the Compose file.
        override: what the service has instead.
        key: what its secret `api_keys` shall hold.
    """
    rows: list[list[Any]] = []
    with key_file(key) as path:
        secret = {"api_keys": {"file": str(path)}}
        merged = {"services": {"api": override}, "secrets": secret}
        port = str(process.free_port())
        with compose.project(docker, file, override=merged, API_PORT=port) as stack:
            rows.append(["up, until all is healthy", stack.up(START_S), "healthy"])
            api = stack.container("api", PORT)
            (told,) = ask(api.url, key, tokens=24)
            rows.append(["a chat", told.total_s, f"{told.tokens} tokens"])
            seconds, restarts = crash(api)
            rows.append(["a crash, until ready again", seconds, f"{restarts} restart"])
            start = time.perf_counter()
        took, left = time.perf_counter() - start, len(docker.having(stack.label))
    rows.append(["down", took, f"{left} things left"])
    return rows, left


KILL_SERVER = """
import os, pathlib
for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    pid, words = int(path.parent.name), path.read_bytes().split(bytes(1))
    if pid != os.getpid() and words[0].endswith(b'python') and b'--serve' in words:
        os.kill(pid, 9)
"""


# -- settings, secrets, arguments


@contextmanager
def key_file(key: str) -> Iterator[Path]:
    """A secret as a file that the container's user may read and nobody guesses."""
    with tempfile.TemporaryDirectory(prefix="secret-") as folder:
        path = Path(folder) / "api_keys"
        path.write_text(key + "\n")
        path.chmod(0o444)  # the user inside has another number than ours
        yield path


def wrong_start(
    docker: Engine, image: str, env: dict[str, str]
) -> tuple[int, float, str]:
    """Exit code, seconds until then, and what the container says."""
    with docker.container(image, environment=env) as box:
        code = box.wait_exit(START_S)
        seconds = time.perf_counter() - box.started
        return code, seconds, " ".join(box.logs().split())[:110]


def where_seen(docker: Engine, image: str, way: str) -> list[Any]:
    """Start with a key in a variable or in a file; look who else can read it."""
    key = secrets.token_urlsafe(32)
    with key_file(key) as path:
        options: dict[str, Any] = {"environment": {"API_KEYS": key}}
        if way == "file":
            mount = {str(path): {"bind": SECRET, "mode": "ro"}}
            options = {"environment": {"API_KEYS_FILE": SECRET}, "volumes": mount}
        with docker.container(image, port=PORT, **options) as box:
            box.wait_ready(READY, START_S)
            inspected = key in json.dumps(box.inspect())
            look = "import os; print(dict(os.environ))"
            inherited = key in box.run("python", "-c", look)[1]
            answered = ask(box.url, key, tokens=4)[0].ok
    return [inspected, inherited, answered]


def name_and_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    return name, value
