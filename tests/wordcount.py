"""A Lambda function that counts the words of each document put into a bucket.

Batches and idempotency are Powertools'; the counts are in the file COUNTS. A document
of "poison" raises. One of "before" or "after" ends its process by SIGKILL, the first
time: before its count is committed, or after it and before Powertools noted that.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from typing import Any
from urllib.parse import unquote_plus

from aws_lambda_powertools.utilities.batch import (
    BatchProcessor,
    EventType,
    process_partial_response,
)
from aws_lambda_powertools.utilities.data_classes.sqs_event import SQSRecord
from aws_lambda_powertools.utilities.idempotency import (
    IdempotencyConfig,
    idempotent_function,
)

from local_cloud.functions.idempotency import SQLitePersistenceLayer

BUCKET, COUNTS = os.environ["BUCKET"], os.environ["COUNTS"]
done = SQLitePersistenceLayer(COUNTS + "-idempotency")
config = IdempotencyConfig(raise_on_no_idempotency_key=True)
processor = BatchProcessor(
    event_type=EventType.SQS, raise_on_entire_batch_failure=False
)


@idempotent_function(
    data_keyword_argument="document", persistence_store=done, config=config
)
def count(*, document: dict[str, str]) -> int:
    """Counts one version of a document; a second call gives the first one's answer."""
    with open(os.path.join(BUCKET, document["key"])) as file:
        words = file.read().split()
    if "poison" in words:
        raise ValueError(f"{document['key']} cannot be counted")
    db = sqlite3.connect(COUNTS, timeout=30)
    with db:
        # Powertools spares the work that is known to be done. That it is counted once
        # whatever happens is this key's doing, in one transaction with the effect.
        insert = "INSERT OR IGNORE INTO counted VALUES (?, ?)"
        new = db.execute(insert, (document["key"], document["sequencer"])).rowcount
        add = "UPDATE total SET documents = documents + ?, words = words + ?"
        db.execute(add, (new, new * len(words)))
        die_once("before", words)
    db.close()
    die_once("after", words)
    return len(words)


def die_once(moment: str, words: list[str]) -> None:
    """Ends this process, if the document says so and it was not done before."""
    if moment in words and not os.path.exists(f"{COUNTS}-{moment}"):
        open(f"{COUNTS}-{moment}", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)


def each(record: SQSRecord) -> int:
    """One message: an event of one object."""
    (put,) = json.loads(record.body)["Records"]
    thing = put["s3"]["object"]
    key = unquote_plus(thing["key"])
    return count(document={"key": key, "sequencer": thing["sequencer"]})


def handler(event: dict[str, Any], context: Any) -> Any:
    """The batch; its answer names the messages that failed."""
    config.register_lambda_context(context)
    return process_partial_response(event, each, processor, context)
