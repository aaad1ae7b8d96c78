"""One call, from the client's side: what a stream says, how it can fail, its log line.

A stream that was cut ends without an exception, like one that is complete; an error may
come in its middle, as one more chunk; its usage comes on a last chunk without choices.
`Reading` knows all that, for any client that gives the SDK's chunks.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import fireworks
import httpx

from local_cloud.fireworks.prices import PerToken


@dataclass(frozen=True)
class Call:
    """What is known of a call when it is over. One line of the log."""

    model: str
    outcome: str = "ok"  # or the name of the exception
    request_id: str = ""
    finish_reason: str | None = None
    latency_s: float = 0.0  # of the whole call, waits included
    waited_s: float = 0.0  # for 429 and 503
    refusals: int = 0  # of them
    first_token_s: float | None = None  # since this attempt was sent
    server_first_token_s: float | None = None  # the same, as the server measured it
    prompt_tokens: int | None = None  # None: a cut stream does not tell
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    dollars: float | None = None  # None: unknown, or paid by the second of a GPU

    @property
    def deployment(self) -> str:
        """The deployment's id, or "" if the model is shared."""
        return self.model.partition("/deployments/")[2]

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps({"deployment": self.deployment, **asdict(self)})


class CallFailed(Exception):
    """There is no whole answer, and nothing was asked twice. `call` is its log line."""

    call: Call


class IncompleteStream(CallFailed):
    """The stream ended without a finish_reason, or with an error in it."""


class Stalled(CallFailed):
    """Nothing came for longer than patience allows; it may have been generated."""


class NotServed(CallFailed):
    """Still refused when patience was at its end; nothing was generated."""

    @classmethod
    def after(cls, refusals: int, last: Exception | None) -> NotServed:
        """The end of so many refusals, of which this was the last."""
        made = cls(f"Expected an answer, found {refusals} refusals, at last: {last}")
        made.__cause__ = last
        return made


@dataclass(frozen=True)
class Answer:
    """A whole answer: text, or the tools that it asks to be called."""

    text: str
    tools: list[list[str]]  # name, arguments as JSON
    call: Call


class Reading:
    """One attempt while it is read: what the stream said so far."""

    def __init__(self) -> None:
        self.sent = time.monotonic()
        self.first_token_s: float | None = None
        self.text = self.request_id = ""
        self.tools: list[list[str]] = []  # name, arguments
        self.finish_reason: str | None = None
        self.usage: Any = None
        self.metrics: Mapping[str, Any] = {}
        self.problem: Exception | None = None  # what went wrong

    def take(self, chunk: Any, whole_s: float) -> None:
        """Take in one chunk of a stream that may last `whole_s` in all."""
        if problem := (chunk.model_extra or {}).get("error"):
            raise IncompleteStream(f"Expected a chunk, found an error: {problem}")
        if time.monotonic() - self.sent > whole_s:
            raise Stalled(f"Expected a whole answer in {whole_s:g} s, found a part.")
        self.usage = chunk.usage or self.usage  # on the last chunk, without choices
        self.metrics = chunk.perf_metrics or self.metrics
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            said, calls = choice.delta.content or "", choice.delta.tool_calls or ()
            if (said or calls) and self.first_token_s is None:
                self.first_token_s = time.monotonic() - self.sent
            self.text += said
            for part in calls:
                if part.id:  # a new call; what has no id goes on with the last one
                    self.tools.append([part.function.name, ""])
                self.tools[-1][1] += part.function.arguments or ""

    def check(self) -> None:
        """After the last chunk: only a finish_reason makes an answer of it."""
        if self.finish_reason is None:
            raise IncompleteStream(
                "Expected a finish_reason, found a stream that was cut after "
                f"{len(self.text)} characters. It may be billed; it is no answer."
            )

    def call(self, model: str, price: PerToken, **told: Any) -> Call:
        """What the log can say of it."""
        if used := self.usage:
            details = used.prompt_tokens_details
            tokens = {
                "prompt_tokens": used.prompt_tokens,
                "cached_tokens": (details.cached_tokens or 0) if details else 0,
                "completion_tokens": used.completion_tokens or 0,
            }
            told |= tokens
            if "/deployments/" not in model:
                told["dollars"] = price.dollars(*tokens.values())
        return Call(
            model=model,
            request_id=self.request_id,
            finish_reason=self.finish_reason,
            first_token_s=self.first_token_s,
            server_first_token_s=self.metrics.get("server-time-to-first-token"),
            **told,
        )


# What an attempt can end in that is no mistake of this program.
PROBLEMS = (CallFailed, fireworks.APIError, httpx.TransportError, json.JSONDecodeError)


def scaling_up(refusal: Any) -> bool:
    """Whether this 503 is a deployment that wakes up, and nothing was generated."""
    # An inference error is {"error": {...}}, and the SDK does not unwrap it.
    body = refusal.body if isinstance(refusal.body, dict) else {}
    inner = body.get("error")
    return isinstance(inner, dict) and inner.get("code") == "DEPLOYMENT_SCALING_UP"


def named(problem: Exception) -> Exception:
    """What happened to an attempt, under a name that a caller can act on."""
    if isinstance(problem, (CallFailed, fireworks.APIStatusError)):
        return problem
    if isinstance(problem, (fireworks.APITimeoutError, httpx.TimeoutException)):
        made: Exception = Stalled("Expected the next piece in time, found silence.")
    else:
        made = IncompleteStream(f"Expected a stream, found it broken: {problem}")
    made.__cause__ = problem
    return made


def log_call(call: Call) -> None:
    """Write the call's line to the log named "fireworks.calls"."""
    logging.getLogger("fireworks.calls").info(call.line())
