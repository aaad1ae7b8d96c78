"""Workers killed at random moments, hundreds of them: what became of the jobs.

    python -m tests.job_storm FOLDER SQLITE_FILE_OR_REDIS_URL JOBS KILLS LEASE_S

A process of its own, because workers are forked (a new interpreter each would take most
of the time) and only a process without threads may fork. Each worker notes its leases
and what was acknowledged, one line a write, so a kill leaves whole lines.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from local_cloud.scaling.jobs import LeaseLost, SQLiteJobs

ROOT = Path(__file__).parent.parent
WORKERS = 3
WORK_S = 0.004  # up to twice that a job
MAX_TRIES = 1000  # here kills are nobody's fault


@dataclass(frozen=True)
class Outcome:
    """What a storm left."""

    jobs: int
    kills: int
    deliveries: int
    lost: int  # neither done nor to be had any more
    twice: int  # acknowledged more than once
    refused: int  # acknowledgements that came too late
    latest_s: float  # longest from the end of a lease to the next one of that job
    seconds: float


def opened(place: str) -> Any:
    """The back end at a path or a Redis URL."""
    if place.startswith("redis://"):
        from local_cloud.scaling.redis_jobs import RedisJobs

        return RedisJobs(place, name="storm")
    return SQLiteJobs(place)


def worker(place: str, notes: Path, lease_s: float, seed: int) -> None:
    """Leases, works, acknowledges, notes, until it is killed."""
    jobs, chance = opened(place), random.Random(seed)
    file = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(what: str, id: str, token: int) -> None:
        os.write(file, f"{what} {id} {token} {time.monotonic()}\n".encode())

    while True:
        if (job := jobs.lease(f"worker-{seed % WORKERS}", lease_s)) is None:
            time.sleep(0.01)
            continue
        note("leased", job.id, job.token)
        time.sleep(chance.uniform(0, 2 * WORK_S))
        try:
            jobs.ack(job, job.payload)
        except LeaseLost:
            note("refused", job.id, job.token)
        else:
            note("done", job.id, job.token)


def forked(place: str, notes: Path, lease_s: float, seed: int) -> int:
    """A worker's process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        worker(place, notes, lease_s, seed)
    finally:
        os._exit(1)


def storm(folder: Path, place: str, count: int, kills: int, lease_s: float) -> Outcome:
    """Submits, lets workers work and kills them until both numbers are reached."""
    jobs, notes, chance = opened(place), folder / "notes", random.Random(0)
    ids = [jobs.submit(n, max_tries=MAX_TRIES) for n in range(count)]
    begun, killed = time.monotonic(), 0
    running = [forked(place, notes, lease_s, seed) for seed in range(WORKERS)]
    try:
        while killed < kills or jobs.counts()["done"] < len(ids):
            if time.monotonic() - begun > 300:
                break  # the outcome will say what is missing
            time.sleep(chance.uniform(0, 0.04))
            if killed == kills:
                continue
            if not jobs.counts()["waiting"]:  # work for the next kill to hit
                ids += [jobs.submit(n, max_tries=MAX_TRIES) for n in range(20)]
            victim = chance.randrange(WORKERS)
            os.kill(running[victim], signal.SIGKILL)
            os.waitpid(running[victim], 0)
            killed += 1
            running[victim] = forked(place, notes, lease_s, WORKERS * killed + victim)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    seconds = time.monotonic() - begun
    found = {id: jobs.get(id) for id in ids}
    lost = sum(status is None or status.state != "done" for status in found.values())
    return Outcome(len(ids), killed, *told(notes, lease_s, lost), seconds)


def told(notes: Path, lease_s: float, lost: int) -> tuple[int, int, int, int, float]:
    """Deliveries, lost, twice, refused and latest, from the workers' notes."""
    lines = [line.split() for line in notes.read_text().splitlines()]
    kinds = Counter(line[0] for line in lines)
    done = Counter(id for kind, id, *_ in lines if kind == "done")
    leased = {
        (id, int(token)): float(when) for kind, id, token, when in lines
        if kind == "leased"
    }  # fmt: skip
    late = [
        when - leased[id, token - 1] - lease_s
        for (id, token), when in leased.items()
        if (id, token - 1) in leased
    ]
    twice = sum(times > 1 for times in done.values())
    return kinds["leased"], lost, twice, kinds["refused"], max(late, default=0.0)


def run(folder: Path, place: str, count: int, kills: int, lease_s: float) -> Outcome:
    """The storm, in its own process."""
    argv = [sys.executable, "-m", "tests.job_storm", str(folder), place]
    argv += [str(count), str(kills), str(lease_s)]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=360)
    if ended.returncode:
        raise RuntimeError(f"Expected a storm, found: {ended.stderr}")
    return Outcome(**json.loads(ended.stdout))


if __name__ == "__main__":
    place = sys.argv[2]
    count, kills, lease_s = int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
    outcome = storm(Path(sys.argv[1]), place, count, kills, lease_s)
    print(json.dumps(asdict(outcome)))
