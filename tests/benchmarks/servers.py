"""The servers under test, each a child process: ours, and llama.cpp's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from course.process import child, free_port
from tests.benchmarks.turns import ROOT, THREADS

CHAT = "/v1/chat/completions"
SLOTS = 16  # answers llama-server may write at once
SLOT_TOKENS = 512  # that each of them may hold


@dataclass(frozen=True)
class Server:
    """A running server, and what a request to it needs beside the common fields."""

    name: str
    port: int
    pid: int
    extra: dict[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"


@contextmanager
def ours(device: str = "cpu", **environment: str) -> Iterator[Server]:
    """`model_api.py --serve` as anyone would start it, but for the limits given."""
    port = free_port()
    argv = [sys.executable, str(ROOT / "model_api.py"), "--serve"]
    argv += ["--port", str(port), "--device", device]
    variables = {"DRAIN_SECONDS": "0", "REQUESTS_PER_MINUTE": "0"}
    variables |= {"TOKENS_PER_MINUTE": "0", **environment}
    ready = f"http://127.0.0.1:{port}/health/ready"
    with child(argv, env=variables, ready=ready, deadline_s=300) as running:
        yield Server("model_api", port, running.pid)


@contextmanager
def llama_server(binary: str, gguf: Path) -> Iterator[Server]:
    """`llama-server` with its defaults, but for slots, threads and the prompt cache."""
    port = free_port()
    argv = [binary, "--model", str(gguf), "--port", str(port), "--offline"]
    argv += ["--threads", str(THREADS), "--parallel", str(SLOTS)]
    argv += ["--ctx-size", str(SLOTS * SLOT_TOKENS)]
    ready = f"http://127.0.0.1:{port}/health"
    with child(argv, ready=ready, deadline_s=60) as running:
        yield Server("llama-server", port, running.pid, {"cache_prompt": False})


def llama_server_version(binary: str) -> str | None:
    """What it says of itself; None where it does not run."""
    try:
        found = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=60
        )
    except OSError:
        return None
    lines = (found.stdout + found.stderr).splitlines()
    told = [line for line in lines if line.startswith("version")]
    return told[0] if found.returncode == 0 and told else None
