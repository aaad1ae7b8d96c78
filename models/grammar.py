"""Answers with a guaranteed form: JSON schemas, regular expressions, tool calls.

Before each token, the grammar says which tokens may follow; the others get a logit of
minus infinity. `llguidance` does this by running an Earley parser over a lexer of
derivatives, so a grammar costs little until it is built to cost much. Grammars come
from strangers, so everything they can make large is bounded: the source here, the work
of one mask by `LIMITS`. What is refused is refused while compiling, in the caller's
thread, before the engine hears of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from models.errors import GrammarError
from models.text import TOOL_CALL, TOOL_CALL_END, Tokenizer, functions

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SOURCE = 64 * 1024  # bytes of a schema, or of all tools
# Characters of a Lark grammar, or of all expressions: one \p{L} is 700 ranges.
MAX_PATTERN = 8 * 1024
MAX_DEPTH = 64  # braces and brackets inside each other: 32 objects in objects
MAX_VALUES = 10_000  # values of all kinds in a schema
MAX_PROPERTIES = 400  # in one object: compiling takes time with their square
MAX_REFERENCES = 256  # "$ref"s in a schema
MAX_TOOLS = 128
# Steps of the trial that a grammar must pass before the engine sees it.
TRIAL_TOKENS = 8

# llguidance's fuel makes its bounds the same on every machine, unlike a clock. With its
# defaults, one mask of (a{1000}){1000} takes 0.5 s; with these, 0.02 s.
LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,
    step_lexer_fuel=200_000,
    step_max_items=5_000,
    max_items_in_row=2_000,
    max_lexer_states=20_000,  # about 2 kB each
    max_grammar_size=10_000,
    verbose_errors=False,
)
# No whitespace of the model's choosing: small models repeat it without end. The one
# space after each comma and colon is how JSON looks in the text they were trained on.
JSON_STYLE: JsonCompileOptions = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form an answer must have. Made by the functions below."""

    kind: str  # "json_schema", "regex" or "lark"
    source: str

    def compile(self, tokenizer: Tokenizer) -> CompiledGrammar:
        """Compile and try out, at most 0.2 s; remembered for the next time.

        The first call for a tokenizer takes another 0.2 s for its vocabulary.
        """
        return _compile(self, tokenizer)

    def _text(self) -> str:
        if self.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(self.source, overrides=JSON_STYLE)
        if self.kind == "regex":
            return LLMatcher.grammar_from_regex(self.source)
        return LLMatcher.grammar_from_lark(self.source)


def json_schema(schema: dict) -> Grammar:
    """JSON that the schema allows: on one line, properties in the schema's order."""
    if not isinstance(schema, Mapping):
        raise GrammarError(
            f"schema: expected a JSON schema (an object), found {short(schema)}; "
            'write it like {"type": "object", "properties": {...}}'
        )
    _check_values(schema, where="schema")
    return _checked(Grammar("json_schema", _dumped(schema, "schema")))


def json_object() -> Grammar:
    """Any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> Grammar:
    """Text that the expression matches from end to end (Rust syntax, no lookaround)."""
    _at_most(len(pattern), MAX_PATTERN, "regex", "characters")
    return _checked(Grammar("regex", pattern))


def lark(grammar: str) -> Grammar:
    """Text of a context-free grammar in llguidance's dialect of Lark."""
    _at_most(len(grammar), MAX_PATTERN, "lark", "characters")
    return _checked(Grammar("lark", grammar))


def tool_call(tools: Sequence[Mapping], choice: str | Mapping = "auto") -> Grammar:
    """A call of one of `tools` (OpenAI's form), or with "auto" text without a call.

    `choice` is "auto", "required" or `{"function": {"name": ...}}`. The call reads
    `<tool_call>{"name": "...", "arguments": {...}}</tool_call>`, where the arguments
    follow the tool's own schema.
    """
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise GrammarError(
            f"tools: expected 1 to {MAX_TOOLS}, found {len(tools)}; change the list"
        )
    chosen = _chosen(functions(tools), choice)
    calls = [f"call_{place}" for place in range(len(chosen))]
    lines = [f"start: {'TEXT | ' if choice == 'auto' else ''}{' | '.join(calls)}"]
    if choice == "auto":
        lines.append(f"TEXT: /(?s:.*)/ & ~/(?s:.*){TOOL_CALL}(?s:.*)/")
    _check_values(*(function["parameters"] for function in chosen), where="tools")
    for call, function in zip(calls, chosen, strict=True):
        # Each schema stays a document of its own: its "#/$defs/..." point into itself.
        schema = {**function["parameters"], "x-guidance": JSON_STYLE}
        head = TOOL_CALL + '{"name": "' + function["name"] + '", "arguments": '
        lines.append(f'{call}: {json.dumps(head)} {call}_json "}}{TOOL_CALL_END}"')
        lines.append(f"{call}_json: %json {_dumped(schema, 'tools')}")
    return _checked(Grammar("lark", "\n".join(lines) + "\n"))


def _chosen(known: list[dict], choice: str | Mapping) -> list[dict]:
    if choice in ("auto", "required"):
        return known
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    chosen = [function for function in known if function["name"] == name]
    if not chosen:
        names = ", ".join(function["name"] for function in known)
        raise GrammarError(
            'tool_choice: expected "auto", "required" or {"type": "function", '
            f'"function": {{"name": one of {names}}}}}, found {short(choice)}; '
            "choose one of these"
        )
    return chosen


CALL_HEAD = re.compile(
    re.escape(TOOL_CALL) + r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]+)"\s*,'
    r'\s*"arguments"\s*:\s*'
)
CALL_TAIL = re.compile(r"\s*\}\s*" + re.escape(TOOL_CALL_END))


