"""One SQLite file shared by processes and threads: transactions, and clear errors.

Each transaction goes to a write-ahead log. kill -9 at any moment: it is there whole or
not at all. Power cut: a durable one (synchronous=FULL) waits for the disk and stays;
of the others (NORMAL) the newest may be undone, in order, and the file stays sound.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BUSY_S = 30.0  # a transaction waits that long for another process's

# A parent's connections are kept: closed in its child, they would disturb its locks.
_INHERITED: list[sqlite3.Connection | None] = []


@dataclass(frozen=True)
class Format:
    """What a file holds: the tables, and the marks by which it is recognised."""

    name: str  # "a queue", for errors
    application: int  # SQLite's application_id
    version: int
    schema: str
    error: type[Exception]  # what is raised of a file that cannot be used


class Database:
    """The file `path`, made if it is not there; its folder must exist.

    One connection, one transaction at a time. A forked child opens its own.
    """

    def __init__(self, path: Path, form: Format) -> None:
        self.path, self.form = path, form
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._process = os.getpid()
        with self._use():
            pass

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All or nothing, alone among all processes; `durable` waits for the disk."""
        with self._use() as db:
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with _all_or_nothing(db):
                yield db

    def look(self, query: str, values: tuple = ()) -> list[sqlite3.Row]:
        """What a query finds now; holds up no writer."""
        with self._use() as db:
            return db.execute(query, values).fetchall()

    def close(self) -> None:
        """Closes the file; the next call opens it again."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                if self._connection is None or self._process != os.getpid():
                    _INHERITED.append(self._connection)
                    self._connection = None  # an error in the next line leaves none
                    self._connection = _connect(self.path, self.form)
                    self._process = os.getpid()
                yield self._connection
            except sqlite3.Error as error:
                raise self.form.error(_explain(self.path, self.form, error)) from error


@contextmanager
def _all_or_nothing(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            with suppress(sqlite3.Error):  # the first error is the one to tell
                db.execute("ROLLBACK")
        raise


def _connect(path: Path, form: Format) -> sqlite3.Connection:
    db = sqlite3.connect(
        path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )
    try:
        db.row_factory = sqlite3.Row
        _prepare(db, path, form)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path, form: Format) -> None:
    """Makes the tables in a new file; refuses a file that is something else."""
    if _marks(db) != (form.application, form.version):
        with _all_or_nothing(db):  # of several that open it at once, one makes it
            marks = _marks(db)
            empty = not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
            if marks == (0, 0) and empty:
                for statement in filter(str.strip, form.schema.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {form.application}")
                db.execute(f"PRAGMA user_version = {form.version}")
            elif marks != (form.application, form.version):
                raise form.error(_foreign(path, form, *marks))
    _write_ahead(db)


def _write_ahead(db: sqlite3.Connection) -> None:
    """Lets readers and a writer go on at the same time; waits for who does the same.

    SQLite's own timeout does not hold here: a reader who wants the file for itself is
    refused at once while another one reads.
    """
    end = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > end:
                raise
            time.sleep(0.01)


def _marks(db: sqlite3.Connection) -> tuple[int, int]:
    names = "application_id", "user_version"
    application, version = (db.execute(f"PRAGMA {n}").fetchone()[0] for n in names)
    return application, version


def _foreign(path: Path, form: Format, application: int, version: int) -> str:
    if application == form.application:
        return (
            f"Expected {form.name} of format {form.version}, found format {version} in "
            f"{path}. Use the version of the course that wrote it, or another file."
        )
    return (
        f"Expected {form.name} or no file at {path}, found another program's database. "
        "It was left as it is: choose another path."
    )


def _explain(path: Path, form: Format, error: sqlite3.Error) -> str:
    """The error in terms of the file: what was expected, found, and what to do."""
    code = getattr(error, "sqlite_errorname", "")
    match code.split("_")[1:2]:
        case ["FULL" | "IOERR"]:
            expected = "room on the disk"
            do = "This call stored nothing, all before it is kept: make room, repeat."
        case ["BUSY"]:
            expected = f"the file to be free within {BUSY_S:g} s"
            do = "Another process holds it: see which one stands still."
        case ["NOTADB" | "CORRUPT"]:
            expected = f"{form.name}, whole"
            do = "It was left as it is: move it away, and a new one is made."
        case ["CANTOPEN" | "READONLY"]:
            expected = "a file that can be written in a folder that exists"
            do = "Make the folder, or choose another path."
        case _:
            expected, do = "SQLite to carry this out", "See the error beneath this one."
    return f"Expected {expected} ({path}), found: {error} ({code}). {do}"
