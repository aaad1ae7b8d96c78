"""Jobs that outlive whoever works on them: one face, and the embedded back end.

    with SQLiteJobs(path) as jobs:
        jobs.submit({"prompt": "Hi"}, key="order-17", deadline_s=60)
        if job := jobs.lease("worker-1", lease_s=30):
            jobs.ack(job, do(job.payload))

A job is leased, never taken away: who dies answers nothing, the lease ends, and the
next worker gets the job. So it may be worked on twice, and is acknowledged once: each
lease has a number, which only the newest holder knows (a fencing token). A job that
failed `max_tries` times is a dead letter and stays for a person to look at.

Each call is one transaction of `database`: after kill -9 it happened or it did not. A
submit waits for the disk and survives a power cut; the newest acknowledgements may be
undone by one, and their jobs are done again.

Whose clock: the queue's, never a worker's. Here it is the machine's monotonic clock,
set by the wall clock once after each boot, so a jump of the wall clock moves nothing.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from local_cloud.functions.database import Database, Format

MAX_PRIORITY = 9  # 0 is the usual, 9 goes first
MAX_LEASE_S = 43_200  # 12 hours; of a delay too
MAX_DEADLINE_S = 30 * 86_400
MAX_TRIES = 5  # unless told otherwise
MAX_BYTES = 1_048_576  # of a payload, and of a result
MAX_KEY_CHARS = 512
KEEP_S = 86_400.0  # results and keys of finished jobs
OPEN_JOBS = 10_000  # waiting or leased: beyond, submits are refused
RAN_OUT = "The lease ran out on the last try."
STATES = ("waiting", "leased", "done", "dead", "expired", "cancelled")


class JobsError(Exception):
    """What a queue refuses: expected, found, do."""


class BadJob(JobsError):
    """An argument that no queue takes."""


class KeyTaken(JobsError):
    """The key belongs to a job with another payload."""


class QueueFull(JobsError):
    """More unfinished jobs than the bound."""


class LeaseLost(JobsError):
    """The lease has ended or the job was cancelled: leave it alone."""


class JobsDown(JobsError):
    """The back end cannot be used now."""


@dataclass(frozen=True)
class Job:
    """A job as leased; `token` tells this lease from all others of the job."""

    id: str
    payload: Any
    token: int  # which try this is, from 1

    @property
    def tries(self) -> int:
        return self.token


@dataclass(frozen=True)
class Status:
    """What is known of a job."""

    id: str
    state: str  # one of STATES
    tries: int
    result: Any = None
    error: str | None = None


class Jobs(Protocol):
    """What every back end can do. All may raise JobsDown, or JobsError for good."""

    def submit(
        self,
        payload: Any,
        *,
        key: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        max_tries: int = MAX_TRIES,
    ) -> str:
        """Stores a job and gives its id; once it returns, the job is kept.

        The same `key` gives the same job. No try begins later than `deadline_s` from
        now: a job that then waits for one, be it the first or another, is expired.
        Raises BadJob, KeyTaken, QueueFull.
        """
        ...

    def lease(self, worker: str, lease_s: float) -> Job | None:
        """The next job, for `lease_s` this worker's; None if none is due.

        The highest priority first, then the oldest.
        """
        ...

    def ack(self, job: Job, result: Any = None) -> None:
        """Done. Again with the same lease is no error; too late is LeaseLost."""
        ...

    def nack(self, job: Job, delay_s: float = 0.0, error: str | None = None) -> None:
        """Failed: to be tried again after `delay_s`, or dead. Raises LeaseLost."""
        ...

    def extend(self, job: Job, lease_s: float) -> None:
        """The lease now ends in `lease_s` from now. Raises LeaseLost."""
        ...

    def cancel(self, id: str) -> bool:
        """Nobody will begin it; who works on it loses the lease. Dead ones too.

        False if there is none, or it has finished.
        """
        ...

    def get(self, id: str) -> Status | None:
        """What became of it; None if unknown, or finished longer than `keep_s` ago."""
        ...

    def dead(self, count: int = 100) -> list[Status]:
        """Up to `count` dead letters, in no order."""
        ...

    def counts(self) -> dict[str, int]:
        """Jobs by state. A lease that ended counts until the next worker comes."""
        ...


# What goes in


def encoded(value: Any, what: str) -> str:
    """JSON of a payload or result, all ASCII. Raises BadJob."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadJob(
            f"Expected a {what} that JSON can say, found: {error}. Turn it into "
            "numbers, texts, lists and objects."
        ) from error
    if len(text) > MAX_BYTES:
        raise BadJob(
            f"Expected a {what} of up to {MAX_BYTES:,} bytes, found {len(text):,}. "
            "Store it elsewhere and send where it is."
        )
    return text


