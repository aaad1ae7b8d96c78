"""What other programs say of an image, where they are installed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from local_cloud.containers.engine import RUN_LABEL, Engine, EngineError

DEADLINE_S = 120.0


class ScannerError(EngineError):
    """A scanner that gave no report."""


def find(program: str) -> str | None:
    """A program's path: of this environment, or of the machine."""
    beside = Path(sys.executable).with_name(program)
    return str(beside) if beside.exists() else shutil.which(program)


def bill(syft: str, tag: str) -> dict[str, int]:
    """How many packages of each kind syft finds in an image."""
    command = [syft, "scan", f"docker:{tag}", "--output", "json", "--quiet"]
    told = _run(command)
    try:
        found = json.loads(told.stdout)["artifacts"]
    except (ValueError, KeyError):
        raise ScannerError(_words(command, told.stdout + told.stderr)) from None
    return dict(Counter(package["type"] for package in found))


def structure(
    program: str, docker: Engine, tag: str, configs: Sequence[Path]
) -> tuple[int, int]:
    """What passes and what fails of container-structure-test's tests of an image."""
    command = [program, "test", "--no-color", "--image", tag]
    command += [word for config in configs for word in ("--config", str(config))]
    with _its_containers_removed(docker, tag):
        told = _run(command)
    counts = dict(re.findall(r"(Passes|Failures):\s+(\d+)", told.stdout))
    if len(counts) != 2:
        raise ScannerError(_words(command, told.stdout + told.stderr))
    return int(counts["Passes"]), int(counts["Failures"])


@contextmanager
def _its_containers_removed(docker: Engine, tag: str) -> Iterator[None]:
    """Interrupted, it leaves behind the container of the command that it waits for."""
    everything = docker.client.containers.list
    before = {container.id for container in everything(all=True)}
    try:
        yield
    finally:
        for container in everything(all=True, filters={"ancestor": tag}):
            if container.id not in before and RUN_LABEL not in container.labels:
                container.remove(force=True, v=True)


def digest(files: Sequence[Path]) -> str:
    """Changes with any of the files."""
    return hashlib.sha256(b"".join(x.read_bytes() for x in files)).hexdigest()[:12]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        late = f"no end after {DEADLINE_S:g} s"
        raise ScannerError(_words(command, late)) from None


def _words(command: Sequence[str], said: str) -> str:
    return (
        f"Expected a report of `{' '.join(command)}`, found: {said.strip()[-500:]}\n"
        f"Do: run that command by itself."
    )
