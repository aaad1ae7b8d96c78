"""Guaranteed forms: whatever the logits, the answer has the form that was asked."""

import json
import os
import re
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest

from models import grammar as grammars
from models.errors import GrammarError, ModelError
from models.sampling import Sampler, Sampling
from models.text import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    folder = Path(os.environ.get("MODEL_DIR", "models/build"))
    found = sorted(folder.rglob("tokenizer.json"))
    if not found:
        pytest.skip("no tokenizer.json: build the model first (python -m models)")
    return Tokenizer.load(found[0])


def answer(tokenizer, grammar, seed, max_tokens=400, prefer=None):
    """(text, whether it ended by itself) of a model that draws at random."""
    random = np.random.default_rng(seed)
    sampler = Sampler(
        Sampling(temperature=1.0, seed=seed, grammar=grammar),
        tokenizer.vocabulary,
        grammar.compile(tokenizer).matcher(),
    )
    ids = []
    while not sampler.finished and len(ids) < max_tokens:
        logits = 8 * random.random(tokenizer.vocabulary, dtype=np.float32)
        if prefer is not None:
            logits[prefer] += 12
        ids.append(sampler.draw(logits).id)
        if ids[-1] in tokenizer.end_ids:
            break
    return tokenizer.decode(ids), len(ids) < max_tokens


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad", "ünknown 🙂", None]},
        "tags": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[a-z]{2,5}$"},
            "maxItems": 3,
        },
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number", "minimum": -9, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


def tool(name, properties, **more):
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("weather", {"city": {"type": "string", "maxLength": 8}}),
    tool(
        "add-2",
        {"a": {"$ref": "#/$defs/n"}, "b": {"$ref": "#/$defs/n"}},
        **{"$defs": {"n": {"type": "integer", "minimum": -99, "maximum": 99}}},
    ),
]
NAMED = {"type": "function", "function": {"name": "add-2"}}


# What is guaranteed.


def test_random_logits_give_valid_json_every_time(tokenizer):
    grammar = grammars.json_schema(PERSON)
    validator = jsonschema_rs.validator_for(PERSON)
    answers = [answer(tokenizer, grammar, seed) for seed in range(200)]
    assert all(ended for _, ended in answers)
    for text, _ in answers:
        validator.validate(json.loads(text))
    assert len({text for text, _ in answers}) > 190


def test_json_has_one_space_after_commas_and_colons_and_no_more(tokenizer):
    text, _ = answer(tokenizer, grammars.json_schema(PERSON), 1)
    assert text == json.dumps(json.loads(text), ensure_ascii=False)


@pytest.mark.parametrize("white", [" ", "\n", "\t", "    "])
def test_a_model_that_loves_whitespace_gets_none_between_values(tokenizer, white):
    loved = tokenizer.encode(white)
    text, ended = answer(tokenizer, grammars.json_schema(PERSON), 3, prefer=loved)
    assert ended
    assert "\n" not in text
    assert "\t" not in text
    json.loads(text)


def test_any_object(tokenizer):
    ends = [tokenizer.encode(each)[0] for each in '}"]']
    for seed in range(20):
        text, ended = answer(tokenizer, grammars.json_object(), seed, prefer=ends)
        assert ended
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern",
    [r"(yes|no|maybe)", r"[0-9]{3}-[0-9]{4}", r"[a-zäöü]{1,5}(, [a-z]{1,5}){0,3}\."],
)
def test_regular_expressions_match_from_end_to_end(tokenizer, pattern):
    grammar = grammars.regex(pattern)
    for seed in range(30):
        text, ended = answer(tokenizer, grammar, seed)
        assert ended
        assert re.fullmatch(pattern, text)


def test_lark(tokenizer):
    grammar = grammars.lark('start: "<" inner ">"\ninner: "a" | "(" inner ")"\n')
    for seed in range(20):
        text, _ = answer(tokenizer, grammar, seed, prefer=tokenizer.encode("a"))
        assert re.fullmatch(r"<\(*a\)*>", text)


def test_the_end_is_allowed_only_where_the_answer_is_complete(tokenizer):
    matcher = grammars.regex("ab?").compile(tokenizer).matcher()
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    assert not matcher.allowed()[list(tokenizer.end_ids)].any()
    matcher.accept(a)
    assert matcher.allowed()[2]
    assert matcher.allowed()[b]
    assert not matcher.finished
    matcher.accept(b)
    assert matcher.finished


def test_control_tokens_are_no_text(tokenizer):
    allowed = grammars.regex("(?s:.*)").compile(tokenizer).matcher().allowed()
    assert np.flatnonzero(~allowed[:17]).tolist() == [n for n in range(17) if n != 2]


