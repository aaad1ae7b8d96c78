"""The REPORT line that ends every invocation: what it took and what it is billed.

The fields are separated by tabs, as Lambda writes them, so that tools which read
CloudWatch logs (aws-lambda-power-tuning, Logs Insights) read these too.

Of a restore Lambda bills what the runtime takes to load and the after-restore hooks to
run, not the copying of the snapshot. Here the copying is a fork of a millisecond or
two, and the whole restore is billed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """One REPORT line: `str(report)` writes it, `Report.parse(line)` reads it.

    `status` is "success" unless the runtime itself failed: "timeout" or "error", the
    latter with its type. An exception of the handler is a success of the runtime.
    """

    request_id: str
    duration_ms: float
    billed_ms: int
    memory_mb: int
    max_memory_mb: int
    init_ms: float | None = None
    restore_ms: float | None = None
    status: str = "success"
    error_type: str | None = None

    def __str__(self) -> str:
        fields = [
            f"REPORT RequestId: {self.request_id}",
            f"Duration: {self.duration_ms:.2f} ms",
            f"Billed Duration: {self.billed_ms} ms",
            f"Memory Size: {self.memory_mb} MB",
            f"Max Memory Used: {self.max_memory_mb} MB",
        ]
        if self.init_ms is not None:
            fields.append(f"Init Duration: {self.init_ms:.2f} ms")
        if self.restore_ms is not None:
            fields.append(f"Restore Duration: {self.restore_ms:.2f} ms")
            fields.append(f"Billed Restore Duration: {math.ceil(self.restore_ms)} ms")
        if self.status != "success":
            fields.append(f"Status: {self.status}")
        if self.error_type:
            fields.append(f"Error Type: {self.error_type}")
        return "\t".join(fields)

    @classmethod
    def parse(cls, line: str) -> Report:
        """The report in a line of a log.

        Raises:
            ValueError: the line is no REPORT line.
        """
        fields = dict(re.findall(r"(?:^|\t)([A-Z][A-Za-z ]*): ([^\s]+)", line))
        try:
            return cls(
                fields["REPORT RequestId"],
                float(fields["Duration"]),
                int(fields["Billed Duration"]),
                int(fields["Memory Size"]),
                int(fields["Max Memory Used"]),
                _milliseconds(fields.get("Init Duration")),
                _milliseconds(fields.get("Restore Duration")),
                fields.get("Status", "success"),
                fields.get("Error Type"),
            )
        except (KeyError, ValueError):
            raise ValueError(
                "Expected a line such as 'REPORT RequestId: ...<tab>Duration: 1.23 ms"
                f"<tab>...', found {line[:200]!r}. Take it from Result.log."
            ) from None


def _milliseconds(text: str | None) -> float | None:
    return None if text is None else float(text)
