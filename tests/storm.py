"""Producers and workers on one queue, killed at random moments and started again.

A producer notes what was acknowledged; killed before it could, it sends the same again.
A worker's side effect is one more in a total, made in one transaction with the key of
the message: done twice, the total would tell.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from local_cloud.functions.queue import Queue

ROOT = Path(__file__).parent.parent
BATCH = 10
VISIBILITY_S = 0.5
MAX_RECEIVES = 3


@dataclass(frozen=True)
class Outcome:
    """What a storm left, and how rough it was."""

    acknowledged: set[str]  # keys of messages that the queue took
    done: set[str]  # keys of side effects
    total: int  # side effects
    deliveries: int  # of messages to workers
    dead: set[str]  # keys of dead letters
    kills: int
    seconds: float

    @property
    def lost(self) -> set[str]:
        return self.acknowledged - self.done - self.dead


def queues(folder: Path) -> Queue:
    """The storm's queue, with its dead letters."""
    dead = Queue(folder / "dead")
    return Queue(
        folder / "queue",
        visibility_s=VISIBILITY_S,
        max_receives=MAX_RECEIVES,
        dead_letters=dead,
    )


def effects(folder: Path) -> sqlite3.Connection:
    """The file of side effects."""
    db = sqlite3.connect(folder / "effects", timeout=30, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    return db


def produce(folder: Path, name: str, count: int) -> None:
    """Sends `count` messages, going on where the one before was killed."""
    queue, notes = queues(folder), folder / f"acknowledged-{name}"
    begin(folder)
    sent = len(notes.read_text().splitlines()) if notes.exists() else 0
    with open(notes, "ab", buffering=0) as file:  # one write, whole or not at all
        while sent < count:
            bodies = [f"{name}-{n}" for n in range(sent, min(sent + BATCH, count))]
            queue.send_batch(bodies)
            file.write("".join(f"{body}\n" for body in bodies).encode())
            sent += len(bodies)


def work(folder: Path) -> None:
    """Receives, does, deletes, until the queue has been empty for a while."""
    queue, db = queues(folder), effects(folder)
    begin(folder)
    while True:
        messages = queue.receive(BATCH, wait_s=1)
        for message in messages:
            db.execute("BEGIN IMMEDIATE")
            insert = "INSERT OR IGNORE INTO done VALUES (?)"
            new = db.execute(insert, (message.body,)).rowcount
            db.execute(
                "UPDATE totals SET effects = effects + ?, deliveries = deliveries + 1",
                (new,),
            )
            db.execute("COMMIT")
        if messages:
            queue.delete_batch([message.receipt for message in messages])


def begin(folder: Path) -> None:
    """Notes that this process is at work: who is killed before does no work at all."""
    (folder / f"at-work-{os.getpid()}").touch()


def at_work(folder: Path, process: subprocess.Popen) -> bool:
    noted = (folder / f"at-work-{process.pid}").exists()
    return noted and process.poll() is None


def start(folder: Path, *role: str) -> subprocess.Popen:
    """A process in this role."""
    argv = [sys.executable, "-m", "tests.storm", str(folder), *role]
    return subprocess.Popen(argv, cwd=ROOT)


def storm(
    folder: Path,
    *,
    producers: int = 2,
    workers: int = 3,
    count: int = 1500,
    kill_every_s: float | None = 0.1,
    most_kills: int | None = None,
    deadline_s: float = 60.0,
    seed: int = 0,
) -> Outcome:
    """Runs producers and workers until all is sent and the queue is empty.

    `kill_every_s=None` kills nobody: the same work on a quiet day. After `most_kills`
    the rest is worked off in peace, however slow the machine is to start processes.
    """
    db = effects(folder)
    db.execute("CREATE TABLE IF NOT EXISTS done (key TEXT PRIMARY KEY) WITHOUT ROWID")
    db.execute(
        "CREATE TABLE IF NOT EXISTS totals (effects INTEGER, deliveries INTEGER)"
    )
    db.execute("INSERT INTO totals SELECT 0, 0 WHERE NOT EXISTS (SELECT * FROM totals)")
    roles = [("produce", f"p{n}", str(count)) for n in range(producers)]
    roles += [("work",)] * workers
    chance, kills, begun = random.Random(seed), 0, time.monotonic()
    running = [start(folder, *role) for role in roles]
    with queues(folder) as queue:
        assert queue.dead_letters is not None
        try:
            while not _over(running[:producers], queue):
                if time.monotonic() - begun > deadline_s:
                    raise TimeoutError(f"{queue.counts()} left after {deadline_s:g} s")
                time.sleep(chance.uniform(0, 2 * (kill_every_s or 0.05)))
                victim = chance.randrange(len(roles))
                rough = kill_every_s and (most_kills is None or kills < most_kills)
                if rough and at_work(folder, running[victim]):
                    running[victim].kill()
                    running[victim].wait()
                    running[victim] = start(folder, *roles[victim])
                    kills += 1
            seconds = time.monotonic() - begun
        finally:
            for process in running:
                process.kill()
                process.wait()
        with queue.dead_letters as letters:
            dead = _bodies(letters)
    outcome = _outcome(folder, db, dead, kills, seconds)
    db.close()
    return outcome


def _bodies(queue: Queue) -> set[str]:
    found: set[str] = set()
    while messages := queue.receive(BATCH):
        found |= {message.body for message in messages}
    return found


def _over(producers: list[subprocess.Popen], queue: Queue) -> bool:
    for producer in producers:
        code = producer.poll()
        if code not in (None, 0, -signal.SIGKILL):
            raise RuntimeError(f"A producer ended with {code}.")
    return all(p.poll() == 0 for p in producers) and not queue.counts().total


def _outcome(
    folder: Path, db: sqlite3.Connection, dead: set[str], kills: int, seconds: float
) -> Outcome:
    notes = [path.read_text().splitlines() for path in folder.glob("acknowledged-*")]
    total, deliveries = db.execute("SELECT * FROM totals").fetchone()
    return Outcome(
        acknowledged={key for lines in notes for key in lines},
        done={row[0] for row in db.execute("SELECT key FROM done")},
        total=total,
        deliveries=deliveries,
        dead=dead,
        kills=kills,
        seconds=seconds,
    )


if __name__ == "__main__":
    place, role = Path(sys.argv[1]), sys.argv[2]
    with contextlib.suppress(KeyboardInterrupt):
        if role == "produce":
            produce(place, sys.argv[3], int(sys.argv[4]))
        else:
            work(place)