def test_masking_leaves_the_row_and_the_allowed_logits_alone(tokenizer):
    matcher = grammars.regex("yes|no").compile(tokenizer).matcher()
    logits = np.random.default_rng(0).standard_normal(49152).astype(np.float32)
    before = logits.copy()
    masked = matcher.mask(logits)
    allowed = matcher.allowed()
    assert np.array_equal(logits, before)
    assert np.array_equal(masked[allowed], logits[allowed])
    assert np.isneginf(masked[~allowed]).all()
    words = {tokenizer.decode([id]) for id in np.flatnonzero(allowed)}
    assert words == {"y", "ye", "yes", "n", "no"}


def test_a_token_out_of_place_is_an_error(tokenizer):
    matcher = grammars.regex("yes|no").compile(tokenizer).matcher()
    with pytest.raises(GrammarError):
        matcher.accept(tokenizer.encode("x")[0])


def test_answers_do_not_disturb_each_other(tokenizer):
    compiled = grammars.regex("yes|no").compile(tokenizer)
    first, second = compiled.matcher(), compiled.matcher()
    first.accept(tokenizer.encode("yes")[0])
    assert first.finished
    assert not second.finished


def test_compiling_is_remembered(tokenizer):
    one, same = grammars.json_schema(PERSON), grammars.json_schema(dict(PERSON))
    assert one == same
    assert one.compile(tokenizer) is same.compile(tokenizer)


def test_a_grammar_needs_its_matcher(tokenizer):
    with pytest.raises(ValueError, match="matcher: expected one with a grammar"):
        Sampler(Sampling(grammar=grammars.json_object()), tokenizer.vocabulary)


# Tool calls.


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_tool_calls_follow_the_tools_schema(tokenizer, choice):
    grammar = grammars.tool_call(TOOLS, choice)
    schemas = {
        each["function"]["name"]: each["function"]["parameters"] for each in TOOLS
    }
    names = set()
    for seed in range(40):
        text, ended = answer(tokenizer, grammar, seed)
        assert ended
        ((name, arguments),) = grammars.parse_tool_calls(text)
        jsonschema_rs.validate(schemas[name], json.loads(arguments))
        names.add(name)
        assert text == (
            f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'
        )
    assert names == ({"add-2"} if choice == NAMED else {"weather", "add-2"})


def test_auto_allows_text_or_one_whole_call(tokenizer):
    grammar = grammars.tool_call(TOOLS, "auto")
    compiled = grammar.compile(tokenizer)
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'

    def follows(text):
        matcher = compiled.matcher()
        for id in tokenizer.encode(text):
            if not matcher.allowed()[id]:
                return None
            matcher.accept(id)
        return bool(matcher.allowed()[2]) if not matcher.finished else True

    assert follows("It is warm in Rome.\n<b>Really</b>") is True
    assert follows("a <tool_cal") is True
    assert follows(call) is True
    assert follows("<tool_call>") is False
    assert follows('<tool_call>{"name": "other"') is None
    assert follows("Sure: " + call) is None
    assert follows(call + "!") is None


def test_a_call_at_the_start_of_an_automatic_answer_is_whole(tokenizer):
    grammar = grammars.tool_call(TOOLS, "auto")
    head = tokenizer.encode("<tool_call>")
    for seed in range(10):
        matcher = grammar.compile(tokenizer).matcher()
        for id in head:
            matcher.accept(id)
        sampler = Sampler(
            Sampling(temperature=1.0, seed=seed, grammar=grammar), 49152, matcher
        )
        ids = list(head)
        flat = np.zeros(49152, np.float32)
        while not sampler.finished:
            ids.append(sampler.draw(flat).id)
        assert len(grammars.parse_tool_calls(tokenizer.decode(ids))) == 1


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("no call", []),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', [("f", "{}")]),
        (
            'x <tool_call>\n{"name":"f","arguments":{"a":"</tool_call>"}}\n</tool_call>'
            '<tool_call>{"name": "g", "arguments": [1e999]}</tool_call>',
            [("f", '{"a":"</tool_call>"}'), ("g", "[1e999]")],
        ),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', []),
        ('<tool_call>{"name": "f", "arguments": {}}', []),
        ('<tool_call>{"name": 5, "arguments": {}}</tool_call>', []),
        ('<tool_call>{"name": "f", "arguments": ' + "[" * 100_000, []),
        (
            '<tool_call>{"name": "f", "arguments": ' + "9" * 5000 + "}</tool_call>",
            [("f", "9" * 5000)],
        ),
    ],
)
def test_reading_tool_calls(text, calls):
    assert grammars.parse_tool_calls(text) == calls


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "auto", "expected 1 to 128, found 0"),
        (TOOLS * 65, "auto", "expected 1 to 128, found 130"),
        (TOOLS, "none", "found 'none'"),
        (TOOLS, {"function": {"name": "other"}}, "one of weather, add-2"),
        (TOOLS, {"function": "add-2"}, "one of weather, add-2"),
        ([tool('a"b', {})], "auto", "letters, digits"),
        ([tool("f", {"a": {"$ref": "http://example.com"}})], "auto", "nothing is"),
    ],
)
def test_wrong_tools_are_explained(tools, choice, message):
    with pytest.raises(ValueError, match=message):
        grammars.tool_call(tools, choice)


