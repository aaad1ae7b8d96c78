"""OpenAI's dialect, the telling half: whole answers, chunks of a stream, errors.

A chunk of a stream is one formatted string around one JSON-escaped text: a few
microseconds, where a model and its serialiser would take a hundred. The pydantic models
at the end describe the answers for `/openapi.json`; no answer runs through them.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quoted  # C, and always valid JSON
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from models import Model, Piece, Token
    from models.engine import Snapshot

DONE = b"data: [DONE]\n\n"
MODEL_CREATED = 1_730_419_200  # Unix time of the model's release, 2024-11-01
NEVER = -9999.0  # OpenAI's stand-in for log(0), which JSON cannot say


def error_body(
    message: str,
    kind: str,
    *,
    param: str | None = None,
    code: str | None = None,
    request_id: str | None = None,
) -> bytes:
    """The one shape of every error."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    if request_id:
        error["request_id"] = request_id
    return compact({"error": error})


def error_event(body: bytes) -> bytes:
    """An error in mid-stream. No [DONE] follows, so nobody takes it for an end."""
    return b"data: " + body + b"\n\n"


def compact(value: Any) -> bytes:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":")).encode()


@dataclass(slots=True)
class Gathered:
    """What one choice has said so far."""

    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.tokens.extend(spoken(piece.tokens))
        self.finish_reason = piece.finish_reason


