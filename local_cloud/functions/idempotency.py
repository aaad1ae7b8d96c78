"""Where Powertools keeps what was done already: a SQLite file instead of DynamoDB.

On AWS one line changes: `DynamoDBPersistenceLayer(table_name=...)`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from aws_lambda_powertools.utilities.idempotency.exceptions import (
    IdempotencyItemAlreadyExistsError,
    IdempotencyItemNotFoundError,
)
from aws_lambda_powertools.utilities.idempotency.persistence.base import (
    BasePersistenceLayer,
)
from aws_lambda_powertools.utilities.idempotency.persistence.datarecord import (
    DataRecord,
)

from local_cloud.functions.database import Database, Format


class IdempotencyError(Exception):
    """A file that cannot be used: expected, found, do."""


_FORMAT = Format(
    "a store of idempotency records",
    0x49444D50,
    1,
    """CREATE TABLE records (
        key TEXT PRIMARY KEY, status TEXT, expires INTEGER, in_progress_until INTEGER,
        response TEXT, payload_hash TEXT
    ) WITHOUT ROWID""",
    IdempotencyError,
)


class SQLitePersistenceLayer(BasePersistenceLayer):
    """Records of finished and begun work in one file, for any number of processes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.file = Database(Path(path), _FORMAT)

    def begun(self) -> set[tuple[str, int]]:
        """What is begun and not finished: its key, and until when it is reserved."""
        query = (
            "SELECT key, in_progress_until FROM records"
            " WHERE status = 'INPROGRESS' AND in_progress_until > ?"
        )
        rows = self.file.look(query, (1000 * time.time(),))
        return {(row["key"], row["in_progress_until"]) for row in rows}

    def _get_record(self, idempotency_key: str) -> DataRecord:
        rows = self.file.look("SELECT * FROM records WHERE key = ?", (idempotency_key,))
        if not rows:
            raise IdempotencyItemNotFoundError
        return DataRecord(*rows[0])

    def _put_record(self, data_record: DataRecord) -> None:
        """Begins; refused while another's is done, or begun and within its deadline."""
        now = time.time()
        with self.file.transaction(durable=True) as db:
            db.execute(
                "DELETE FROM records WHERE key = ? AND (expires < ? OR"
                " (status = 'INPROGRESS' AND in_progress_until < ?))",
                (data_record.idempotency_key, now, 1000 * now),
            )
            values = _values(data_record)
            insert = "INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?, ?, ?)"
            if not db.execute(insert, values).rowcount:
                raise IdempotencyItemAlreadyExistsError

    def _update_record(self, data_record: DataRecord) -> None:
        with self.file.transaction(durable=True) as db:
            replace = "REPLACE INTO records VALUES (?, ?, ?, ?, ?, ?)"
            db.execute(replace, _values(data_record))

    def _delete_record(self, data_record: DataRecord) -> None:
        with self.file.transaction(durable=True) as db:
            key = (data_record.idempotency_key,)
            db.execute("DELETE FROM records WHERE key = ?", key)


def _values(record: DataRecord) -> tuple:
    return (
        record.idempotency_key,
        record._status,
        record.expiry_timestamp,
        record.in_progress_expiry_timestamp,
        record.response_data,
        record.payload_hash,
    )
