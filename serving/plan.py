"""From a valid request to what the engine shall do: token ids, sampling, a writer."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from models.errors import ModelError, PromptTooLong
from models.sampling import Sampling
from serving.answers import (
    ChatWriter,
    TextWriter,
    ToolWriter,
    Writer,
    compact,
    usage,
)
from serving.errors import ApiError
from serving.limits import Reservation
from serving.protocol import (
    DEFAULT_MAX_TOKENS,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    JsonObject,
    JsonSchema,
    ToolChoice,
)
from serving.settings import Settings
from serving.wire import Wire

if TYPE_CHECKING:
    from models import AsyncStream, Model
    from models.grammar import Grammar

MOST_CHARS_PER_TOKEN = 16  # English has 4 to 5; beyond this the text cannot be meant
LONG_CHARS = 20_000  # reading this takes tens of ms: in a thread, not in the loop

T = TypeVar("T")


def unusable(message: str, param: str | None = None) -> ApiError:
    """A well-formed request that this model cannot serve."""
    return ApiError(400, message, "invalid_value", param=param)


@dataclass(frozen=True)
class Plan:
    """A request, understood: what the engine shall do, and who writes it down."""

    prompts: list[list[int]]  # token ids
    samplings: list[Sampling]  # one for each answer to each prompt
    writer: Writer
    stream: bool

    @property
    def most_tokens(self) -> int:
        """Tokens read and written at worst: what is reserved of a budget."""
        written = sum(sampling.max_tokens for sampling in self.samplings)
        return sum(map(len, self.prompts)) + written * len(self.prompts)

    def submit(self, model: Model, tenant: str, deadline_s: float) -> list[AsyncStream]:
        """Hand everything to the engine; answers stand in prompt order."""
        return [
            model.submit(ids, sampling, tenant=tenant, deadline_s=deadline_s)
            for ids in self.prompts
            for sampling in self.samplings
        ]


async def plan_chat(model: Model, body: ChatRequest, settings: Settings) -> Plan:
    """Understand a conversation."""
    check_answers(body.choices, settings.max_answers)
    messages = [message.plain() for message in body.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if body.tool_choice == "none":
        tools = []
    chars = len(json.dumps([messages, tools], ensure_ascii=False))
    _check_chars(model, chars)
    ids = await _checked(
        lambda: model.prompt(messages, tools or None), in_thread=chars > LONG_CHARS
    )
    grammar = await _grammar(model, body, tools)
    writer = _writer(ToolWriter if tools else ChatWriter, model, body)
    return Plan(
        [ids], _samplings(model, body, [ids], grammar), writer, bool(body.stream)
    )


async def plan_completion(
    model: Model, body: CompletionRequest, settings: Settings
) -> Plan:
    """Understand one prompt or a batch of them; text is continued as it stands."""
    check_answers(len(body.prompts) * body.choices, settings.max_answers)
    prompts = await read_prompts(model, body.prompts)
    writer = _writer(TextWriter, model, body)
    return Plan(
        prompts, _samplings(model, body, prompts, None), writer, bool(body.stream)
    )


def check_answers(answers: int, most: int) -> None:
    if answers > most:
        raise unusable(
            f"Expected at most {most} answers in one request (prompts times n, or "
            f"texts times labels), found {answers}. Split the batch."
        )


@dataclass(frozen=True)
class Classification:
    """Texts to label, and what reading them costs."""

    texts: list[str]
    labels: list[str]
    model: str
    most_tokens: int
    deadline_s: float

    async def run(
        self,
        model: Model,
        wire: Wire,
        reservation: Reservation,
        headers: dict[str, str],
    ) -> bool:
        """Score all texts and send the result."""
        reservation.used = self.most_tokens
        scores = await model.classify_async(
            self.texts,
            self.labels,
            tenant=reservation.tenant,
            deadline_s=self.deadline_s,
        )
        await wire.whole(self.write(scores), headers)
        return True

    def write(self, scores: list[dict[str, float]]) -> bytes:
        """The body of the answer."""
        results = [
            {"index": i, "label": max(told, key=told.__getitem__), "scores": told}
            for i, told in enumerate(scores)
        ]
        return compact(
            {
                "id": f"clf-{secrets.token_hex(12)}",
                "object": "classification",
                "created": int(time.time()),
                "model": self.model,
                "results": results,
                "usage": usage(self.most_tokens, 0, 0),
            }
        )


async def plan_classification(
    model: Model, body: ClassifyRequest, settings: Settings
) -> Classification:
    """Understand texts and labels: each text is read once, each label after it."""
    check_answers(len(body.texts) * len(body.labels), settings.max_answers)
    for text in body.texts:
        _check_chars(model, len(text))
    questions = await _checked(
        lambda: [model.questions(text, body.labels) for text in body.texts],
        in_thread=sum(map(len, body.texts)) > LONG_CHARS,
    )
    prompts = sum(len(asked[0][0]) for asked in questions)
    answers = [label.forced for asked in questions for _, label in asked]
    tokens = prompts + sum(map(len, answers))
    deadline_s = settings.request_timeout_s
    return Classification(body.texts, body.labels, model.name, tokens, deadline_s)


async def read_prompts(
    model: Model, prompts: list[str] | list[list[int]]
) -> list[list[int]]:
    """Token ids of each prompt; what cannot fit is refused before it is read."""
    for prompt in prompts:
        if isinstance(prompt, str):
            _check_chars(model, len(prompt))
    encode = model.tokenizer.encode
    ids = await _checked(
        lambda: [encode(p) if isinstance(p, str) else p for p in prompts],
        in_thread=sum(map(len, prompts)) > LONG_CHARS,
    )
    for prompt in ids:
        if not prompt:
            raise unusable("Expected at least one token, found none.", "prompt")
        _check_ids(model, max(prompt), "prompt")
    return ids


def _check_chars(model: Model, chars: int) -> None:
    if chars > model.context * MOST_CHARS_PER_TOKEN:
        raise PromptTooLong(
            f"Expected a prompt of at most {model.context} tokens, found {chars:,} "
            "characters, which are more. Shorten it."
        )


def _check_ids(model: Model, largest: int, param: str) -> None:
    if largest >= model.vocabulary:
        message = f"Expected token ids below {model.vocabulary}, found {largest}."
        raise unusable(message, param)


async def _checked(work: Callable[[], T], *, in_thread: bool) -> T:
    """Let the model read and check; what it refuses is the caller's to mend."""
    try:
        return await asyncio.to_thread(work) if in_thread else work()
    except ModelError:
        raise
    except ValueError as error:
        raise unusable(str(error)) from error


