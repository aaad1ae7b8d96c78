"""Which packages a lock holds, and whether each has a wheel for 64-bit ARM.

    python -m local_cloud.containers.packages      asks the index again, with pip

A lock knows its files by their hashes alone, not for which machines they are. So the
names are looked up once and kept in `deploy/wheels-aarch64.txt`; a name counts only
where its hash stands in the lock, so a newer lock shows what has to be looked up again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from local_cloud.containers.engine import ROOT

LOCK = ROOT / "requirements-serve.lock"
WHEELS = ROOT / "deploy" / "wheels-aarch64.txt"
REFRESH = "python -m local_cloud.containers.packages"
GLIBC = range(17, 37)  # Debian 12 has 2.36, and takes all that older ones take
HEADER = """\
# The wheels of {lock} for CPython 3.11 on 64-bit ARM with glibc 2.36:
# SHA-256 and name, as the index gave them on {day}. To look them up again:
#   {refresh}
"""


def entries(lock: Path) -> dict[str, list[str]]:
    """The hashes of each package that a lock pins."""
    parts = re.split(r"(?m)^(?=[A-Za-z0-9])", lock.read_text())
    return {
        part.partition("==")[0]: re.findall(r"--hash=sha256:(\w+)", part)
        for part in parts
        if "==" in part.partition("\n")[0]
    }


def lock_row(lock: Path) -> list[Any]:
    """What a lock holds: packages, hashes, and packages that have none."""
    hashes = [len(found) for found in entries(lock).values()]
    return [lock.name, len(hashes), sum(hashes), hashes.count(0)]


def on_arm(lock: Path = LOCK, wheels: Path = WHEELS) -> dict[str, list[str]]:
    """The lock's packages by what ARM gets: pure Python, compiled, or no wheel."""
    lines = [x.split() for x in wheels.read_text().splitlines() if x[:1] != "#"]
    names = dict(lines)
    kinds: dict[str, list[str]] = {"pure Python": [], "compiled": [], "none": []}
    for package, hashes in entries(lock).items():
        name = next((names[x] for x in hashes if x in names), "")
        machine = name.removesuffix(".whl").rpartition("-")[2]
        kind = "compiled" if machine.endswith("aarch64") else "none"
        kinds["pure Python" if machine == "any" else kind].append(package)
    return kinds


def looked_up(wheels: Path = WHEELS) -> str:
    """The day on which the names were asked for."""
    found = re.search(r"on (\d{4}-\d\d-\d\d)", wheels.read_text())
    return found[1] if found else "an unknown day"


def look_up(lock: Path = LOCK, wheels: Path = WHEELS) -> None:
    """Asks the index that pip knows which files ARM would get, and keeps the names.

    Raises CalledProcessError, after pip's own words, where a package has no wheel.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--no-deps", "--only-binary=:all:"]
        command += ["--require-hashes", "--implementation=cp", "--python-version=3.11"]
        command += ["--platform=manylinux2014_aarch64"]
        command += [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC]
        command += [f"--target={folder}", f"--report={report}", f"--requirement={lock}"]
        subprocess.run(command, check=True)
        chosen = json.loads(report.read_text())["install"]
    files = [item["download_info"] for item in chosen]
    lines = [
        f"{file['archive_info']['hashes']['sha256']}  {Path(file['url']).name}\n"
        for file in files
    ]
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    header = HEADER.format(lock=lock.name, day=day, refresh=REFRESH)
    wheels.write_text(header + "".join(lines))


if __name__ == "__main__":
    look_up()
    print({kind: len(names) for kind, names in on_arm().items()})
