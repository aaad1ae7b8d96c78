"""Runs the lesson's handler where an instance has many requests at once.

On Lambda a sandbox has one request at a time, so the handler's model is made for one
caller. Cloud Run and Azure send an instance as many as they are told to. There the
handler is the same, and two things take another's place: the engine, which lets all
callers grow their answers together, and a context, which those platforms lack.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import models
import serverless_deployment

ROWS = int(os.environ.get("ROWS", 8))  # requests that an instance gets at once
_opening = threading.Lock()


@dataclass(frozen=True)
class Context:
    """What the handler reads of Lambda's context: how much time is left."""

    aws_request_id: str
    timeout_s: float
    began: float = field(default_factory=time.monotonic)

    def get_remaining_time_in_millis(self) -> int:
        """Milliseconds until the platform gives up on this call, at least 0."""
        left_s = self.began + self.timeout_s - time.monotonic()
        return max(0, round(1000 * left_s))


class Shared:
    """The engine in the form of the model that the handler expects."""

    def __init__(self, model: models.Model) -> None:
        self.prompt, self.revision = model.prompt, model.revision
        self.close = model.close
        self._model = model

    def stream(
        self, ids: Sequence[int], sampling: models.Sampling
    ) -> Iterator[models.Piece]:
        # Dropped before its end, at the deadline, this cancels the answer.
        return iter(self._model.stream(ids, sampling))


def initialise() -> None:
    """Opens the engine, once a process, in place of the handler's own init phase."""
    with _opening:
        if not serverless_deployment.LOADED:
            serverless_deployment.LOADED.update(
                model=Shared(models.load(rows=ROWS)), random=random.Random()
            )


def answer(event: Any, request_id: str, timeout_s: float) -> dict[str, Any]:
    """Calls the handler as Lambda would; gives its result or {"error": ...}."""
    context = Context(request_id, timeout_s)
    initialise()
    return serverless_deployment.handler(event, context)
