"""What this machine has, and what to do about what it lacks.

`MACHINERY` names what some checks cannot do without; a grader asks `missing` for it.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from course.machine import memory_bytes
from exercises.catalogue import ROOT

PYTHONS = ((3, 11), (3, 13))  # the first and the last that the course is tested with
RAM_GIB = 3.5  # what a machine of "4 GB" shows; the model under load takes 1
PIN = re.compile(
    r"(?P<name>[\w.-]+)(\[[^]]*\])?==(?P<version>[^;\s]+)\s*(;(?P<marker>.*))?"
)
PORTS = {8000: "python model_api.py --serve"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `good` None means that only some exercises want it."""

    what: str
    good: bool | None
    found: str
    do: str = ""


def examine() -> list[Finding]:
    """Looks at everything."""
    return [python(), pins(), ram(), docker(), model(), prometheus(), *ports()]


def python() -> Finding:
    version = sys.version_info[:2]
    first, last = (".".join(map(str, v)) for v in PYTHONS)
    good = PYTHONS[0] <= version <= PYTHONS[1]
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        "Python", good, found, f"make the environment with Python {first} to {last}"
    )


def pins() -> Finding:
    """Whether the installed packages are those that requirements.txt names."""
    wrong = []
    for name, wanted in _wanted("requirements.txt").items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != wanted:
            wrong.append(f"{name} {found} (expected {wanted})")
    shown = ", ".join(wrong[:3]) + (" ..." if len(wrong) > 3 else "")
    do = f"{sys.executable} -m pip install -r requirements.txt"
    return Finding("packages", not wrong, shown or "all as pinned", do)


def _wanted(file: str) -> dict[str, str]:
    """Names and versions that a requirements file and those it includes pin."""
    wanted: dict[str, str] = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            wanted |= _wanted(line.removeprefix("-r ").strip())
        elif (pin := PIN.match(line)) and _applies(pin["marker"] or ""):
            wanted[pin["name"]] = pin["version"]
    return wanted


def _applies(marker: str) -> bool:
    """Whether a marker of the kind `sys_platform == "linux"` holds here."""
    rule = re.search(r'sys_platform\s*([!=]=)\s*"(\w+)"', marker)
    return not rule or (sys.platform == rule[2]) == (rule[1] == "==")


def ram() -> Finding:
    """All the machine's memory, in use or not."""
    gib = memory_bytes() / 2**30
    do = "take a machine with more, or run the lessons with --quick"
    return Finding("memory", True if gib >= RAM_GIB else None, f"{gib:.1f} GiB", do)


def docker() -> Finding:
    """A Docker engine that answers."""
    from local_cloud.containers import engine

    try:
        with engine.connect() as answers:
            version = answers.client.version()["Version"]
    except engine.NoEngine as none:
        return Finding("Docker engine", None, none.reason, none.command)
    return Finding("Docker engine", True, version)


def model() -> Finding:
    """Whether the model's files are built; only found here, never built."""
    from models import build

    files = build.find(build.model_folder(), "int4")
    found = "built" if files else "not built yet"
    return Finding("model", True if files else None, found, "python -m models")


def prometheus() -> Finding:
    """The programs that rules and alerts are tried with."""
    needed = ("prometheus", "promtool", "alertmanager")
    lacking = [name for name in needed if not shutil.which(_program(name))]
    found = f"no {', '.join(lacking)}" if lacking else "installed"
    do = "apt-get install -y prometheus prometheus-alertmanager"
    return Finding("Prometheus", None if lacking else True, found, do)


def _program(name: str) -> str:
    debian = f"prometheus-{name}"
    return debian if shutil.which(debian) else name


def ports() -> list[Finding]:
    """Ports that something else should not hold."""
    return [_port(number, user) for number, user in PORTS.items()]


def _port(number: int, user: str) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            do = f"stop what holds it (ss -ltnp), or: {user} --port {number + 1}"
            return Finding(f"port {number}", None, error.strerror or str(error), do)
    return Finding(f"port {number}", True, "free")


MACHINERY: dict[str, Callable[[], Finding]] = {
    "docker": docker,
    "model": model,
    "prometheus": prometheus,
}


@cache
def missing(what: str) -> str:
    """Why checks that need this cannot run here, and what to do; "" if they can."""
    finding = MACHINERY[what]()
    return "" if finding.good else f"{finding.found} To run it: {finding.do}"
