"""Asking: an attempt at a time, waits in between, an answer or an error at the end.

How long to be patient, and after what to ask again, is decided by who uses `Asking`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from local_cloud.fireworks.calls import (
    PROBLEMS,
    Answer,
    Call,
    CallFailed,
    NotServed,
    Reading,
    log_call,
    named,
)
from local_cloud.fireworks.prices import UP_TO_4B, PerToken


@dataclass
class Asking:
    """Asks by a client of the SDK; a subclass has `patience` and decides `wait_s`."""

    client: Any  # Fireworks, or AsyncFireworks for `ask_async`
    price: PerToken = UP_TO_4B
    log: Callable[[Call], Any] = log_call
    sleep: Callable[[float], Any] = time.sleep  # asyncio.sleep for `ask_async`

    patience: Any = field(init=False)  # idle_s, whole_s, wake_s, limit_s

    def wait_s(self, problem: Any, refusals: int) -> float | None:
        """Seconds until asking again; None: do not."""
        raise NotImplementedError

    def ask(self, model: str, messages: Sequence[Any], **options: Any) -> Answer:
        """One answer; `options` as in `chat.completions.create`.

        Raises:
            IncompleteStream, Stalled: it was asked once, and is not whole.
            NotServed: it was refused for as long as patience allows.
            fireworks.APIStatusError: any other refusal, as the SDK tells it.
        """
        waits, request = self._begin(model, messages, options)
        while True:
            reading = attempt(self.client, self.patience.whole_s, request)
            if (pause_s := waits.after(reading.problem)) is None:
                return settle(model, reading, waits, self.price, self.log)
            self.sleep(pause_s)

    async def ask_async(
        self, model: str, messages: Sequence[Any], **options: Any
    ) -> Answer:
        """`ask`, for a client and a sleep of asyncio: many calls at a time."""
        waits, request = self._begin(model, messages, options)
        while True:
            reading = await attempt_async(self.client, self.patience.whole_s, request)
            if (pause_s := waits.after(reading.problem)) is None:
                return settle(model, reading, waits, self.price, self.log)
            await self.sleep(pause_s)

    def _begin(
        self, model: str, messages: Sequence[Any], options: Mapping[str, Any]
    ) -> tuple[Waits, dict[str, Any]]:
        idle = httpx.Timeout(self.patience.idle_s, connect=5.0)
        request = {"model": model, "messages": messages, "timeout": idle, **options}
        left_s = {429: self.patience.limit_s, 503: self.patience.wake_s}
        return Waits(self.wait_s, left_s), request


def attempt(client: Any, whole_s: float, request: Mapping[str, Any]) -> Reading:
    """Send a request, once, and read it to the end; `problem` is what went wrong."""
    reading = Reading()
    try:
        with _once(client, request) as stream:
            reading.request_id = _request_id(stream.response)
            for chunk in stream:
                reading.take(chunk, whole_s)
        reading.check()
    except PROBLEMS as problem:
        reading.problem = named(problem)
    return reading


async def attempt_async(
    client: Any, whole_s: float, request: Mapping[str, Any]
) -> Reading:
    """`attempt`, for an AsyncFireworks."""
    reading = Reading()
    try:
        async with await _once(client, request) as stream:
            reading.request_id = _request_id(stream.response)
            async for chunk in stream:
                reading.take(chunk, whole_s)
        reading.check()
    except PROBLEMS as problem:
        reading.problem = named(problem)
    return reading


def _once(client: Any, request: Mapping[str, Any]) -> Any:
    # Not the SDK's two retries: each of them would generate, and cost, again.
    return client.with_options(max_retries=0).chat.completions.create(
        stream=True, perf_metrics_in_response=True, **request
    )


def _request_id(response: Any) -> str:
    return response.headers.get("x-request-id", "")


class Waits:
    """The waits of one call: for each status of refusal a deadline of its own.

    Args:
        wait_s: seconds to wait after a problem and so many refusals, or None.
        left_s: how long to wait in all, for each status.
    """

    def __init__(
        self,
        wait_s: Callable[[Any, int], float | None],
        left_s: Mapping[int, float],
    ) -> None:
        self.start = time.monotonic()
        self._wait_s, self._left_s = wait_s, dict(left_s)
        self.waited_s, self.refusals, self.over = 0.0, 0, False

    def after(self, problem: Exception | None) -> float | None:
        """Seconds to wait before asking again; None: do not."""
        wait_s = self._wait_s(problem, self.refusals)
        if wait_s is None:
            return None
        status = getattr(problem, "status_code", 0)
        self.refusals += 1
        self._left_s[status] -= wait_s
        self.over = self._left_s[status] < 0
        if self.over:
            return None
        self.waited_s += wait_s
        return wait_s


def settle(
    model: str,
    reading: Reading,
    waits: Waits,
    price: PerToken,
    log: Callable[[Call], Any],
) -> Answer:
    """The call is over, well or not: log it, then answer or raise."""
    problem = reading.problem
    if response := getattr(problem, "response", None):
        reading.request_id = _request_id(response)
    if waits.over:
        problem = NotServed.after(waits.refusals, problem)
    call = reading.call(
        model,
        price,
        outcome=type(problem).__name__ if problem else "ok",
        latency_s=time.monotonic() - waits.start,
        waited_s=waits.waited_s,
        refusals=waits.refusals,
    )
    log(call)
    if isinstance(problem, CallFailed):
        problem.call = call
    if problem:
        raise problem
    return Answer(reading.text, reading.tools, call)
