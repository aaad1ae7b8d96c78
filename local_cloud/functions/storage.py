"""Where the pipeline's texts are and its summaries go: a folder and a SQLite file.

On AWS `deploy/functions/aws.py` has the same face over S3 and DynamoDB.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from local_cloud.functions.idempotency import SQLitePersistenceLayer

SUMMARIES = "summaries.sqlite"
SCHEMA = """CREATE TABLE IF NOT EXISTS summaries (
    bucket TEXT, key TEXT, version TEXT, text TEXT, PRIMARY KEY (bucket, key, version)
)"""


class Storage:
    """Buckets are folders below `data`; a summary is a row that can exist once."""

    def __init__(self, data: str | os.PathLike[str]) -> None:
        self.data = Path(data)
        self.done = SQLitePersistenceLayer(self.data / "done.sqlite")

    def read(self, bucket: str, key: str) -> str:
        """The text of an object."""
        return (self.data / bucket / key).read_text()

    def write(self, bucket: str, key: str, version: str, text: str) -> None:
        """Keep a summary. A second one of the same version changes nothing."""
        with closing(self._open()) as db, db:
            insert = "INSERT OR IGNORE INTO summaries VALUES (?, ?, ?, ?)"
            db.execute(insert, (bucket, key, version, text))

    def summaries(self) -> list[tuple[str, str]]:
        """Keys and their summaries, in order of the keys."""
        with closing(self._open()) as db:
            query = "SELECT key, text FROM summaries ORDER BY key, version"
            return db.execute(query).fetchall()

    def close(self) -> None:
        """Closes the file of what was done; the next call opens it again."""
        self.done.file.close()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.data / SUMMARIES, timeout=30)
        db.execute(SCHEMA)
        return db
