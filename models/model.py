"""The model as its users see it: generate, stream and classify; sync and async."""

from __future__ import annotations

import asyncio
import math
import queue
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from models import build
from models.engine import Engine
from models.errors import ModelError, TooLate
from models.job import Job, Piece, Token
from models.runtime import Runtime, usable_cores
from models.sampling import Sampling
from models.text import Tokenizer

Prompt = str | Sequence[Mapping] | Sequence[int]
GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer and what it took."""

    text: str
    tokens: tuple[Token, ...]  # only where log-probabilities were asked for
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, copied from an earlier one
    queued_s: float
    first_token_s: float  # since the request
    total_s: float


class _Stream:
    """What both kinds of stream know of their answer."""

    _job: Job

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def cancel(self) -> None:
        """End the answer at the next step. Harmless when repeated or too late."""
        self._engine.cancel(self._job)

    @property
    def prompt_tokens(self) -> int:
        return len(self._job.ids)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were copied from an earlier prompt of the same tenant."""
        return self._job.cached

    @property
    def completion_tokens(self) -> int:
        return self._job.generated

    @property
    def finish_reason(self) -> str | None:
        return self._job.finish_reason

    @property
    def error(self) -> str | None:
        """What went wrong, where the finish reason is "error"."""
        return self._job.error

    @property
    def submitted(self) -> float:
        """When it was, by `time.monotonic()`."""
        return self._job.submitted

    @property
    def queued_s(self) -> float:
        return self._job.queued_s

    @property
    def first_token_s(self) -> float:
        """Seconds from the request to the first token; 0 before it."""
        return self._job.first_token_s

    @property
    def total_s(self) -> float:
        """Seconds from the request to the last token; 0 before it."""
        return self._job.total_s

    def _take(self) -> Piece | None:
        """Everything that has arrived, as one piece."""
        pending = self._job.pending
        if not pending:
            return None
        pieces = [pending.popleft() for _ in range(len(pending))]
        if len(pieces) == 1:
            return pieces[0]
        return Piece(
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.tokens),
            pieces[-1].finish_reason,
        )


class SyncStream(_Stream):
    """An iterator of pieces for ordinary code. Leaving it early cancels the answer."""

    def __init__(
        self,
        engine: Engine,
        ids: Sequence[int],
        sampling: Sampling,
        tenant: str,
        deadline_s: float | None,
    ) -> None:
        super().__init__(engine)
        self._ended = False
        self._arrived: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._job = engine.submit(
            ids,
            sampling,
            tenant=tenant,
            deadline_s=deadline_s,
            notify=lambda jobs: self._arrived.put(None),
        )

    def __iter__(self) -> Iterator[Piece]:
        try:
            while not self._ended:
                self._arrived.get()
                # Several arrivals may have been taken as one piece.
                if (piece := self._take()) is None:
                    continue
                self._ended = piece.finish_reason is not None
                yield piece
        finally:
            self.cancel()


class AsyncStream(_Stream, AsyncIterator[Piece]):
    """An async iterator of pieces; those that arrive together are merged."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    async def __anext__(self) -> Piece:
        if self._ended:
            raise StopAsyncIteration
        while (piece := self._take()) is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._ended = piece.finish_reason is not None
        return piece

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Loop:
    """Tells the streams of one event loop of their pieces: one call a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop, engine: Engine) -> None:
        self.loop = loop
        self.streams: dict[Job, AsyncStream] = {}
        self._engine = engine

    def notify(self, jobs: list[Job]) -> None:
        try:
            self.loop.call_soon_threadsafe(self._wake, jobs)
        except RuntimeError:  # the loop was closed: nobody reads these answers
            for job in jobs:
                self._engine.cancel(job)

    def _wake(self, jobs: list[Job]) -> None:
        for job in jobs:
            # Not its finish reason: that is known before the last piece can be read.
            stream = (self.streams.pop if job.complete else self.streams.get)(job, None)
            if stream is not None:
                stream._wake()


