"""A message queue in one SQLite file, with the semantics of a standard SQS queue.

At least once: a message received is hidden, not gone. Whoever received it deletes it
when the work is done; who dies first deletes nothing, and once the visibility timeout
is over the next receiver gets it. What is received too often goes to a second queue,
the dead letters. Any number of processes and threads may use one file.

What it survives. Each call is one transaction in a write-ahead log. kill -9 at any
moment: every call that returned holds, one that did not is there whole or not at all.
Power cut: `send` waits for the disk (synchronous=FULL), so what was acknowledged
stays. Receives and deletes do not wait (synchronous=NORMAL): the newest may be undone,
and then the message is delivered once more, which its receivers must bear anyway.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_cloud.functions.database import Database, Format

MAX_BATCH = 10  # messages a call
MAX_BYTES = 1_048_576  # of a message, and of all messages of one call together
MAX_ATTRIBUTES = 10
MAX_VISIBILITY_S = 43_200  # 12 hours
MAX_DELAY_S = 900
MAX_WAIT_S = 20
MAX_RETENTION_S = 1_209_600  # 14 days

# Free disk below which sends are refused, so that receivers can still work the queue
# off: a receive and a delete need room too, in the log and when it is copied back.
RESERVE_BYTES = 8 * 1024 * 1024
# A long poll looks again that often for what other processes sent: one look-up in an
# index. What this process sends wakes it at once.
LOOK_S = 0.02

# What XML 1.0 cannot hold, SQS refuses in a body.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_RECEIPT = re.compile(r"(\d+)\.([0-9a-f]{32})")
_SCHEMA = """
CREATE TABLE messages (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    body TEXT NOT NULL,
    attributes TEXT NOT NULL,
    sent_at REAL NOT NULL,
    visible_at REAL NOT NULL,
    receives INTEGER NOT NULL DEFAULT 0,
    first_received_at REAL,
    token TEXT  -- of the newest receipt, the only one that counts
);
CREATE INDEX by_visibility ON messages (visible_at);
CREATE INDEX by_age ON messages (sent_at);
"""
_RECEIVE = """
UPDATE messages
SET visible_at = :until, receives = receives + 1, token = lower(hex(randomblob(16))),
    first_received_at = coalesce(first_received_at, :now)
WHERE number IN (
    SELECT number FROM messages WHERE visible_at <= :now
    ORDER BY visible_at, number LIMIT :count
)
RETURNING *
"""
_INSERT = """
INSERT INTO messages
    (id, body, attributes, sent_at, visible_at, receives, first_received_at)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO NOTHING