def check(name: str, value: float, low: float, high: float) -> None:
    """Raises BadJob unless low <= value <= high."""
    if not low <= value <= high:  # what is not a number is never within
        raise BadJob(
            f"Expected {name} from {low:g} to {high:,}, found {value}. Choose within."
        )


def check_submission(
    key: str | None, priority: int, deadline_s: float | None, max_tries: int
) -> None:
    """Raises BadJob for what `submit` does not take."""
    if key is not None:
        check("a key's characters", len(key), 1, MAX_KEY_CHARS)
    check("priority", priority, 0, MAX_PRIORITY)
    check("max_tries", max_tries, 1, 1000)
    check("deadline_s", deadline_s or 0, 0, MAX_DEADLINE_S)
    for name, value in (("priority", priority), ("max_tries", max_tries)):
        if type(value) is not int:
            raise BadJob(f"Expected {name} to be an int, found {value!r}. Round it.")


def key_taken(key: str) -> KeyTaken:
    """The error of a key that comes again with something else."""
    return KeyTaken(
        f"Expected the payload that came with the key {key!r:.60} before, found "
        "another. Give another job another key."
    )


def queue_full(bound: int) -> QueueFull:
    """The error of a queue that takes no more."""
    return QueueFull(
        f"Expected fewer than {bound:,} unfinished jobs, found as many. Nothing was "
        "stored: come later, or add workers."
    )


def lease_lost(job: Job) -> LeaseLost:
    """The error of a worker that comes too late."""
    return LeaseLost(
        f"Expected lease {job.token} of job {job.id} to hold, found that it ended or "
        "the job was cancelled. Drop the work: it is no longer yours."
    )


# The back end in one file

_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    key TEXT UNIQUE,
    payload TEXT NOT NULL,
    priority INTEGER NOT NULL,
    max_tries INTEGER NOT NULL,
    deadline REAL NOT NULL,  -- infinity: none
    state TEXT NOT NULL DEFAULT 'waiting',
    due REAL NOT NULL,  -- handed out from then on: the end of a delay or of a lease
    tries INTEGER NOT NULL DEFAULT 0,  -- leases so far, and the token of the newest
    worker TEXT,
    result TEXT,
    error TEXT,
    forget_at REAL  -- NULL while open, infinity when dead
);
CREATE INDEX open ON jobs (priority DESC, number) WHERE forget_at IS NULL;
CREATE INDEX closed ON jobs (forget_at) WHERE forget_at IS NOT NULL;
CREATE TABLE boots (boot TEXT PRIMARY KEY, began REAL NOT NULL) WITHOUT ROWID;
"""
_INSERT = """
INSERT INTO jobs (id, key, payload, priority, max_tries, deadline, due)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""
_NEXT = """
SELECT number, id, payload, tries, max_tries, deadline FROM jobs INDEXED BY open
WHERE forget_at IS NULL AND due <= ? ORDER BY priority DESC, number LIMIT 1
"""
_LEASED = "id = :id AND tries = :token AND state = 'leased' AND due > :now"
_FORMAT = Format("a queue of jobs", 0x4A4F4253, 1, _SCHEMA, JobsDown)