class Model:
    """A loaded model. Safe to use from many threads and event loops."""

    name = build.NAME

    def __init__(self, files: build.Files, device: str, engine: Engine) -> None:
        self.revision, self.precision, self.device = (
            files.revision,
            files.precision,
            device,
        )
        self.tokenizer = engine.tokenizer
        self.engine = engine
        self.rows, self.context = engine.rows, engine.context
        self.vocabulary = self.tokenizer.vocabulary
        self._loops: dict[int, _Loop] = {}

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, drain_s: float = 0.0) -> None:
        """Stop the engine; answers in progress get up to `drain_s` to finish."""
        self.engine.close(drain_s)

    def prompt(self, prompt: Prompt, tools: Sequence[Mapping] | None = None) -> list:
        """Token ids of a prompt: a user's words, a conversation, or ids as they are."""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if prompt and isinstance(prompt[0], int) and tools is None:
            return [int(id) for id in prompt]  # type: ignore[arg-type]
        return self.tokenizer.chat(prompt, tools)  # type: ignore[arg-type]

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling = GREEDY,
        *,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> SyncStream:
        """Generate piece by piece: iterate over the result."""
        ids = self.prompt(prompt)
        return SyncStream(self.engine, ids, sampling, tenant, deadline_s)

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling = GREEDY,
        *,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> Completion:
        """Generate a whole answer.

        Raises:
            ModelError: the answer ended in an error.
        """
        started = time.monotonic()
        stream = self.stream(prompt, sampling, tenant=tenant, deadline_s=deadline_s)
        pieces = list(stream)
        if stream.error is not None:
            raise ModelError(stream.error)
        return Completion(
            text="".join(piece.text for piece in pieces),
            tokens=tuple(token for piece in pieces for token in piece.tokens),
            finish_reason=stream.finish_reason or "",
            prompt_tokens=stream.prompt_tokens,
            completion_tokens=stream.completion_tokens,
            cached_tokens=stream.cached_tokens,
            queued_s=stream.queued_s,
            first_token_s=stream.first_token_s,
            total_s=time.monotonic() - started,
        )

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> AsyncStream:
        """Generate for asyncio. Call it in a running loop; it does not block."""
        loop = self._loop()
        stream = AsyncStream(self.engine)
        stream._job = self.engine.submit(
            ids, sampling, tenant=tenant, deadline_s=deadline_s, notify=loop.notify
        )
        # The engine may have told of it already, but this loop has not run since.
        loop.streams[stream._job] = stream
        return stream

    def _loop(self) -> _Loop:
        running = asyncio.get_running_loop()
        known = self._loops.get(id(running))
        if known is None or known.loop is not running:
            for id_, one in list(self._loops.items()):
                if one.loop.is_closed():
                    self._loops.pop(id_, None)
            known = self._loops[id(running)] = _Loop(running, self.engine)
        return known

    def classify(
        self, texts: str | Sequence[str], labels: Sequence[str], *, tenant: str = ""
    ) -> list[dict[str, float]]:
        """The probability of each label, for each text.

        A label's score is the log-likelihood of its tokens as the model's answer.
        """
        texts = [texts] if isinstance(texts, str) else texts
        streams = [
            SyncStream(self.engine, ids, sampling, tenant, None)
            for text in texts
            for ids, sampling in self.questions(text, labels)
        ]
        scores = [_score(list(stream)) for stream in streams]
        return _probabilities(scores, labels)

    async def classify_async(
        self,
        texts: str | Sequence[str],
        labels: Sequence[str],
        *,
        tenant: str = "",
        deadline_s: float | None = None,
    ) -> list[dict[str, float]]:
        """`classify` for asyncio; cancelling it cancels its work."""
        texts = [texts] if isinstance(texts, str) else texts
        streams: list[AsyncStream] = []
        try:
            for text in texts:
                for ids, sampling in self.questions(text, labels):
                    streams.append(
                        self.submit(ids, sampling, tenant=tenant, deadline_s=deadline_s)
                    )
                await asyncio.sleep(0)  # a long list must not hold up other streams
            scores = [_score([piece async for piece in stream]) for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()
        return _probabilities(scores, labels)

    def questions(
        self, text: str, labels: Sequence[str]
    ) -> list[tuple[list[int], Sampling]]:
        """What `classify` asks the engine: for each label, a prompt and an answer.

        The prompt is the same for all of them, so that it is computed once: the prefix
        cache has it from the second label on.
        """
        if len(set(labels)) < 2 or len(set(labels)) < len(labels):
            raise ValueError(
                f"labels: expected at least two different ones, found {list(labels)!r};"
                " name the classes"
            )
        # A form to complete, not a chat: asked in a chat, so small a model names the
        # first label whatever the text is.
        form = f"Labels: {', '.join(labels)}\n\nText: {text}\nLabel:"
        ids = self.tokenizer.encode(form)
        # The line's end too: "no" must not win because "not sure" begins alike.
        answers = [tuple(self.tokenizer.encode(f" {label}\n")) for label in labels]
        return [
            (ids, Sampling(max_tokens=len(answer), logprobs=0, forced=answer))
            for answer in answers
        ]


def _score(pieces: Sequence[Piece]) -> float:
    """The log-likelihood of a forced answer."""
    reason = pieces[-1].finish_reason
    if reason == "deadline":
        raise TooLate(
            "classify: expected every label to be scored in time, found the deadline "
            "passed; send fewer texts or labels, or allow more time"
        )
    if reason != "stop":
        raise ModelError(
            "classify: expected every label to be scored, found that scoring ended by "
            f"{reason!r}; try again"
        )
    return sum(token.logprob for piece in pieces for token in piece.tokens)


def _probabilities(
    scores: Sequence[float], labels: Sequence[str]
) -> list[dict[str, float]]:
    results = []
    for place in range(0, len(scores), len(labels)):
        row = scores[place : place + len(labels)]
        weights = [math.exp(score - max(row)) for score in row]
        results.append(
            {
                label: weight / sum(weights)
                for label, weight in zip(labels, weights, strict=True)
            }
        )
    return results


def load(
    device: str,
    rows: int,
    context: int,
    threads: int | None,
    shelf: int,
    precision: str | None,
) -> Model:
    """See `models.load`."""
    for name, value, least in (("rows", rows, 1), ("shelf", shelf, 0)):
        if value < least:
            raise ModelError(
                f"{name}: expected at least {least}, found {value}; raise it"
            )
    kind = _runtime_kind(device)
    files = build.ensure(precision or kind.precision)
    tokenizer = Tokenizer.load(files.tokenizer)
    runtime = kind(
        files.graph,
        rows=rows + shelf,
        context=context,
        threads=threads or usable_cores(),
    )
    return Model(files, device, Engine(runtime, tokenizer, shelf))


def prepare(device: str) -> str:
    """See `models.prepare`."""
    return build.ensure(_runtime_kind(device).precision).revision


def _runtime_kind(device: str) -> type[Runtime]:
    if device == "cpu":
        return Runtime
    if device == "cuda":
        from models.cuda import CudaRuntime, check

        check()
        return CudaRuntime
    raise ModelError(
        f'device: expected "cpu" or "cuda", found {device!r}; choose one of them'
    )
