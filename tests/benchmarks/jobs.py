"""Jobs a second on both back ends, and what hundreds of kills leave of them.

Payloads of 200 bytes on this disk. Each submit waits until the disk has it, on SQLite
and on the first Redis; the second Redis (`appendfsync everysec`) does not wait, and may
lose the last second in a power cut. A lease and its acknowledgement are two calls. The
storm is tests/job_storm.py: three workers, one killed with SIGKILL every 20 ms.

Run it:     python -m tests.benchmarks.jobs [--quick]           three minutes
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from course import lesson
from course.measure import Series
from course.show import Cell, Table
from local_cloud.scaling.redis_jobs import INSTALL, redis_server
from tests import job_storm
from tests.benchmarks import AFTER_LESSONS

ROOT = Path(__file__).parents[2]
ROUNDS, QUICK_ROUNDS = 5, 2
JOBS = 2000  # of all processes together, a round
KILLS, QUICK_KILLS = 1000, 200
PAYLOAD = "x" * 200
LEASE_S = 0.3
BACK_ENDS = {"SQLite": None, "Redis, always": "always", "Redis, everysec": "everysec"}
CASES = [("submit", 1), ("submit", 2), ("lease and ack", 1), ("lease and ack", 2)]


@contextmanager
def place(back_end: str) -> Iterator[tuple[Path, str]]:
    """A folder, and a new queue's path or URL."""
    fsync = BACK_ENDS[back_end]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if fsync is None:
            yield folder, str(folder / "jobs")
            return
        with redis_server(folder, fsync=fsync) as url:
            yield folder, url


def available(run: lesson.Run) -> list[str]:
    """The back ends that this machine has."""
    if shutil.which("redis-server"):
        return list(BACK_ENDS)
    run.skip("Redis: no redis-server in PATH", INSTALL)
    return ["SQLite"]


def part(role: str, where: str, count: int) -> None:
    """One process's share of the work, begun when its stdin ends."""
    jobs = job_storm.opened(where)
    jobs.counts()  # connects
    print("ready", flush=True)
    sys.stdin.read()
    if role == "submit":
        for _ in range(count):
            jobs.submit(PAYLOAD)
    else:
        while job := jobs.lease("worker", 60):
            jobs.ack(job, "done")


def rate(role: str, where: str, processes: int) -> float:
    """Jobs a second of so many processes together."""
    argv = [sys.executable, "-m", "tests.benchmarks.jobs", "--role", role, where]
    argv += [str(JOBS // processes)]
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen(argv, cwd=ROOT, stdin=pipe, stdout=pipe)
        for _ in range(processes)
    ]
    try:
        for process in running:
            assert process.stdout
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError(f"Expected a process to start: {argv}")
        begun = time.perf_counter()
        for process in running:
            assert process.stdin
            process.stdin.close()  # go
        for process in running:
            if process.wait(120):
                raise RuntimeError(f"Expected exit code 0, found {process.returncode}")
        return JOBS / (time.perf_counter() - begun)
    finally:
        for process in running:
            process.kill()
            process.wait()


def throughput(run: lesson.Run) -> None:
    """Submits, then leases and acknowledgements, by back end and processes."""
    run.predict("What waits for the disk is as fast as the disk, not as the queue.")
    back_ends, rounds = available(run), QUICK_ROUNDS if run.quick else ROUNDS
    found: dict[tuple[str, str, int], list[float]] = {}
    with run.progress("throughput", rounds * len(back_ends)) as advance:
        for _ in range(rounds):
            for back_end in back_ends:
                with place(back_end) as (_, where):
                    for role, processes in order():
                        told = rate(role, where, processes)
                        found.setdefault((back_end, role, processes), []).append(told)
                advance()
    rows: list[list[Cell]] = []
    for (back_end, role, processes), rates in found.items():
        series = Series(tuple(rates))
        rows.append([back_end, role, processes, series.median, series.spread, series.n])
    columns = ["back end", "call", "processes", ("median", "jobs/s")]
    run.table(Table("Throughput", [*columns, ("spread", "jobs/s"), "n"], rows))
    ours, theirs = (
        Series(tuple(found[back_end, "lease and ack", 2])).median
        for back_end in (back_ends[0], back_ends[-1])
    )
    run.conclude(
        f"Two workers take and acknowledge {ours:,.0f} jobs/s from {back_ends[0]}, "
        f"{theirs:,.0f} from {back_ends[-1]}."
    )


def order() -> list[tuple[str, int]]:
    """Each submit is followed by the calls that empty the queue again."""
    return [CASES[0], CASES[2], CASES[1], CASES[3]]


def kills(run: lesson.Run) -> None:
    """Workers killed at work; nothing lost, nothing acknowledged twice."""
    run.predict(f"A killed worker's job comes back when its {LEASE_S} s are over.")
    count = QUICK_KILLS if run.quick else KILLS
    back_ends = available(run)[:2]  # a kill of workers is not of the server
    rows: list[list[Cell]] = []
    outcomes: list[job_storm.Outcome] = []
    with run.progress("storm", len(back_ends)) as advance:
        for back_end in back_ends:
            with place(back_end) as (folder, where):
                told = job_storm.run(folder, where, count, count, LEASE_S)
            outcomes.append(told)
            again = told.deliveries - told.jobs
            row: list[Cell] = [back_end, told.kills, told.jobs, again, told.lost]
            row += [told.twice, 1000 * told.latest_s, told.jobs / told.seconds]
            rows.append(row)
            advance()
    columns = ["back end", "kills", "jobs", "delivered again", "lost", "acked twice"]
    columns += [("latest after its lease", "ms"), ("done", "jobs/s")]
    note = "Bars: 0 lost, 0 twice, 500 ms. A job is work of 0 to 8 ms."
    run.table(Table("Storm", columns, rows, note))
    run.conclude(
        f"{sum(o.kills for o in outcomes):,} kills, {sum(o.lost for o in outcomes)} "
        f"lost, {sum(o.twice for o in outcomes)} acknowledged twice (bar: 0)."
    )


SECTIONS = [
    lesson.Section("Throughput", throughput),
    lesson.Section("Storm", kills),
]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        part(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        raise SystemExit(main())
