"""A folder of objects that tells a queue of every object put into it, as S3 does."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from local_cloud.functions.database import Database, Format
from local_cloud.functions.queue import Queue

MAX_KEY_BYTES = 1024
MAX_NAME_BYTES = 255  # of a part between slashes: what file systems take


class BucketError(Exception):
    """A key or a folder that cannot be used: expected, found, do."""


_OUTBOX = Format(
    "a bucket's outbox",
    0x424B4554,
    1,
    """CREATE TABLE outbox (
        sequencer INTEGER PRIMARY KEY AUTOINCREMENT,
        key TEXT NOT NULL, staged TEXT NOT NULL, record TEXT NOT NULL
    )""",
    BucketError,
)


class Bucket:
    """A folder of objects; every `put` sends an `ObjectCreated:Put` event to `queue`.

    No event is lost, and none comes before its object. Data is first written aside;
    then one row in an outbox, a database in the same folder, says what is to be done:
    the row is the put. Then the data gets its name, the event is sent, and the row is
    deleted. Whoever is killed in between leaves the row, and the next `put`, or the
    next to open the bucket, does what it says. Killed between sending and deleting,
    the event is sent again: at least once, as S3 promises.
    """

    def __init__(self, folder: str | os.PathLike[str], queue: Queue) -> None:
        self.folder, self.queue = Path(folder).resolve(), queue
        self._aside = self.folder / ".bucket"
        self._aside.mkdir(parents=True, exist_ok=True)
        self._outbox = Database(self._aside / "outbox", _OUTBOX)
        self.publish()
        self._tidy()

    def put(self, key: str, data: bytes) -> None:
        """Stores an object, whole or not at all, and tells the queue.

        If the queue refuses, its error is raised, and putting again is safe: an object
        that was stored nevertheless has its event sent by the next `put` or `publish`.
        """
        self._path(key)  # refused before anything is written
        record = json.dumps(_object_created(self.folder.name, key, data))
        staged = self._aside / uuid.uuid4().hex
        _write(staged, data)
        _sync_folder(self._aside)
        with self._outbox.transaction(durable=True) as outbox:
            try:
                # First those before, so that the path is judged by what will be there.
                self._publish(outbox)
                self._path(key)
            except Exception:
                staged.unlink()
                raise
            outbox.execute(
                "INSERT INTO outbox (key, staged, record) VALUES (?, ?, ?)",
                (key, staged.name, record),
            )
        self.publish()

    def get(self, key: str) -> bytes:
        """An object's data; BucketError if there is none."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise BucketError(
                f"Expected the key of an object, found none under {key!r}. "
                "See keys() for those there are."
            ) from error

    def keys(self) -> list[str]:
        """The keys of all objects, sorted."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        named = (path.relative_to(self.folder).as_posix() for path in files)
        return sorted(key for key in named if not key.startswith(".bucket/"))

    def publish(self) -> None:
        """Does what the outbox says: for puts under way, and for those killed."""
        with self._outbox.transaction() as outbox:
            self._publish(outbox)

    def _publish(self, outbox: sqlite3.Connection) -> None:
        # The transaction is the lock: of several, each row is done by one.
        for row in outbox.execute("SELECT * FROM outbox ORDER BY sequencer").fetchall():
            staged = self._aside / row["staged"]
            if staged.exists():  # else it got its name before the kill
                target = self._path(row["key"])
                target.parent.mkdir(parents=True, exist_ok=True)
                staged.replace(target)
                _sync_folder(*target.parents[: row["key"].count("/") + 1])
            record = json.loads(row["record"])
            record["s3"]["object"]["sequencer"] = f"{row['sequencer']:018X}"
            self.queue.send(json.dumps({"Records": [record]}))
        outbox.execute("DELETE FROM outbox")

    def _tidy(self) -> None:
        """Removes what puts killed before their row have left; none lasts an hour."""
        named = {row["staged"] for row in self._outbox.look("SELECT * FROM outbox")}
        for path in self._aside.glob("?" * 32):
            with suppress(FileNotFoundError):
                old = time.time() - path.stat().st_mtime > 3600
                if old and path.name not in named:
                    path.unlink()

    def close(self) -> None:
        """Closes the outbox."""
        self._outbox.close()

    def __enter__(self) -> Bucket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        path = self.folder.joinpath(*parts)
        if (
            {"", ".", "..", ".bucket"} & set(parts)
            or "\\" in key
            or "\0" in key
            or len(key.encode()) > MAX_KEY_BYTES
            or max(len(part.encode()) for part in parts) > MAX_NAME_BYTES
            or not path.resolve().is_relative_to(self.folder)
            or path.is_dir()
            or any(parent.is_file() for parent in path.parents)
        ):
            raise BucketError(
                f"Expected a key of up to {MAX_KEY_BYTES} bytes that names a file in "
                f"{self.folder}, found {key!r:.80}. Give one such as 'inbox/a.txt'."
            )
        return path


def _write(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on the disk; a failed one is removed."""
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _sync_folder(*folders: Path) -> None:
    """Makes the names in these folders survive a power cut."""
    if os.name == "nt":  # there a folder cannot be opened
        return
    for folder in folders:
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _object_created(bucket: str, key: str, data: bytes) -> dict[str, Any]:
    """The record of S3's event notification, version 2.1, but for the sequencer."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    request = uuid.uuid4().hex[:16].upper()
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "awsRegion": "us-east-1",
        "eventTime": now.replace("+00:00", "Z"),
        "eventName": "ObjectCreated:Put",
        "userIdentity": {"principalId": "AWS:LOCAL"},
        "requestParameters": {"sourceIPAddress": "127.0.0.1"},
        "responseElements": {"x-amz-request-id": request, "x-amz-id-2": request},
        "s3": {
            "s3SchemaVersion": "1.0",
            "configurationId": "local",
            "bucket": {
                "name": bucket,
                "ownerIdentity": {"principalId": "LOCAL"},
                "arn": f"arn:aws:s3:::{bucket}",
            },
            "object": {
                "key": quote_plus(key, safe="/"),  # unquote_plus gives the key
                "size": len(data),
                "eTag": hashlib.md5(data, usedforsecurity=False).hexdigest(),
            },
        },
    }
