"""OpenAI's dialect, the asking half: what a request may say, and nothing else.

An unknown field is an error that names it: a mistyped `max_token` that is silently
ignored costs its author an afternoon. Accepted without effect, because clients send
them and the answer stays the same: user, safety_identifier, prompt_cache_key, metadata,
store=false, service_tier, parallel_tool_calls, n/best_of/echo/suffix at their defaults.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

MAX_MESSAGES = 256
MAX_TOOLS = 64
MAX_LABELS = 32
MAX_MEMBERS = 1_000  # of one JSON object
MAX_DEPTH = 64  # of nested JSON; a JSON schema of a working day has less than ten
DEFAULT_MAX_TOKENS = 256

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Temperature = Annotated[float, Field(ge=0, le=2)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]


class Strict(BaseModel):
    """No unknown fields, no guessed types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# ## Reading JSON, once and strictly


class BadJson(json.JSONDecodeError):
    """A body that is no JSON object we accept; FastAPI reports it as `json_invalid`."""

    def __init__(self, message: str, pos: int = 0):
        super().__init__(message, "", pos)


def _no_constant(name: str) -> Any:
    raise BadJson(f"{name} is not JSON; send a finite number or null")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise BadJson(f"the number {text[:20]} does not fit 64-bit floating point")
    return number


def _integer(text: str) -> int:
    if len(text) > 20:
        raise BadJson(f"the integer {text[:20]}… does not fit 64 bits")
    return int(text)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_MEMBERS:
        raise BadJson(f"an object of {len(pairs)} fields; at most {MAX_MEMBERS}")
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise BadJson(f"field {twin[:80]!r} appears twice in one object; send it once")
    return members


_DECODER = json.JSONDecoder(
    parse_constant=_no_constant,
    parse_float=_finite,
    parse_int=_integer,
    object_pairs_hook=_no_twins,
)


def read_json(body: bytes) -> Any:
    """Parse one JSON text; BadJson says what is wrong with it."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadJson(f"byte {error.start} is not UTF-8", error.start) from None
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise BadJson(f"nested deeper than {MAX_DEPTH} levels") from None
    if isinstance(value, (dict, list)):
        _check_depth(value)
    if "\\u" in text:  # only an escape can smuggle in half a character
        _check_surrogates(value)
    return value


def _check_depth(value: Any) -> None:
    """Walk down level by level; whoever handles the value later may recurse safely."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for box in level
            for child in (box.values() if isinstance(box, dict) else box)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise BadJson(f"nested deeper than {MAX_DEPTH} levels")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadJson("a \\u escape holds half of a surrogate pair") from None


class StrictRequest(Request):
    """A request whose `json()` is strict."""

    async def json(self) -> Any:
        """Parse the body once."""
        if not hasattr(self, "_json"):
            self._json = read_json(await self.body())
        return self._json


# ## Messages and tools


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: Name
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One turn. Text only: this model has neither eyes nor ears."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Sent back by clients that append an answer's message as they received it.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("expected content (or tool_calls from the assistant)")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant makes tool_calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool message needs the tool_call_id it answers")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as the chat template takes it."""
        content = self.content or ""
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


class Function(Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)  # a JSON schema
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChosenFunction(Strict):
    name: Name


class ToolChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


class TextFormat(Strict):
    type: Literal["text"]


class JsonObject(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    model_config = ConfigDict(populate_by_name=True)

    name: Name
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class JsonSchema(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObject | JsonSchema, Field(discriminator="type")
]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


# ## Requests


class Generation(Strict):
    """What chat and plain completions share."""

    model: str = Field(min_length=1, max_length=200)
    max_tokens: int | None = Field(None, ge=1, description="Default: 256.")
    temperature: Temperature | None = Field(
        None, description="0 to 2. Default 0: greedy, the same answer every time."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=300
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Without effect here.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not (key.isascii() and key.isdigit() and len(key) <= 8):
                raise ValueError(f"expected token ids as keys, found {key[:20]!r}")
        return bias

    @model_validator(mode="after")
    def _options_fit_stream(self) -> Generation:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream=true; set it, or leave both")
        return self

    @property
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stops(self) -> tuple[str, ...]:
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop or ())


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None  # without effect: one call an answer
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        twins = (self.max_tokens, self.max_completion_tokens)
        if None not in twins and twins[0] != twins[1]:
            raise ValueError(
                "max_tokens and max_completion_tokens differ; send only the second"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools to choose from")
        if self.tools and self.response_format and self.response_format.type != "text":
            raise ValueError("tools and response_format exclude each other here")
        if isinstance(self.tool_choice, ToolChoice):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice names none of the tools {names}")
        return self

    @property
    def token_limit(self) -> int | None:
        """How many tokens an answer may have, if the caller said so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """Sampling.logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Generation):
    """`POST /v1/completions`; a list of prompts is a batch."""

    prompt: (
        str | Texts | Ids | Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
    )
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def token_limit(self) -> int | None:
        """How many tokens an answer may have, if the caller said so."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Sampling.logprobs."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, one or many, text or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return prompt


class ClassifyRequest(Strict):
    """`POST /v1/classify`: which label fits the text best?"""

    model: str = Field(min_length=1, max_length=200)
    input: str | Texts
    labels: list[Annotated[str, StringConstraints(min_length=1, max_length=100)]] = (
        Field(min_length=2, max_length=MAX_LABELS)
    )
    user: str | None = None

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: list[str]) -> list[str]:
        if len(set(labels)) < len(labels):
            raise ValueError("expected different labels, found the same one twice")
        return labels

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


# ## What validation found, in words


def explain(errors: list[Any]) -> tuple[str, str | None]:
    """Turn pydantic's findings into one (message, param): the most telling of them.

    Where a field may be one thing or another, pydantic complains for each: the deepest
    complaint that is not about a type is about the thing that was meant.
    """
    error = max(errors, key=lambda e: (not e["type"].endswith("_type"), len(e["loc"])))
    kind, context = error["type"], error.get("ctx") or {}
    param = (
        ".".join(str(part) for part in error["loc"][1:] if not _is_tag(part)) or None
    )
    if kind == "json_invalid":
        text = f"expected a JSON object in UTF-8, found an error: {context['error']}"
        return f"body: {text}.", None
    if kind == "missing" and param is None:
        return "body: expected a JSON object, found nothing.", None
    if kind == "missing":
        return f"{param}: this field is required. Add it.", param
    if kind == "extra_forbidden":
        return f"{param}: unknown field. Remove it or correct its name (/docs).", param
    if param is None and isinstance(error["input"], bytes):
        return "body: expected JSON with Content-Type: application/json.", None
    text = error["msg"].replace("Input should be", "expected")
    text = text.replace("a valid dictionary or instance of", "a JSON object, see")
    if kind == "value_error":
        return f"{param or 'body'}: {text.removeprefix('Value error, ')}.", param
    return f"{param or 'body'}: {text}, found {_short(error['input'])}.", param


def _is_tag(part: str | int) -> bool:
    """Tell a union's alternative, e.g. `list[str]`, from a field or an index."""
    return isinstance(part, str) and (
        "[" in part or part in ("str", "constrained-str") or part[:1].isupper()
    )


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):
        return "something else"
    return text if len(text) <= 60 else text[:57] + "…"