async def _grammar(
    model: Model, body: ChatRequest, tools: list[dict[str, Any]]
) -> Grammar | None:
    """The form the answer must have; compiling may take 0.2 s, hence in a thread."""
    form = body.response_format

    def compiled() -> Grammar | None:
        from models import grammar

        if tools:
            choice = body.tool_choice or "auto"
            named = choice.model_dump() if isinstance(choice, ToolChoice) else choice
            made = grammar.tool_call(tools, named)
        elif isinstance(form, JsonSchema):
            made = grammar.json_schema(form.json_schema.json_schema)
        elif isinstance(form, JsonObject):
            made = grammar.json_object()
        else:
            return None
        made.compile(model.tokenizer)
        return made

    needed = bool(tools) or isinstance(form, (JsonSchema, JsonObject))
    return await _checked(compiled, in_thread=True) if needed else None


def _samplings(
    model: Model,
    body: ChatRequest | CompletionRequest,
    prompts: list[list[int]],
    grammar: Grammar | None,
) -> list[Sampling]:
    """One for each of n answers; a seed makes each reproducible and all different."""
    longest = max(map(len, prompts))
    room = model.context - longest
    if room < 1 or (body.token_limit or 0) > room:
        wanted = f" and {body.token_limit} for the answer" if body.token_limit else ""
        raise PromptTooLong(
            f"Expected prompt and answer within {model.context} tokens, found "
            f"{longest} in the prompt{wanted}. Shorten it or lower max_tokens."
        )
    bias = {int(id): value for id, value in (body.logit_bias or {}).items()}
    _check_ids(model, max(bias, default=0), "logit_bias")
    return [
        Sampling(
            max_tokens=body.token_limit or min(DEFAULT_MAX_TOKENS, room),
            temperature=body.temperature or 0.0,
            top_p=body.top_p or 1.0,
            seed=None if body.seed is None else body.seed + choice,
            stop=body.stops,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=tuple(bias.items()),
            logprobs=body.top,
            grammar=grammar,
        )
        for choice in range(body.choices)
    ]


def _writer(
    kind: type[Writer], model: Model, body: ChatRequest | CompletionRequest
) -> Writer:
    return kind(
        model.name,
        model.revision,
        logprobs=body.top is not None,
        usage=body.include_usage,
    )
