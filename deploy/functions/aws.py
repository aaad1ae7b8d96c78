"""Where the pipeline's texts are and its summaries go on AWS: S3 and DynamoDB.

The same face as `local_cloud/functions/storage.py`. Lambda's runtime brings boto3.
"""

from __future__ import annotations

import boto3
from aws_lambda_powertools.utilities.idempotency.persistence.dynamodb import (
    DynamoDBPersistenceLayer,
)

UPLOADS, SUMMARIES = "uploads/", "summaries/"


class Storage:
    """A summary is an object whose name follows from its text's: writing it again
    with the same text changes nothing."""

    def __init__(self, table: str) -> None:
        self.done = DynamoDBPersistenceLayer(table_name=table)
        self._s3 = boto3.client("s3")

    def read(self, bucket: str, key: str) -> str:
        """The text of an object."""
        found = self._s3.get_object(Bucket=bucket, Key=key)
        return found["Body"].read().decode()

    def write(self, bucket: str, key: str, version: str, text: str) -> None:
        """Keep a summary, with the version of the text that it is of."""
        self._s3.put_object(
            Bucket=bucket,
            Key=SUMMARIES + key.removeprefix(UPLOADS),
            Body=text.encode(),
            ContentType="text/plain; charset=utf-8",
            Metadata={"of-version": version},
        )