def spoken(tokens: Iterable[Token]) -> list[Token]:
    """Without control tokens, like the one that ends an answer: they have no text."""
    return [token for token in tokens if token.bytes]


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict:
    """What the caller pays for."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def model_list(model: Model) -> dict:
    """The one model there is."""
    card = {
        "id": model.name,
        "object": "model",
        "created": MODEL_CREATED,
        "owned_by": "HuggingFaceTB",
        "context": model.context,
    }
    return {"object": "list", "data": [card]}


def ready(state: str, now: Snapshot | None) -> dict:
    """Whether to send requests here, and how busy it is."""
    return {
        "status": state,
        "rows": now.rows if now else 0,
        "active": now.active if now else 0,
        "queued": now.queued if now else 0,
        "tokens_per_second": round(now.decode_tokens_per_s, 1)
        if now and now.active
        else 0.0,
    }


class Writer:
    """Writes one answer in one dialect; subclasses know chat and plain text."""

    prefix = object_ = chunk_object = ""

    def __init__(self, model: str, revision: str, *, logprobs: bool, usage: bool):
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model, self.revision = model, revision
        self.logprobs, self.with_usage = logprobs, usage
        head = compact(self._head(self.chunk_object)).decode()[:-1]
        self._open = f'data: {head},"choices":[{{"index":'
        self._close = '}],"usage":null}\n\n' if usage else "}]}\n\n"

    def _head(self, object_: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.revision,
        }

    def whole(self, choices: Sequence[Gathered], used: dict) -> bytes:
        """The body of an answer that is not streamed."""
        written = [self._choice(i, choice) for i, choice in enumerate(choices)]
        return compact({**self._head(self.object_), "choices": written, "usage": used})

    def ending(self, used: dict) -> bytes:
        """What follows the last piece of a stream."""
        if not self.with_usage:
            return DONE
        last = {**self._head(self.chunk_object), "choices": [], "usage": used}
        return b"data: " + compact(last) + b"\n\n" + DONE

    def _choice(self, index: int, said: Gathered) -> dict[str, Any]:
        raise NotImplementedError

    def chunk(self, index: int, piece: Piece) -> bytes:
        """One event of a stream."""
        raise NotImplementedError


class TextWriter(Writer):
    """`text_completion`."""

    prefix, object_, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._offsets: dict[int, int] = {}

    def _choice(self, index: int, said: Gathered) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(said.text),
            "logprobs": self._logprobs(0, said.tokens) if self.logprobs else None,
            "finish_reason": said.finish_reason,
        }

    def chunk(self, index: int, piece: Piece) -> bytes:
        logprobs = "null"
        if self.logprobs:
            offset = self._offsets.get(index, 0)
            tokens = spoken(piece.tokens)
            logprobs = json.dumps(self._logprobs(offset, tokens))
            self._offsets[index] = offset + sum(len(t.text) for t in tokens)
        finish = _or_null(piece.finish_reason)
        return (
            f'{self._open}{index},"text":{quoted(piece.text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish}{self._close}'
        ).encode()

    @staticmethod
    def _logprobs(offset: int, tokens: Iterable[Token]) -> dict[str, list]:
        told: dict[str, list] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in tokens:
            told["tokens"].append(token.text)
            told["token_logprobs"].append(max(token.logprob, NEVER))
            told["top_logprobs"].append(
                {text: max(logprob, NEVER) for _, text, _, logprob in token.top}
            )
            told["text_offset"].append(offset)
            offset += len(token.text)
        return told


class ChatWriter(Writer):
    """`chat.completion`."""

    prefix, object_, chunk_object = (
        "chatcmpl",
        "chat.completion",
        "chat.completion.chunk",
    )

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._opened: set[int] = set()  # choices whose role was told

    def _choice(self, index: int, said: Gathered) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(said.text), "refusal": None}
        logprobs = _chat_logprobs(said.tokens) if self.logprobs else None
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": said.finish_reason,
        }

    def chunk(self, index: int, piece: Piece) -> bytes:
        delta = f'"content":{quoted(piece.text)}'
        return self._event(index, delta, spoken(piece.tokens), piece.finish_reason)

    def _event(
        self, index: int, delta: str, tokens: Sequence[Token], finish: str | None
    ) -> bytes:
        role = ""
        if index not in self._opened:
            self._opened.add(index)
            role = '"role":"assistant",'
        logprobs = "null"
        if self.logprobs and tokens:
            logprobs = json.dumps(_chat_logprobs(tokens))
        return (
            f'{self._open}{index},"delta":{{{role}{delta}}},"logprobs":{logprobs},'
            f'"finish_reason":{_or_null(finish)}{self._close}'
        ).encode()


class ToolWriter(ChatWriter):
    """A chat in which the model may call a function.

    A call is told whole, once it is complete. While a text may still become a call, it
    waits; after that it flows like any other.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        from models.grammar import parse_tool_calls
        from models.text import TOOL_CALL

        self._parse, self._mark = parse_tool_calls, TOOL_CALL
        self._waiting: dict[int, Gathered] = {}
        self._flowing: set[int] = set()

    def _choice(self, index: int, said: Gathered) -> dict[str, Any]:
        choice = super()._choice(index, said)
        if calls := self._calls("".join(said.text)):
            choice["message"].update(content=None, tool_calls=calls)
            choice["finish_reason"] = "tool_calls"
        return choice

    def chunk(self, index: int, piece: Piece) -> bytes:
        if index in self._flowing:
            return super().chunk(index, piece)
        said = self._waiting.setdefault(index, Gathered())
        said.add(piece)
        text = "".join(said.text)
        may_call = text.startswith(self._mark) or self._mark.startswith(text)
        if may_call and not piece.finish_reason:
            return b""
        self._flowing.add(index)
        delta, finish = f'"content":{quoted(text)}', piece.finish_reason
        if calls := self._calls(text):
            told = [{"index": i, **call} for i, call in enumerate(calls)]
            delta, finish = f'"tool_calls":{json.dumps(told)}', "tool_calls"
        return self._event(index, delta, said.tokens, finish)

    def _calls(self, text: str) -> list[dict[str, Any]]:
        return [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for name, arguments in self._parse(text)
        ]


def _or_null(word: str | None) -> str:
    return f'"{word}"' if word else "null"


def _chat_logprobs(tokens: Iterable[Token]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_told(token.text, token.bytes, token.logprob),
                "top_logprobs": [
                    _told(text, raw, logprob) for _, text, raw, logprob in token.top
                ],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _told(text: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, NEVER), "bytes": list(raw)}


# ## What the answers look like, for /openapi.json


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str | None = None


class ErrorEnvelope(BaseModel):
    """The one shape of every error."""

    error: ErrorDetail


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Completed(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str


class CalledFunction(BaseModel):
    name: str
    arguments: str


class Called(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[Called] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Completed):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Completed):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class Classified(BaseModel):
    index: int
    label: str
    scores: dict[str, float] = Field(description="Probability of each label; sum 1.")


class Classification(BaseModel):
    id: str
    object: Literal["classification"]
    created: int
    model: str
    results: list[Classified]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: str
    message: str | None = None


class Ready(BaseModel):
    status: Literal["ready", "loading", "draining", "failed"]
    rows: int
    active: int
    queued: int
    tokens_per_second: float
