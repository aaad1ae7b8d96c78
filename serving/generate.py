"""From the engine's streams to the wire: merged, written down, accounted for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from serving.answers import Gathered, usage
from serving.errors import ApiError, failed_answer
from serving.limits import Reservation
from serving.metrics import NEVER_S, Metrics
from serving.plan import Plan
from serving.service import Service
from serving.telemetry import CURRENT
from serving.wire import Wire

if TYPE_CHECKING:
    from models import AsyncStream, Piece

GOOD_ENDS = (None, "stop", "length")


async def generate(
    service: Service,
    plan: Plan,
    wire: Wire,
    reservation: Reservation,
    headers: dict[str, str],
) -> bool:
    """Do what is planned and send it; False if a stream broke after it had begun."""
    started = time.perf_counter()
    deadline_s = service.settings.request_timeout_s
    streams = plan.submit(service.served(), reservation.tenant, deadline_s)
    if trace := CURRENT.get():
        trace.generates(plan.writer.object_, plan.writer.model, streams)
    first = FirstTokens(service.metrics, streams)
    try:
        if plan.stream:
            await _send_stream(plan, streams, wire, headers, first)
        else:
            await _send_whole(plan, streams, wire, headers)
    except ApiError as error:
        first.failed = True
        if not wire.started:
            raise
        await wire.broken(error)  # the status line said 200 long ago
        return False
    finally:
        for stream in streams:
            stream.cancel()  # at its end nothing; before, a free row at the next step
        first.over()
        reservation.used = _spent(plan, streams)
    total_s = time.perf_counter() - started
    exemplar = trace.exemplar() if trace else None
    for stream in streams:
        service.metrics.generated(
            prompt=stream.prompt_tokens,
            completion=stream.completion_tokens,
            first_s=stream.first_token_s,
            total_s=total_s,
            exemplar=exemplar,
        )
    return True


class FirstTokens:
    """Counts when each answer's first token came, once, as soon as it is out.

    Who got none counts too. Were only good answers counted, a server that lets half of
    its callers wait in vain would seem to be quick.
    """

    def __init__(self, metrics: Metrics, streams: Sequence[AsyncStream]):
        self.metrics, self.waiting = metrics, dict(enumerate(streams))
        self.failed = False  # whoever still waits got an error

    def left(self, index: int) -> None:
        """A piece of this answer is on its way to the client."""
        if index in self.waiting:
            self._count(self.waiting.pop(index).first_token_s)

    def over(self) -> None:
        """Nothing more is to come."""
        for stream in self.waiting.values():
            self._count(0.0 if self.failed else stream.first_token_s)

    def _count(self, seconds: float) -> None:
        exemplar = trace.exemplar() if (trace := CURRENT.get()) else None
        self.metrics.first(seconds or NEVER_S, exemplar)


async def _send_stream(
    plan: Plan,
    streams: Sequence[AsyncStream],
    wire: Wire,
    headers: dict[str, str],
    first: FirstTokens,
) -> None:
    """Send pieces as they come; a slow reader gets fewer and longer ones."""
    running = len(streams)
    async with aclosing(merged(streams)) as pieces:
        async for index, piece in pieces:
            _check(piece)
            chunk = plan.writer.chunk(index, piece)
            running -= piece.finish_reason is not None
            if not running:
                chunk += plan.writer.ending(_usage(plan, streams))
            if chunk:
                await wire.piece(chunk, headers, last=not running)
            first.left(index)


async def _send_whole(
    plan: Plan, streams: Sequence[AsyncStream], wire: Wire, headers: dict[str, str]
) -> None:
    """Collect all answers, then send one body."""
    said = [Gathered() for _ in streams]
    async with aclosing(merged(streams)) as pieces:
        async for index, piece in pieces:
            _check(piece)
            said[index].add(piece)
    await wire.whole(plan.writer.whole(said, _usage(plan, streams)), headers)


async def merged(
    streams: Sequence[AsyncStream],
) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of many answers as they come, each with the number of its answer."""
    if len(streams) == 1:
        async for piece in streams[0]:
            yield 0, piece
        return
    # Small on purpose: while the client is slow, pieces merge in the engine's streams.
    pieces: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(len(streams))

    async def pump(index: int) -> None:
        try:
            async for piece in streams[index]:
                await pieces.put((index, piece))
        except Exception as error:
            await pieces.put((index, error))

    pumps = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    running = len(streams)
    try:
        while running:
            index, piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            running -= piece.finish_reason is not None
            yield index, piece
    finally:
        for task in pumps:
            task.cancel()


def _check(piece: Piece) -> None:
    if piece.finish_reason not in GOOD_ENDS:
        raise failed_answer(str(piece.finish_reason))


def _usage(plan: Plan, streams: Sequence[AsyncStream]) -> dict:
    """A prompt counts once, however many answers it got."""
    each = len(plan.samplings)
    return usage(
        sum(map(len, plan.prompts)),
        sum(stream.completion_tokens for stream in streams),
        sum(stream.cached_tokens for stream in streams[::each]),
    )


def _spent(plan: Plan, streams: Sequence[AsyncStream]) -> int:
    """What is charged: what left the queue was read, what was written was written."""
    each = len(plan.samplings)
    read = [s.prompt_tokens for s in streams[::each] if s.queued_s]
    return sum(read) + sum(stream.completion_tokens for stream in streams)
