"""Answers of a guaranteed form: are they, and what does the guarantee cost?

A grammar says before each token which tokens may follow. That makes wrong answers
impossible; it cannot make them true, nor make them end. A free string has no bound (the
service takes no maxLength), so max_tokens may cut it: such an answer is not whole,
which is another thing than invalid, and counted apart. Bounds are an enum, or a GBNF
grammar in place of the schema. The price is a mask over 49,152 logits a token.

Run it:     python -m tests.benchmarks.constrained             both parts, 2 minutes
            python -m tests.benchmarks.constrained speed       one of them
            python -m tests.benchmarks.constrained --quick     fewer calls
Needs:      pip install -r requirements.txt
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from jsonschema import Draft202012Validator, ValidationError

import models
from course import lesson
from course.measure import Paired, Series
from course.show import Table
from fireworks_deployment import TRIAGE, lookup_for, stand_in
from local_cloud.fireworks.app import Served, serve
from local_cloud.fireworks.catalogue import SMOLLM2
from models import Sampling, grammar
from tests.benchmarks import AFTER_LESSONS
from tests.benchmarks.turns import Bystanders

CALLS, QUICK_CALLS, AT_ONCE = 100, 20, 8
ROUNDS, QUICK_ROUNDS = 9, 3
MOST_TOKENS = 96  # of an answer; most have 25, and a string has no bound
TOKENS = 48  # of each answer whose speed is measured
SUBJECTS = ("order A-{0}", "parcel {0}", "my lamp", "the account of Ann", "invoice {0}")
WISHES = (
    "never arrived, where is it?",
    "is broken: money back, please.",
    "must be changed today!",
    "came twice.",
)


@contextmanager
def _cloud(device: str) -> Iterator[Served]:
    with models.load(device) as model, serve(model) as cloud:
        yield cloud


def ticket(number: int) -> str:
    """A ticket like no other of the first 100."""
    subject = SUBJECTS[number % len(SUBJECTS)].format(1000 + number)
    return f"{number}. {subject} {WISHES[number // len(SUBJECTS) % len(WISHES)]}"


def validity(run: lesson.Run) -> None:
    """Call functions through the SDK; validate what they say by another library."""
    cloud = run.keep("cloud", lambda: _cloud(run.device))
    calls = QUICK_CALLS if run.quick else CALLS
    run.predict(
        f"{calls} of {calls} are valid where the form bounds the answer. A free string "
        "has no bound: none is invalid, but some never end."
    )
    rows = []
    with (
        stand_in(cloud.url, timeout=120) as client,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        for name, (make, temperatures) in KINDS.items():
            for temperature in temperatures:
                one = partial(outcome, client, make, temperature)
                with run.progress(f"{name}, temperature {temperature}", calls) as tick:
                    told = []
                    for found in pool.map(one, range(calls)):
                        told.append(found)
                        tick()
                rows.append([name, temperature, *map(told.count, OUTCOMES)])
    columns = ["form", ("temperature", ""), *((name, "") for name in OUTCOMES)]
    run.table(Table(f"Outcomes of {calls} calls each", columns, rows))
    bounded = [row for row in rows if row[0] in BOUNDED]
    run.conclude(
        f"Of {calls} bounded forms at worst {min(row[2] for row in bounded)} were "
        f"valid; of all {calls * len(rows)} answers {sum(row[-1] for row in rows)} "
        "broke their form."
    )


Request = tuple[list[Any], dict[str, Any], dict[str, Any]]  # messages, options, schema


def free_json(text: str) -> Request:
    """The triage: two choices and a free string."""
    return TRIAGE.messages(text), TRIAGE.options(), dict(TRIAGE.returns or {})


def bounded_json(text: str) -> Request:
    """The same without the free string."""
    messages, options, _ = free_json(text)
    known = dict(TRIAGE.returns or {})["properties"]
    fields = {name: known[name] for name in ("intent", "urgent")}
    schema = {"type": "object", "properties": fields, "required": [*fields]}
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": schema}}
    return messages, {**options, "response_format": form}, schema


def tool(text: str, choice: Any) -> Request:
    """The lookup of an order."""
    function = lookup_for(text)
    schema = function.tools[0]["function"]["parameters"]
    options = {**function.options(), "tool_choice": choice}
    return function.messages(text), options, schema


def tool_free(text: str) -> Request:
    """The same lookup with a string in place of the choice."""
    function = lookup_for(text)
    fields = {"order_id": {"type": "string"}}
    schema = {"type": "object", "properties": fields, "required": [*fields]}
    tool = {**function.tools[0]["function"], "parameters": schema}
    options = {**function.options(), "tools": [{"type": "function", "function": tool}]}
    return function.messages(text), options, schema


def bounded_by_grammar(text: str) -> Request:
    """The triage with a string of at most 12 characters, which a GBNF grammar can."""
    messages, options, schema = free_json(text)
    form = {"type": "grammar", "grammar": GBNF}
    order = {"anyOf": [{"type": "string", "maxLength": 12}, {"type": "null"}]}
    fields = {**schema["properties"], "order_id": order}
    return (
        messages,
        {**options, "response_format": form},
        schema | {"properties": fields},
    )


GBNF = r"""
root ::= "{\"intent\": " intent ", \"urgent\": " bool ", \"order_id\": " order "}"
intent ::= "\"delivery\"" | "\"refund\"" | "\"account\"" | "\"other\""
bool ::= "true" | "false"
order ::= "null" | "\"" [A-Za-z0-9-]{1,12} "\""
"""
NAMED = {"type": "function", "function": {"name": "lookup_order"}}
BOTH = (0.0, 1.0)  # temperatures
KINDS: dict[str, tuple[Callable[[str], Request], tuple[float, ...]]] = {
    "json_schema": (bounded_json, BOTH),
    "json_schema, a free string": (free_json, BOTH),
    "a string bounded by GBNF": (bounded_by_grammar, (1.0,)),
    "tool, a free string": (tool_free, BOTH),
    "tool, required": (partial(tool, choice="required"), BOTH),
    "tool, named": (partial(tool, choice=NAMED), (1.0,)),
    "tool, auto": (partial(tool, choice="auto"), (0.0,)),
}
BOUNDED = (
    "json_schema",
    "a string bounded by GBNF",
    "tool, required",
    "tool, named",
)


def outcome(
    client: Any, make: Callable[[str], Request], temperature: float, number: int
) -> str:
    """Which of `OUTCOMES` one call had."""
    messages, options, schema = make(ticket(number))
    asked = {**options, "temperature": temperature, "max_tokens": MOST_TOKENS}
    answer = client.chat.completions.create(
        model=SMOLLM2, messages=messages, seed=number, **asked
    )
    return judged(answer.choices[0], Draft202012Validator(schema))


OUTCOMES = ("valid", "in words (auto)", "cut by max_tokens", "invalid")


def judged(choice: Any, check: Draft202012Validator) -> str:
    """Which of `OUTCOMES` an answer is."""
    calls, said = choice.message.tool_calls, choice.message.content or ""
    if not calls and not said.startswith(("{", "<tool_call>")):
        return OUTCOMES[1]
    if choice.finish_reason == "length":
        return OUTCOMES[2]
    try:
        check.validate(json.loads(calls[0].function.arguments if calls else said))
    except (ValueError, ValidationError):
        return OUTCOMES[3]
    return OUTCOMES[0]


def speed(run: lesson.Run) -> None:
    """Tokens a second with and without the form, in turns, alone and in a batch."""
    cloud = run.keep("cloud", lambda: _cloud(run.device))
    model = cloud.state.engine
    assert model is not None
    run.predict("Alone, a grammar costs some of the speed; in a batch, a mask a row.")
    # It cannot end before max_tokens; the free one is asked for as many by its prompt.
    colours = {"enum": ["red", "green", "blue"]}
    words = {"type": "array", "items": colours, "minItems": TOKENS}
    open_ended = grammar.json_schema(words)
    rows = []
    for callers in (1, 8):
        constrained, free = rate(model, open_ended, callers), rate(model, None, callers)
        for way in (constrained, free):
            way()  # warms up
        bystanders, pairs = Bystanders(), []
        rounds = QUICK_ROUNDS if run.quick else ROUNDS
        with run.progress(f"{callers} callers", rounds) as advance:
            for number in range(rounds):
                order = [free, constrained] if number % 2 else [constrained, free]
                told = bystanders.watch([], partial(turns, order))
                pairs.append(told if order[0] is free else told[::-1])
                advance()
        bystanders.tell(run)
        without, with_form = (
            Series(tuple(column), "tokens/s") for column in zip(*pairs, strict=True)
        )
        ratio = Paired(with_form, without).ratio()
        medians = without.median, with_form.median
        rows.append([callers, *medians, ratio.value, ratio.low, ratio.high, rounds])
    columns = ["callers", ("free", "tokens/s"), ("constrained", "tokens/s")]
    columns += [("ratio", ""), ("low", "95 %"), ("high", "95 %"), "n"]
    run.table(Table("What the form costs", columns, rows))
    run.conclude(
        f"Under a grammar, one caller gets {rows[0][3]:.0%} of the tokens a second, "
        f"eight get {rows[1][3]:.0%}."
    )


def turns(ways: list[Callable[[], float]]) -> list[float]:
    """One turn of each way, in this order."""
    return [way() for way in ways]


def rate(
    model: models.Model, form: grammar.Grammar | None, callers: int
) -> Callable[[], float]:
    """A turn: so many answers at once; gives tokens a second."""
    sampling = Sampling(max_tokens=TOKENS, grammar=form)
    prompt = "Name the colours of a flag, many times, as a JSON array."

    def turn() -> float:
        start = time.perf_counter()
        streams = [model.stream(prompt, sampling) for _ in range(callers)]
        for stream in streams:
            list(stream)
        tokens = sum(stream.completion_tokens for stream in streams)
        return tokens / (time.perf_counter() - start)

    return turn


SECTIONS = [lesson.Section("validity", validity), lesson.Section("speed", speed)]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
