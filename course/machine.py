"""The machine a figure was measured on, and how much of it this process may use."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CGROUP = Path("/sys/fs/cgroup")
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # the distributions of the runtime


def machine_card(
    model_digest: str | None = None, runtime: str | None = None
) -> dict[str, Any]:
    """What a figure was measured on; without it the figure means nothing."""
    card: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "cpu_quota": cpu_quota(),
        "ram_gib": round(memory_bytes() / 2**30, 1),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "runtime": runtime or _runtime(),
        "model": model_digest,
    }
    return {name: value for name, value in card.items() if value is not None}


def card_line(card: dict[str, Any]) -> str:
    """The machine card in one line of text."""
    cores = f"{card['cores']} cores" if card["cores"] > 1 else "1 core"
    if card["cpu_quota"] < card["cores"]:
        cores += f" (this process may use {card['cpu_quota']:g})"
    ram = f"{card['ram_gib']:g} GiB RAM"
    parts = [card["cpu"], cores, ram, card["os"], f"Python {card['python']}"]
    parts.append(card.get("runtime", "no onnxruntime"))
    if "model" in card:
        parts.append(f"model {card['model'][:12]}")
    return ", ".join(parts)


def cpu_quota(root: Path = CGROUP) -> float:
    """Cores this process may use: its affinity, or less where a cgroup limits it.

    `os.cpu_count()` counts the machine's cores, so inside a container with half a
    core it still says 64, and whoever sizes a thread pool by it gets throttled.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    quota, period = "max", "100000"
    if text := _first_line(root / "cpu.max"):  # cgroup v2: "quota period"
        quota, period = text.split()
    elif text := _first_line(root / "cpu" / "cpu.cfs_quota_us"):  # v1; -1 is none
        quota = text
        period = _first_line(root / "cpu" / "cpu.cfs_period_us") or period
    if quota == "max" or int(quota) <= 0:
        return cores
    return min(cores, int(quota) / int(period))


def memory_bytes(root: Path = CGROUP) -> int:
    """Bytes of memory there are, or fewer where a cgroup limits this process."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    files = (root / "memory.max", root / "memory" / "memory.limit_in_bytes")
    limits = [int(text) for text in map(_first_line, files) if text.isdigit()]
    return min([total, *limits])


def read_bandwidth(repeats: int = 5) -> float:
    """Bytes a second that this process's cores together read from memory, at best.

    The ceiling of whatever reads much and computes little: a decode step cannot be
    faster than its weights arrive.
    """
    from concurrent.futures import ThreadPoolExecutor
    from time import perf_counter

    import numpy as np

    cores = max(1, int(cpu_quota()))
    parts = [np.ones(16 * 2**20, np.int32) for _ in range(cores)]  # beyond any cache
    total = sum(part.nbytes for part in parts)
    fastest = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(repeats):
            started = perf_counter()
            list(pool.map(np.max, parts))  # numpy lets go of the interpreter's lock
            fastest = max(fastest, total / (perf_counter() - started))
    return fastest


def _first_line(path: Path) -> str:
    try:
        return path.read_text().partition("\n")[0].strip()
    except OSError:  # no such controller here
        return ""


def _cpu_model() -> str:
    names = ("model name", "Model", "Hardware")  # x86; some ARM boards
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() in names and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not Linux
        return ()


def _runtime() -> str | None:
    """The installed runtime's version, read from its metadata, not by importing it."""
    for name in RUNTIMES:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
