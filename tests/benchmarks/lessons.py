"""All six lessons one after another, as a course day would run them.

Each runs in a process of its own with warnings as errors. Before and after, this looks
at what a lesson could leave behind: processes, containers, networks, volumes, control
groups, and files in the repository, in the temporary folder and at home. Images are
meant to stay, so that the next run need not build them; at the end
`docker_deployment.py --clean` removes them.

It ends with 1 if a lesson failed or something is left behind.

Run it:     python -m tests.benchmarks.lessons [--quick]         some five minutes
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from course import lesson
from course.show import Table
from tests.benchmarks import AFTER_LESSONS

ROOT = Path(__file__).resolve().parents[2]
LESSONS = (
    "docker_deployment",
    "model_api",
    "serverless_deployment",
    "fireworks_deployment",
    "scaling_strategies",
    "monitoring_setup",
)
EXPECTED = {"reports", "build", "__pycache__", ".git"}  # may change: never looked into
SETTLE_S = 1.0  # what the kernel takes to remove what has ended
LIMIT_S = 300.0
DOCKER = ("container ls -a", "network ls", "volume ls")
IMAGES = ("image ls -a",)
CLEAN = [sys.executable, "docker_deployment.py", "--clean"]


def all_lessons(run: lesson.Run) -> None:
    """Run each, and compare what is there before and after."""
    run.predict(
        "Each ends within a minute (the first after it has built its images once)."
    )
    rows, left = [], []
    images = listed(IMAGES)
    with run.progress("lessons", total=len(LESSONS)) as advance:
        for name in LESSONS:
            before = everything()
            code, seconds, said = run_lesson(name, run.quick)
            time.sleep(SETTLE_S)
            found = sorted(everything() - before)
            left += found
            skipped = said.count("SKIPPED")
            rows.append((name, seconds, code, skipped, len(found)))
            advance()
    built = len(listed(IMAGES) - images)
    subprocess.run(CLEAN, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    left += sorted(listed(IMAGES) - images)
    columns = ["lesson", ("took", "s"), "exit code", "skipped", "left behind"]
    title = f"Six lessons{', quick' if run.quick else ''}, warnings as errors"
    run.table(Table(title, columns, rows))
    for thing in left:
        run.say(f"left behind: {thing}")
    total = sum(row[1] for row in rows)
    failed = [row[0] for row in rows if row[2]]
    run.conclude(
        f"{total:.0f} s in all, {len(failed)} failed, {len(left)} things left behind; "
        f"{built} images were built, and removed by --clean."
    )
    if failed or left:
        raise lesson.Failure(
            f"Expected lessons that end with 0 and leave nothing behind, found "
            f"{failed or 'none'} failed, {left or 'nothing'} left behind."
        )


def run_lesson(name: str, quick: bool) -> tuple[int, float, str]:
    """Its exit code, seconds, and all it said; stderr must stay empty."""
    argv = [sys.executable, "-W", "error", f"{name}.py", *["--quick"] * quick]
    begin = time.perf_counter()
    done = subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
    )
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    code = done.returncode or (1 if done.stderr else 0)
    return code, time.perf_counter() - begin, done.stdout


def everything() -> set[str]:
    """All that a lesson could leave behind, each with its kind before it."""
    found = {f"process {words}" for words in processes()}
    found |= listed(DOCKER)
    for controller in ("memory", "cpu", ""):
        base = Path("/sys/fs/cgroup", controller)
        found |= {f"group {path}" for path in base.rglob("functions-*")}
    found |= {f"file {path}" for path in Path(tempfile.gettempdir()).glob("*")}
    found |= {f"file {path}" for path in Path.home().glob("*")}
    return found | {f"file {path}" for path in repository(ROOT)}


def listed(listings: tuple[str, ...]) -> set[str]:
    """What the Docker engine lists, if there is one."""
    found: set[str] = set()
    for listing in listings if shutil.which("docker") else ():
        command = ["docker", *listing.split(), "-q", "--no-trunc"]
        done = subprocess.run(command, capture_output=True, text=True)
        found |= {f"docker {listing.split()[0]} {word}" for word in done.stdout.split()}
    return found


def processes() -> set[str]:
    """Number and command of every process that has a command (not the kernel's)."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if words[0] and int(folder.name) != os.getpid():
            found.add(f"{folder.name} {b' '.join(words).decode('utf-8', 'replace')}")
    return found


def repository(folder: Path) -> set[Path]:
    """Its files, without what lessons are meant to write."""
    found = set()
    for path in folder.iterdir():
        if path.name in EXPECTED or path.name.startswith(".venv"):
            continue
        found |= repository(path) if path.is_dir() else {path}
    return found


SECTIONS = [lesson.Section("All six lessons", all_lessons)]


def main(argv: list[str] | None = None) -> int:
    """Run them all."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
