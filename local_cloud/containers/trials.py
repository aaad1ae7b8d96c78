"""What the Docker lesson does to processes and containers: ask, watch, attack, stop."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course import process, report
from course.draw import COLOURS
from course.measure import Series
from course.request import Outcome, client, stream_chat
from local_cloud.containers.engine import ROOT, Container, ContainerError
from local_cloud.containers.layers import Weight

NAME = "smollm2-135m-instruct"
CHAT = "/v1/chat/completions"
READY = "/health/ready"
MB = 1e6
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


async def _chat(http: Any, url: str, key: str, tokens: int, words: int) -> Outcome:
    # A beginning that no cache has seen.
    text = f"{secrets.token_hex(4)} " + "and so on " * (words // 3)
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "logit_bias": FULL_LENGTH,
    }
    return await stream_chat(http, url + CHAT, body, {"authorization": f"Bearer {key}"})


def tokens_per_s(url: str, key: str, tokens: int = 48) -> float:
    """What one caller alone gets."""
    (outcome,) = ask(url, key, tokens=tokens)
    assert outcome.time_per_token_s
    return 1 / outcome.time_per_token_s


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
        "import subprocess; subprocess.run(['/tmp/x', '-c', '']); print('done')"
    ),
    "give a file away": TRY.format("import os; os.chown('/tmp', 1, 1); print('done')"),
    "count what root left it": CAPABILITIES,
    "start processes without end": FORK,
}


def attack(box: Container, *, user: str = "") -> dict[str, str]:
    """Runs every attempt inside; what came of each."""
    return {
        name: box.run("python", "-c", code, user=user)[1].splitlines()[-1]
        for name, code in ATTEMPTS.items()
    }


# -- stopping in the middle of an answer


@dataclass(frozen=True)
class Drained:
    """What became of an answer whose server was told to stop."""

    before: int  # pieces that had come when the stop was asked for
    after: int  # that came later
    whole: bool
    exit_code: int
    seconds: float  # from asking to the end of the container


def drain(
    box: Container, key: str, stop: Callable[[], None], tokens: int = 160
) -> Drained:
    """Asks for an answer, stops the server in the middle of it, reads on."""

    async def both() -> tuple[Outcome, float, float]:
        async with client() as http:
            start = time.perf_counter()
            answer = asyncio.create_task(_chat(http, box.url, key, tokens, 30))
            await asyncio.sleep(0.3)
            asked = time.perf_counter()
            await asyncio.to_thread(stop)
            ended = time.perf_counter()
            return await answer, asked - start, ended - asked

    outcome, asked_s, took_s = asyncio.run(both())
    times = itertools.accumulate(outcome.gaps_s, initial=outcome.first_token_s or 0.0)
    pieces = list(times)
    before = sum(moment <= asked_s for moment in pieces)
    whole = outcome.ok and outcome.tokens == tokens
    code = box.state["ExitCode"]
    return Drained(before, len(pieces) - before, whole, code, took_s)


def crash(box: Container, deadline_s: float = 30.0) -> tuple[float, int]:
    """Kills the server from inside; seconds until it serves again, and restarts.

    Not `docker kill`: the engine takes that for your wish, and restarts nothing. Nor a
    signal to process 1 by itself, which the kernel shields from its own container: so
    init is process 1 there (`init: true`), and the server, its child, can be killed.
    """
    import docker.errors

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
    with suppress(docker.errors.APIError):
        process.wait_until(
            lambda: process.answers(box.url + READY),
            deadline_s,
            f"{box.made.name} to be ready again",
        )
    return time.perf_counter() - start, box.made.attrs["RestartCount"] - before


KILL_SERVER = """
import os, pathlib
for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    pid, words = int(path.parent.name), path.read_bytes().split(bytes(1))
    if pid != os.getpid() and words[0].endswith(b'python') and b'--serve' in words:
        os.kill(pid, 9)
"""


# -- secrets, locks, arguments


@contextmanager
def key_file(key: str) -> Iterator[Path]:
    """A secret as a file that the container's user may read and nobody guesses."""
    with tempfile.TemporaryDirectory(prefix="secret-") as folder:
        path = Path(folder) / "api_keys"
        path.write_text(key + "\n")
        path.chmod(0o444)  # the user inside has another number than ours
        yield path


def lock_row(lock: Path) -> list[Any]:
    """What a lock holds: packages, hashes, and packages that have none."""
    entries = re.split(r"(?m)^(?=[A-Za-z0-9])", lock.read_text())
    pins = [entry for entry in entries if "==" in entry.partition("\n")[0]]
    hashes = [entry.count("--hash=sha256:") for entry in pins]
    return [lock.name, len(pins), sum(hashes), hashes.count(0)]


def name_and_value(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    return name, value


# -- one image's figures


@dataclass(frozen=True)
class Measured:
    """One rung's figures; lists hold one value a turn."""

    weight: Weight
    rebuild_s: float
    start_s: list[float]
    rate: list[float]  # tokens/s of one caller

    def row(self, name: str) -> list[Any]:
        size, zipped = self.weight.bytes / MB, self.weight.gzipped / MB
        packages = [self.weight.debs, self.weight.python, self.weight.shell]
        start, rate = Series(tuple(self.start_s)), Series(tuple(self.rate))
        return [
            name,
            size,
            zipped,
            self.rebuild_s,
            start.median,
            rate.median,
            *packages,
        ]


def once(name: str, measure: Callable[[], float]) -> float:
    """What was measured under this name before, or is now: for what takes long."""
    kept = report.folder() / "measured.cache"
    try:
        known = json.loads(kept.read_text())
    except (OSError, ValueError):  # none yet, or broken: measure anew
        known = {}
    if name not in known:
        known[name] = measure()
        report.write(kept, json.dumps(known))
    return known[name]


# -- a picture of layers


def draw_layers(weights: dict[str, Weight], ax: Any) -> None:
    """One bar an image: its layers side by side, base first, the model hatched."""
    for place, weight in enumerate(weights.values()):
        left, parts = 0.0, [x for x in weight.layers if x[1].bytes > 5e5]
        for i, (step, layer) in enumerate(parts):
            width = layer.bytes / 1e6
            ax.barh(place, width, left=left, color=COLOURS[i % 6], edgecolor="white")
            if width > 40:
                label = f"{short(step)}\n{width:.0f}"
                ax.text(
                    left + width / 2,
                    place,
                    label,
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white",
                )
            left += width
        model = weight.model_bytes / 1e6
        ax.barh(place, model, left=left, color="none", edgecolor="#888", hatch="//")
        ax.text(
            left + model + 6,
            place,
            f"{weight.bytes / MB:.0f} + model {model:.0f}",
            va="center",
        )
    ax.set_yticks(range(len(weights)), list(weights))
    ax.invert_yaxis()
    ax.margins(x=0.18)
    ax.grid(visible=False)
    ax.set_xlabel("MB, uncompressed; one colour a layer, the model hatched")
    ax.set_title("What the layers weigh")


def short(step: str, most: int = 18) -> str:
    """An instruction in few characters: the builder's own words dropped."""
    words = step.replace("/bin/sh -c", "").replace("#(nop)", "").split()
    words = [
        w for w in words if not w.startswith(("--", "file:", "dir:", "|", "multi:"))
    ]
    text = " ".join(words).replace("COPY in /", "COPY /").replace("?", "base")
    return text if len(text) <= most else text[: most - 1] + "…"


def medians(rows: Sequence[Sequence[float]]) -> list[float]:
    """The median of every column."""
    from statistics import median

    return [median(column) for column in zip(*rows, strict=True)]