# What is refused.


def nested(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def endless():
    schema = {}
    schema["properties"] = {"a": schema}
    return schema


def doubled():
    """Small in memory, 2**40 values when written out."""
    schema = {"type": "string"}
    for _ in range(20):
        schema = {"anyOf": [schema, schema]}
    return schema


LOOP = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
ENDLESS_NEED = {
    "$ref": "#/$defs/a",
    "$defs": {
        "a": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/a"}},
            "required": ["a"],
        }
    },
}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("object", "expected a JSON schema"),
        (nested(40), "at most 64 levels"),
        (nested(20_000), "at most 64 levels"),
        (endless(), "at most 64 levels"),
        (doubled(), "at most 10000 values"),
        ({"enum": ["x" * 9] * 9_000}, "at most 65536 bytes"),
        ({"enum": list(range(20_000))}, "at most 10000 values"),
        ({"properties": {f"p{n}": {} for n in range(500)}}, "at most 400 properties"),
        ({"required": [f"p{n}" for n in range(5000)]}, "at most 400 required"),
        ({"anyOf": [{"$ref": "#"}] * 300}, "at most 256 references"),
        ({"$ref": "https://example.com/schema.json"}, "nothing is fetched"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        (LOOP, "no text satisfies it"),
        (ENDLESS_NEED, "Too many items"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"type": "strng"}, "strng"),
        ({"const": float("nan")}, "expected JSON values"),
        ({"const": {1, 2}}, "expected JSON values"),
        ({"const": "\ud800"}, "half of a surrogate pair"),
        ({"type": "string", "pattern": "^(a{1000}){1000}$"}, "affordable"),
        ({"type": "string", "pattern": r"\p{L}" * 4000}, "characters of patterns"),
        ({"type": "string", "pattern": "("}, "unclosed"),
    ],
)
def test_schemas_that_are_wrong_or_too_costly(tokenizer, schema, message):
    with pytest.raises(GrammarError, match=message):
        grammars.json_schema(schema).compile(tokenizer)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a{1000}){1000}",
        "a{100000}",
        "(a?){500}a{500}",
        "a?" * 4_000,
        "(" * 4_000 + ")" * 4_000,
        "x" * 100_000,
        "(",
        "(?=a)b",
        r"[^\s\S]",
        "\ud800",
    ],
)
def test_expressions_that_are_wrong_or_too_costly(tokenizer, pattern):
    with pytest.raises(GrammarError):
        grammars.regex(pattern).compile(tokenizer)


@pytest.mark.parametrize(
    "source",
    [
        "start: missing",
        "start: x{0,1000}\nx: y{0,1000}\ny: z{0,1000}\nz: 'a'\n",
        'start: x{0,1000}\nx: y{0,1000}\ny: z{0,1000}\nz: "a"\n',
        "start: T\nT: /(a{1000}){1000}/\n",
        "start: " + "(" * 4_000 + '"a"' + ")" * 4_000,
        "x" * 100_000,
    ],
)
def test_context_free_grammars_that_are_wrong_or_too_costly(tokenizer, source):
    with pytest.raises(GrammarError):
        grammars.lark(source).compile(tokenizer)


def test_a_recursive_schema_is_no_bomb(tokenizer):
    tree = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "n": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"$ref": "#/$defs/node"},
                },
                "required": ["n"],
                "additionalProperties": False,
            }
        },
    }
    grammar = grammars.json_schema(tree)
    for seed in range(10):
        text, ended = answer(tokenizer, grammar, seed, prefer=tokenizer.encode("}"))
        assert ended
        jsonschema_rs.validate(tree, json.loads(text))


def test_guidance_options_in_a_schema_change_nothing(tokenizer):
    schema = {**PERSON, "x-guidance": {"whitespace_flexible": True, "lenient": True}}
    text, _ = answer(tokenizer, grammars.json_schema(schema), 1)
    assert text == answer(tokenizer, grammars.json_schema(PERSON), 1)[0]


def test_a_refusal_is_a_model_error_and_a_value_error():
    with pytest.raises(GrammarError) as refusal:
        grammars.regex("(" * 5_000)
    assert isinstance(refusal.value, ModelError)
    assert isinstance(refusal.value, ValueError)
    assert len(str(refusal.value)) < 500