"""


class QueueError(Exception):
    """A call the queue refuses, or a file it cannot use: expected, found, do."""


_FORMAT = Format("a queue", 0x51554555, 1, _SCHEMA, QueueError)


@dataclass(frozen=True)
class Message:
    """A message as received: `receipt` is what deletes it; times in epoch seconds."""

    id: str
    receipt: str
    body: str
    receive_count: int
    sent_at: float
    first_received_at: float
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """Messages by state: to be received now, received and not deleted, delayed."""

    ready: int
    in_flight: int
    delayed: int

    @property
    def total(self) -> int:
        return self.ready + self.in_flight + self.delayed


class Queue:
    """A queue in the file `path`, made if it is not there.

    Args:
        path: the file; its folder must exist. SQLite keeps two more beside it.
        visibility_s: how long a received message is hidden (0 to 43,200).
        max_receives: receives after which a message is a dead letter.
        dead_letters: the queue that gets those; without one they stay here.
        retention_s: age at which a message is dropped (60 to 1,209,600).
        clock: gives the time. Epoch seconds, because it is shared by processes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        visibility_s: float = 30.0,
        max_receives: int = 5,
        dead_letters: Queue | None = None,
        retention_s: float = 345_600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        _check("visibility_s", visibility_s, 0, MAX_VISIBILITY_S)
        _check("max_receives", max_receives, 1, 1000)
        _check("retention_s", retention_s, 60, MAX_RETENTION_S)
        self.path = Path(path).absolute()
        if dead_letters is not None and dead_letters.path == self.path:
            raise QueueError(
                f"Expected another file for the dead letters than {self.path}, found "
                "the same. Give them one of their own."
            )
        self.visibility_s, self.retention_s = visibility_s, retention_s
        self.max_receives, self.dead_letters = max_receives, dead_letters
        self._clock = clock
        self._arrived = threading.Condition()
        self._file = Database(self.path, _FORMAT)

    # Producers

    def send(
        self,
        body: str,
        *,
        delay_s: float = 0.0,
        attributes: Mapping[str, str] | None = None,
    ) -> str:
        """Stores a message and gives its id; once it returns, the message is kept."""
        return self.send_batch([body], delay_s=delay_s, attributes=attributes)[0]

    def send_batch(
        self,
        bodies: Sequence[str],
        *,
        delay_s: float = 0.0,
        attributes: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Stores 1 to 10 messages, all or none; gives their ids."""
        _check("delay_s", delay_s, 0, MAX_DELAY_S)
        _check_batch(bodies)
        size = _check_content(bodies, attributes or {})
        self._check_room(size)
        now = self._clock()
        extra = json.dumps(dict(attributes or {}))
        ids = [str(uuid.uuid4()) for _ in bodies]
        with self._file.transaction(durable=True) as db:
            pairs = zip(ids, bodies, strict=True)
            rows = [(i, b, extra, now, now + delay_s, 0, None) for i, b in pairs]
            db.executemany(_INSERT, rows)
        self._wake()
        return ids

    # Consumers

    def receive(
        self,
        max_messages: int = 1,
        visibility_s: float | None = None,
        wait_s: float = 0.0,
    ) -> list[Message]:
        """Up to 10 messages, hidden from others for `visibility_s`; [] if none came.

        `wait_s` (up to 20) waits for the first to come: a long poll.
        """
        _check("max_messages", max_messages, 1, MAX_BATCH)
        _check("wait_s", wait_s, 0, MAX_WAIT_S)
        hidden_s = self.visibility_s if visibility_s is None else visibility_s
        _check("visibility_s", hidden_s, 0, MAX_VISIBILITY_S)
        end = time.monotonic() + wait_s
        while True:
            if self._has_visible():
                found = self._take(max_messages, hidden_s)
                if found:
                    return found
            left = end - time.monotonic()
            if left <= 0:
                return []
            with self._arrived:
                self._arrived.wait(min(left, LOOK_S))

    def delete(self, receipt: str) -> None:
        """Deletes the message, if this is its newest receipt.

        An older receipt, or that of a message already gone, does nothing, as in SQS.
        Raises QueueError for what is no receipt at all.
        """
        self.delete_batch([receipt])

    def delete_batch(self, receipts: Sequence[str]) -> None:
        """Deletes the messages of 1 to 10 receipts, as `delete` does."""
        _check_batch(receipts)
        pairs = [_parse(receipt) for receipt in receipts]
        with self._file.transaction() as db:
            db.executemany("DELETE FROM messages WHERE number = ? AND token = ?", pairs)

    def change_visibility(self, receipt: str, seconds: float) -> None:
        """Hides a received message for so long from now; 0 gives it back at once.

        Raises QueueError if the message is gone or was received by another since.
        """
        _check("seconds", seconds, 0, MAX_VISIBILITY_S)
        number, token = _parse(receipt)
        with self._file.transaction() as db:
            changed = db.execute(
                "UPDATE messages SET visible_at = ? WHERE number = ? AND token = ?",
                (self._clock() + seconds, number, token),
            ).rowcount
        if not changed:
            raise QueueError(
                "Expected the newest receipt of a message in the queue, found that it "
                "was deleted or received again since. Leave it to its new receiver."
            )
        if seconds == 0:
            self._wake()

    # Operators

    def counts(self) -> Counts:
        """How many messages are in which state now."""
        now = self._clock()
        with self._file.transaction() as db:
            self._drop_expired(db, now)
            row = db.execute(
                "SELECT count(*) FILTER (WHERE visible_at <= :now),"
                " count(*) FILTER (WHERE visible_at > :now AND receives > 0),"
                " count(*) FILTER (WHERE visible_at > :now AND receives = 0)"
                " FROM messages",
                {"now": now},
            ).fetchone()
        return Counts(*row)

    def purge(self) -> None:
        """Deletes every message, also those in flight and delayed."""
        with self._file.transaction() as db:
            db.execute("DELETE FROM messages")

    def redrive(self) -> int:
        """Moves all ready dead letters back here as new messages; gives how many.

        As in SQS they get a new id and a new age, and count their receives anew.
        """
        source = self.dead_letters
        if source is None:
            raise QueueError(
                f"Expected a queue with dead letters, found that {self.path} has none. "
                "Open it with dead_letters=."
            )
        moved = 0
        while letters := source.receive(MAX_BATCH):
            now = self._clock()
            with self._file.transaction(durable=True) as db:
                # The new id follows from the old one: who is killed before the delete
                # below, and does it again, does not make two of one.
                rows = [
                    (
                        str(uuid.uuid5(uuid.UUID(letter.id), "redrive")),
                        letter.body,
                        json.dumps(dict(letter.attributes)),
                        *(now, now, 0, None),
                    )
                    for letter in letters
                ]
                db.executemany(_INSERT, rows)
            source.delete_batch([letter.receipt for letter in letters])
            moved += len(letters)
        self._wake()
        return moved

    def close(self) -> None:
        """Closes the file; the next call opens it again."""
        self._file.close()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Inside

    def _has_visible(self) -> bool:
        query = "SELECT 1 FROM messages WHERE visible_at <= ? LIMIT 1"
        return bool(self._file.look(query, (self._clock(),)))

    def _take(self, count: int, hidden_s: float) -> list[Message]:
        """Receives what is visible now, and moves what was received too often."""
        now, found = self._clock(), []
        until = now + max(hidden_s, 1e-6)  # once a call, also where nothing is hidden
        with self._file.transaction() as db:
            self._drop_expired(db, now)
            while len(found) < count:
                asked = {
                    "now": now,
                    "until": until,
                    "count": count - len(found),
                }
                rows = db.execute(_RECEIVE, asked).fetchall()
                dead = [row for row in rows if self._is_dead(row)]
                self._bury(db, dead, now)
                found += [_message(row) for row in rows if not self._is_dead(row)]
                if not dead:
                    break
        return sorted(found, key=lambda message: int(message.receipt.split(".")[0]))

    def _is_dead(self, row: sqlite3.Row) -> bool:
        return self.dead_letters is not None and row["receives"] > self.max_receives

    def _bury(
        self, db: sqlite3.Connection, dead: list[sqlite3.Row], now: float
    ) -> None:
        """Moves messages to the dead letters, id and age unchanged.

        There first, here afterwards: killed in between they are in both, and the next
        receive does it again; the same id is stored once. Pitfall: letters vanish
        before anyone looked, because their age counts on. Cure: a longer retention_s
        there than here.
        """
        if not dead or self.dead_letters is None:
            return
        with self.dead_letters._file.transaction(durable=True) as other:
            kept = ("id", "body", "attributes", "sent_at")
            rows = [
                (*(row[k] for k in kept), now, row["receives"] - 1, None)
                for row in dead
            ]
            other.executemany(_INSERT, rows)
        numbers = [(row["number"],) for row in dead]
        db.executemany("DELETE FROM messages WHERE number = ?", numbers)
        self.dead_letters._wake()

    def _drop_expired(self, db: sqlite3.Connection, now: float) -> None:
        db.execute("DELETE FROM messages WHERE sent_at <= ?", (now - self.retention_s,))

    def _check_room(self, size: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < size + RESERVE_BYTES:
            raise QueueError(
                f"Expected room on the disk for {size:,} bytes, and {RESERVE_BYTES:,} "
                f"to work with ({self.path}), found {free:,}. This call stored "
                "nothing, all before it is kept: make room, repeat."
            )

    def _wake(self) -> None:
        with self._arrived:
            self._arrived.notify_all()


# What goes in and comes out


def _message(row: sqlite3.Row) -> Message:
    return Message(
        id=row["id"],
        receipt=f"{row['number']}.{row['token']}",
        body=row["body"],
        receive_count=row["receives"],
        sent_at=row["sent_at"],
        first_received_at=row["first_received_at"],
        attributes=json.loads(row["attributes"]),
    )


def _parse(receipt: str) -> tuple[int, str]:
    found = _RECEIPT.fullmatch(receipt)
    if not found:
        raise QueueError(
            f"Expected the receipt of a received message, found {receipt!r:.60}. "
            "Give Message.receipt; an id does not delete."
        )
    return int(found[1]), found[2]


def _check(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise QueueError(
            f"Expected {name} from {low} to {high:,}, found {value}. Choose within."
        )


def _check_batch(entries: Sequence[Any]) -> None:
    if isinstance(entries, str) or not 1 <= len(entries) <= MAX_BATCH:
        found = "one text" if isinstance(entries, str) else f"{len(entries)} entries"
        raise QueueError(
            f"Expected a list of 1 to {MAX_BATCH} entries a call, found {found}. "
            "Divide them among several calls."
        )


def _check_content(bodies: Sequence[str], attributes: Mapping[str, str]) -> int:
    """Refuses what SQS would; gives the bytes of all bodies and attributes."""
    if len(attributes) > MAX_ATTRIBUTES:
        raise QueueError(
            f"Expected up to {MAX_ATTRIBUTES} attributes, found {len(attributes)}. "
            "Put the rest into the body."
        )
    extra = sum(len(f"{k}String{v}".encode()) for k, v in attributes.items())
    for body in bodies:
        if not isinstance(body, str) or not body or _FORBIDDEN.search(body):
            raise QueueError(
                "Expected a text of at least one character, all of them allowed in "
                f"XML 1.0, found {body!r:.60}. Encode bytes, in base64 for instance."
            )
    size = sum(len(body.encode()) + extra for body in bodies)
    if size > MAX_BYTES:
        raise QueueError(
            f"Expected up to {MAX_BYTES:,} bytes a call, attributes included, found "
            f"{size:,}. Store the content and send where it is."
        )
    return size
