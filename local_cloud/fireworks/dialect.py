"""The dialect of the inference routes: what a request may say, how an answer is told.

A request that asks for what the shared model cannot do (several answers, images,
another sampler) is refused, not half obeyed. Answers are made as the fields of the
SDK's own types; `wire` checks them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from local_cloud.fireworks import schema
from local_cloud.fireworks.wire import INVALID_ARGUMENT, Refusal
from models import Model, Piece, Sampling, Token
from models.grammar import parse_tool_calls
from models.text import TOOL_CALL

MAX_TOKENS = 2048  # of an answer, if the request does not say


class StreamOptions(BaseModel):
    """How a stream is told. Usage comes unless it is declined."""

    include_usage: bool = True


class Body(BaseModel):
    """What both routes take."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    context_length_exceeded_behavior: Literal["truncate", "error"] = "truncate"
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, float] | None = None
    logprobs: bool | int | None = Field(None, ge=0, le=5)
    top_logprobs: int | None = Field(None, ge=0, le=5)
    n: Literal[1] | None = None
    response_format: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    perf_metrics_in_response: bool | None = None
    # Who is asking, and with whom a prompt's beginning may be shared.
    user: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_isolation_key: str | None = None
    # Taken, and without effect here.
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None

    @property
    def told_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is None or self.stream_options.include_usage

    @property
    def top(self) -> int | None:
        """Sampling.logprobs: `true` takes top_logprobs, a number is the number."""
        if self.logprobs is None or self.logprobs is False:
            return None
        return (self.top_logprobs or 0) if self.logprobs is True else self.logprobs


class ChatBody(Body):
    """`POST /chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None

    @property
    def callable(self) -> list[dict[str, Any]]:
        """The tools that this answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []


class TextBody(Body):
    """`POST /completions`: one prompt, as text or as token ids."""

    prompt: str | list[int]


