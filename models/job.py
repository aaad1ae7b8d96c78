"""One answer on its way through the engine, and what it hands out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.sampling import Sampler, Sampling
from models.text import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `top` are the likeliest: (id, text, bytes, logprob)."""

    id: int
    text: str
    bytes: bytes
    logprob: float
    top: tuple[tuple[int, str, bytes, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to an answer."""

    text: str
    tokens: tuple[Token, ...] = ()  # only where log-probabilities were asked for
    finish_reason: str | None = None  # stop, length, cancelled, deadline or error


class Job:
    """One answer on its way through the engine. Written by the engine's thread."""

    def __init__(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        sampler: Sampler,
        tokenizer: Tokenizer,
        tenant: str,
        deadline_s: float | None,
        notify: Callable[[list[Job]], None],
    ) -> None:
        self.ids = np.asarray(ids, np.int64)
        self.sampling, self.sampler, self.tenant = sampling, sampler, tenant
        self.detokenizer = Detokenizer(tokenizer, sampling.stop)
        self.notify = notify
        self.submitted = time.monotonic()
        self.deadline = self.submitted + deadline_s if deadline_s is not None else None
        self.pending: deque[Piece] = deque()
        self.cancelled = False
        self.finish_reason: str | None = None
        self.complete = False  # whether the last piece is in `pending`, or was taken
        self.error: str | None = None
        self.queued_s = self.first_token_s = self.total_s = 0.0  # since submitted
        self.cached = 0  # prompt tokens copied from another answer's
        self.filled = 0  # prompt tokens in the cache
        self.generated = 0
        self.last = 0  # the newest token, not in the cache yet

    @property
    def length(self) -> int:
        """Tokens in the cache while decoding: all but the newest."""
        return len(self.ids) + self.generated - 1