def parse_tool_calls(text: str) -> list[tuple[str, str]]:
    """The (name, arguments as JSON) of each complete tool call in `text`."""
    # Numbers are not converted: only where the arguments end is wanted.
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)
    calls = []
    place = 0
    while head := CALL_HEAD.search(text, place):
        place = head.end()
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            continue
        if tail := CALL_TAIL.match(text, end):
            calls.append((head[1], text[place:end]))
            place = tail.end()
    return calls


# Checks that need no tokenizer.


def _checked(grammar: Grammar) -> Grammar:
    try:
        size = len(grammar.source.encode())
    except UnicodeEncodeError as error:
        raise GrammarError(
            f"{grammar.kind}: expected valid Unicode, found half of a surrogate pair; "
            "remove it"
        ) from error
    _at_most(size, MAX_SOURCE, grammar.kind, "bytes")
    _refuse(grammar.kind, LLMatcher.validate_grammar(grammar._text(), limits=LIMITS))
    return grammar


def _refuse(kind: str, reason: str) -> None:
    """Raise what llguidance reports, if it reports an error."""
    if not reason or reason.startswith("WARNING"):
        return
    lines = (line for line in reason.splitlines() if line != "<non-verbose/>")
    cause = " ".join(lines)[:300]
    if cause.startswith("NoExtension"):
        cause = "no text satisfies it"
    raise GrammarError(
        f"{kind}: expected a supported and affordable one, found: {cause}; "
        "change or simplify that part"
    )


def _dumped(schema: Mapping, where: str) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GrammarError(
            f"{where}: expected JSON values, found: {error}; remove that value"
        ) from error


def _check_values(*schemas: Any, where: str) -> None:
    """Bound how deep and how large schemas are, without recursion of its own."""
    values, references, patterns = 0, 0, 0
    waiting: list[tuple[Any, int]] = [(schema, 1) for schema in schemas]
    while waiting:
        value, depth = waiting.pop()
        values += 1
        _at_most(depth, MAX_DEPTH, where, "levels")
        _at_most(values, MAX_VALUES, where, "values")
        if isinstance(value, Mapping):
            references += _check_reference(value.get("$ref"), where)
            patterns += _pattern_size(value)
            _at_most(references, MAX_REFERENCES, where, "references")
            _at_most(patterns, MAX_PATTERN, where, "characters of patterns")
            for key in ("properties", "required"):
                _at_most(_length(value.get(key)), MAX_PROPERTIES, where, key)
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += [(inner, depth + 1) for inner in value]


def _pattern_size(value: Mapping) -> int:
    own, of_names = value.get("pattern"), value.get("patternProperties")
    names = of_names if isinstance(of_names, Mapping) else ()
    return sum(len(name) for name in (own, *names) if isinstance(name, str))


def _length(value: object) -> int:
    return len(value) if isinstance(value, (Mapping, list, tuple)) else 0


def _at_most(found: int, most: int, where: str, unit: str) -> None:
    if found > most:
        raise GrammarError(
            f"{where}: expected at most {most} {unit}, found {found} or more; "
            "make it smaller"
        )


def _check_reference(reference: object, where: str) -> int:
    """1 if there is a reference, which must stay in its own schema."""
    if not isinstance(reference, str):
        return 0
    if not reference.startswith("#"):
        raise GrammarError(
            f'{where}: expected "$ref" into the schema itself (#/...), found '
            f"{short(reference)}; put that definition under $defs, nothing is fetched"
        )
    return 1


# Compiled for one tokenizer.


class CompiledGrammar:
    """A grammar for one tokenizer; makes a matcher for each answer."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        self._grammar, self._text = grammar, grammar._text()
        self._tokenizer, self._vocabulary = _vocabulary(tokenizer), tokenizer.vocabulary

    def matcher(self) -> Matcher:
        """A matcher at the start of an answer (takes about 1 ms)."""
        # Not a copy of a first one: copies share the lexer and its allowance of states.
        inner = LLMatcher(self._tokenizer, self._text, log_level=0, limits=LIMITS)
        return Matcher(inner, self._vocabulary, self._grammar.kind)


class Matcher:
    """Follows one answer through its grammar. Used by one thread at a time."""

    def __init__(self, inner: LLMatcher, vocabulary: int, kind: str) -> None:
        self._inner, self._vocabulary, self._kind = inner, vocabulary, kind
        self._bits = allocate_token_bitmask(1, vocabulary)
        self._check()

    def allowed(self) -> np.ndarray:
        """For each token id, whether it may come next (bool)."""
        fill_next_token_bitmask(self._inner, self._bits)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._vocabulary].view(bool)

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """A copy of `logits` in which tokens that may not come next are -inf."""
        return np.where(self.allowed(), logits, np.float32(-np.inf))

    def accept(self, id: int) -> None:
        """Go on past token `id`."""
        self._inner.consume_token(id)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and can only end."""
        return self._inner.is_stopped()

    def _check(self) -> None:
        if self._inner.is_error():
            _refuse(self._kind, self._inner.get_error())


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(
        tokenizer.to_json(),
        n_vocab=tokenizer.vocabulary,
        eos_token=sorted(tokenizer.end_ids)[-1],
        slices=LLTokenizer.json_slices(),
    )


@lru_cache(maxsize=64)
def _compile(grammar: Grammar, tokenizer: Tokenizer) -> CompiledGrammar:
    compiled = CompiledGrammar(grammar, tokenizer)
    _try_out(compiled.matcher())
    return compiled


def _try_out(matcher: Matcher) -> None:
    """Follow a few allowed tokens: costly grammars show it at once, here."""
    choose = np.random.default_rng(0)
    for _ in range(TRIAL_TOKENS):
        if matcher.finished:
            return
        matcher.accept(int(choose.choice(np.flatnonzero(matcher.allowed()))))