class SQLiteJobs:
    """Jobs in the file `path`, made if it is not there; its folder must exist.

    Args:
        path: the file. Any number of processes and threads of one machine share it.
        bound: unfinished jobs beyond which `submit` raises QueueFull.
        keep_s: for so long a finished job can be asked for, and its key is taken.
        clock: gives the time in seconds; None for the one described above.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        bound: int = OPEN_JOBS,
        keep_s: float = KEEP_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.bound, self.keep_s = bound, keep_s
        self._file = Database(Path(path).absolute(), _FORMAT)
        self._now = clock or _since_boot(self._file)

    def submit(
        self,
        payload: Any,
        *,
        key: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        max_tries: int = MAX_TRIES,
    ) -> str:
        check_submission(key, priority, deadline_s, max_tries)
        text, id = encoded(payload, "payload"), secrets.token_hex(16)
        with self._file.transaction(durable=True) as db:
            now = self._now()  # here, because a transaction may have to wait
            deadline = math.inf if deadline_s is None else now + deadline_s
            db.execute("DELETE FROM jobs WHERE forget_at <= ?", (now,))
            query = "SELECT id, payload FROM jobs WHERE key = ?"
            if known := db.execute(query, (key,)).fetchone():
                if known["payload"] != text:
                    raise key_taken(key or "")
                return known["id"]
            query = "SELECT count(*) FROM jobs INDEXED BY open WHERE forget_at IS NULL"
            if db.execute(query).fetchone()[0] >= self.bound:
                raise queue_full(self.bound)
            db.execute(_INSERT, (id, key, text, priority, max_tries, deadline, now))
        return id

    def lease(self, worker: str, lease_s: float) -> Job | None:
        check("lease_s", lease_s, 0, MAX_LEASE_S)
        if not self._file.look(_NEXT, (self._now(),)):
            return None  # who looks in vain holds up nobody
        with self._file.transaction() as db:
            now = self._now()
            while row := db.execute(_NEXT, (now,)).fetchone():
                if row["deadline"] <= now:
                    self._close(db, row["number"], "expired", now + self.keep_s)
                elif row["tries"] >= row["max_tries"]:
                    self._close(db, row["number"], "dead", math.inf, RAN_OUT)
                else:
                    db.execute(
                        "UPDATE jobs SET state = 'leased', tries = tries + 1, due = ?,"
                        " worker = ? WHERE number = ?",
                        (now + lease_s, worker, row["number"]),
                    )
                    payload = json.loads(row["payload"])
                    return Job(row["id"], payload, row["tries"] + 1)
        return None

    def ack(self, job: Job, result: Any = None) -> None:
        # Once more with the same lease: its answer got lost, not the acknowledgement.
        again = "id = :id AND tries = :token AND state = 'done'"
        change = (
            "state = 'done', result = iif(state = 'done', result, :result),"
            " error = NULL, forget_at = :now + :keep_s"
        )
        text = encoded(result, "result")
        self._change(
            job, change, f"{_LEASED} OR {again}", result=text, keep_s=self.keep_s
        )

    def nack(self, job: Job, delay_s: float = 0.0, error: str | None = None) -> None:
        check("delay_s", delay_s, 0, MAX_LEASE_S)
        change = (
            "state = iif(tries < max_tries, 'waiting', 'dead'), error = :error,"
            " forget_at = iif(tries < max_tries, NULL, 9e999), due = :now + :delay_s"
        )
        self._change(job, change, _LEASED, error=error, delay_s=delay_s)

    def extend(self, job: Job, lease_s: float) -> None:
        check("lease_s", lease_s, 0, MAX_LEASE_S)
        self._change(job, "due = :now + :lease_s", _LEASED, lease_s=lease_s)

    def cancel(self, id: str) -> bool:
        query = "SELECT number FROM jobs WHERE id = ?"
        query += " AND (forget_at IS NULL OR state = 'dead')"
        with self._file.transaction(durable=True) as db:
            row = db.execute(query, (id,)).fetchone()
            if row:
                forget = self._now() + self.keep_s
                self._close(db, row["number"], "cancelled", forget)
        return row is not None

    def get(self, id: str) -> Status | None:
        rows = self._file.look("SELECT * FROM jobs WHERE id = ?", (id,))
        now = self._now()
        if not rows or (rows[0]["forget_at"] or math.inf) <= now:
            return None
        return _status(rows[0], now)

    def dead(self, count: int = 100) -> list[Status]:
        query = "SELECT * FROM jobs WHERE forget_at = 9e999 LIMIT ?"
        return [_status(row, self._now()) for row in self._file.look(query, (count,))]

    def counts(self) -> dict[str, int]:
        query = "SELECT state, count(*) FROM jobs"
        query += " WHERE coalesce(forget_at, 9e999) > ? GROUP BY state"
        return dict.fromkeys(STATES, 0) | dict(
            tuple(row) for row in self._file.look(query, (self._now(),))
        )

    def close(self) -> None:
        """Closes the file; the next call opens it again."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _change(self, job: Job, change: str, where: str, **values: Any) -> None:
        with self._file.transaction() as db:
            named = {"id": job.id, "token": job.token, "now": self._now(), **values}
            query = f"UPDATE jobs SET {change} WHERE {where}"
            if not db.execute(query, named).rowcount:
                raise lease_lost(job)

    @staticmethod
    def _close(
        db: sqlite3.Connection,
        number: int,
        state: str,
        forget_at: float,
        error: str | None = None,
    ) -> None:
        query = "UPDATE jobs SET state = ?, forget_at = ?, error = ? WHERE number = ?"
        db.execute(query, (state, forget_at, error, number))


def _status(row: sqlite3.Row, now: float) -> Status:
    late = row["state"] == "waiting" and row["deadline"] <= now  # though nobody came
    result = json.loads(row["result"]) if row["result"] else None
    state = "expired" if late else row["state"]
    return Status(row["id"], state, row["tries"], result, row["error"])


def _since_boot(file: Database) -> Callable[[], float]:
    """The monotonic clock of this boot, counted on from the wall clock at its start.

    All processes must agree on that start, so it is in the file. Where the system does
    not name its boots (outside Linux) it is the wall clock, jumps included.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return time.time
    with file.transaction() as db:
        began = time.time() - time.monotonic()
        db.execute("INSERT OR IGNORE INTO boots VALUES (?, ?)", (boot, began))
        query = "SELECT began FROM boots WHERE boot = ?"
        start: float = db.execute(query, (boot,)).fetchone()[0]
    return lambda: start + time.monotonic()