def read(kind: type[Body], raw: Any) -> Body:
    """The request, checked.

    Raises:
        Refusal: it says what is unknown, malformed or not supported.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "body"
        advice = {
            "extra_forbidden": "unknown or not supported here; remove it",
            "missing": "this field is required; add it",
        }.get(first["type"])
        found = f"{first['msg']}, found {str(first['input'])[:80]!r}; correct it"
        raise Refusal(INVALID_ARGUMENT, f"{path}: {advice or found}.") from None


def prompt_ids(model: Model, body: Body) -> list[int]:
    """The prompt as token ids, tools included."""
    if isinstance(body, ChatBody):
        return model.prompt(body.messages, body.callable or None)
    assert isinstance(body, TextBody)
    if isinstance(body.prompt, str):
        return model.tokenizer.encode(body.prompt)
    return body.prompt


def sampling(model: Model, body: Body, prompt_tokens: int) -> Sampling:
    """How the answer is drawn, its form compiled.

    Raises:
        Refusal: prompt and answer do not fit the context.
        GrammarError, ValueError: the form or a number is wrong.
    """
    wanted = body.max_completion_tokens or body.max_tokens or MAX_TOKENS
    room = model.context - prompt_tokens
    too_long = wanted > room and body.context_length_exceeded_behavior == "error"
    if room < 1 or too_long:
        raise Refusal(
            INVALID_ARGUMENT,
            f"Expected prompt and answer within {model.context} tokens, found "
            f"{prompt_tokens} in the prompt and {wanted} for the answer. Shorten it.",
        )
    made = schema.response_format(body.response_format)
    if isinstance(body, ChatBody) and body.callable:
        made = schema.tool_call(body.callable, body.tool_choice or "auto")
    if made is not None:
        made.compile(model.tokenizer)
    return Sampling(
        max_tokens=min(wanted, room),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        seed=body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple((body.logit_bias or {}).items()),
        logprobs=body.top,
        grammar=made,
    )


@dataclass
class Answer:
    """One answer while it grows, and how it is told: whole, or chunk by chunk.

    With tools, text that may become a call is held back until it is one or cannot be.
    """

    body: Body
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: int = field(default_factory=lambda: int(time.time()))
    text: str = ""
    finish_reason: str | None = None
    _tokens: list[Token] = field(default_factory=list)
    _told: int = 0  # characters of `text` already streamed
    _told_tokens: int = 0
    _offset: int = 0  # characters of all tokens told

    def add(self, piece: Piece) -> None:
        """Take in what one step brought."""
        self.text += piece.text
        self._tokens += [token for token in piece.tokens if token.bytes]
        self.finish_reason = piece.finish_reason or self.finish_reason

    def whole(self, used: dict[str, Any], perf: dict[str, Any]) -> dict[str, Any]:
        """The fields of CompletionCreateResponse."""
        choice: dict[str, Any] = {"index": 0, **self._logprobs()}
        if isinstance(self.body, ChatBody):
            calls = self._calls()
            choice["message"] = {"role": "assistant"}
            choice["message"] |= (
                {"content": None, "tool_calls": calls}
                if calls
                else {"content": self.text}
            )
        else:
            choice["text"] = self.text
        choice["finish_reason"] = self._reason()
        return self._head("", [choice], used, perf)

    def chunk(self, perf: dict[str, Any]) -> dict[str, Any] | None:
        """The fields of the next chunk; None while there is nothing to tell."""
        ended = self.finish_reason is not None
        calls = self._calls() if ended else []
        if self._may_be_call() and not ended:
            return None
        text = "" if calls else self.text[self._told :]
        if not (text or calls or ended):
            return None
        choice: dict[str, Any] = {"index": 0, **self._logprobs()}
        if isinstance(self.body, ChatBody):
            choice["delta"] = {} if self._told else {"role": "assistant"}
            choice["delta"] |= {"content": text} if text else {}
            choice["delta"] |= {"tool_calls": calls} if calls else {}
        else:
            choice["text"] = text
        choice["finish_reason"] = self._reason() if ended else None
        self._told = len(self.text)
        return self._head(".chunk", [choice], None, perf if ended else {})

    def last(self, used: dict[str, Any]) -> dict[str, Any]:
        """The fields of the chunk that tells the usage."""
        return self._head(".chunk", [], used, {})

    def _head(
        self,
        suffix: str,
        choices: list[dict[str, Any]],
        used: dict[str, Any] | None,
        perf: dict[str, Any],
    ) -> dict[str, Any]:
        chat = isinstance(self.body, ChatBody)
        head: dict[str, Any] = {
            "id": self.id,
            "object": f"chat.completion{suffix}" if chat else "text_completion",
            "created": self.created,
            "model": self.body.model,
            "choices": choices,
        }
        if used is not None:
            head["usage"] = used
        if perf and self.body.perf_metrics_in_response:
            head["perf_metrics"] = perf
        return head

    def _reason(self) -> str | None:
        return "tool_calls" if self._calls() else self.finish_reason

    def _may_be_call(self) -> bool:
        if not (isinstance(self.body, ChatBody) and self.body.callable):
            return False
        return self.text.startswith(TOOL_CALL) or TOOL_CALL.startswith(self.text)

    def _calls(self) -> list[dict[str, Any]]:
        """The complete calls in the text. One that was cut is none: it stays text."""
        if not self._may_be_call():
            return []
        return [
            {
                "id": f"call_{self.id[:16]}{place}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for place, (name, arguments) in enumerate(parse_tool_calls(self.text))
        ]

    def _logprobs(self) -> dict[str, Any]:
        """Of the tokens not told yet, in the format that was asked for."""
        if self.body.top is None:
            return {}
        fresh = self._tokens[self._told_tokens :]
        offsets = []
        for token in fresh:
            offsets.append(self._offset)
            self._offset += len(token.text)
        self._told_tokens = len(self._tokens)
        if self.body.logprobs is True:
            told = zip(fresh, offsets, strict=True)
            return {"logprobs": {"content": [_token(*one) for one in told]}}
        return {"logprobs": _legacy(fresh, offsets)}


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """The fields of UsageInfo."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _token(token: Token, offset: int) -> dict[str, Any]:
    top = [
        {"token": text, "logprob": logprob, "token_id": id, "bytes": list(data)}
        for id, text, data, logprob in token.top
    ]
    return {
        "token": token.text,
        "bytes": list(token.bytes),
        "logprob": token.logprob,
        "text_offset": offset,
        "token_id": token.id,
        "top_logprobs": top,
    }


def _legacy(tokens: Sequence[Token], offsets: list[int]) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_ids": [token.id for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "text_offset": offsets,
        "top_logprobs": [
            {text: logprob for _, text, _, logprob in token.top} for token in tokens
        ],
    }
