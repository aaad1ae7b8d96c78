"""The stand-in's inference plane, by the real SDK in strict mode and the openai one."""

from __future__ import annotations

import asyncio
import json

import fireworks
import httpx
import openai
import pytest
from fireworks import AsyncFireworks, Fireworks
from jsonschema import Draft202012Validator

from course import process
from local_cloud.fireworks import prices, schema
from local_cloud.fireworks.app import serve
from local_cloud.fireworks.catalogue import SMOLLM2 as MODEL
from local_cloud.fireworks.clock import Clock
from local_cloud.fireworks.faults import Fault, Faults, from_header
from local_cloud.fireworks.wire import extras
from models.errors import GrammarError

TICKET = [
    {"role": "user", "content": "My order A-1042 never arrived, I need it today!"}
]
FORM = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["delivery", "refund"]},
        "urgent": {"type": "boolean"},
    },
    "required": ["intent", "urgent"],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup_order",
        "description": "Find an order",
        "parameters": {
            "type": "object",
            "properties": {"urgent": {"type": "boolean"}},
            "required": ["urgent"],
        },
    },
}


@pytest.fixture(scope="module")
def cloud(shared_model):
    with serve(shared_model, clock=Clock.manual()) as served:
        yield served


@pytest.fixture
def client(cloud):
    cloud.state.faults.clear()
    with Fireworks(
        base_url=cloud.url,
        api_key=cloud.api_key,
        account_id=cloud.account_id,
        max_retries=0,
        timeout=30,
        _strict_response_validation=True,
    ) as made:
        yield made


def ask(client, **options):
    asked = {"model": MODEL, "messages": TICKET, "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**{**asked, **options})


def test_a_chat_says_what_it_cost_and_how_long_it_took(client):
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=TICKET, max_tokens=4, perf_metrics_in_response=True
    )
    answer = raw.parse()
    assert extras(answer) == []
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4
    assert raw.headers["fireworks-prompt-tokens"] == str(answer.usage.prompt_tokens)
    metrics = answer.perf_metrics
    first, whole = (
        metrics[f"server-{name}"] for name in ("time-to-first-token", "processing-time")
    )
    assert 0 < first < whole
    assert raw.headers["x-request-id"]


def test_a_stream_ends_in_metrics_usage_and_done(client):
    chunks = list(ask(client, stream=True, perf_metrics_in_response=True))
    assert [extra for chunk in chunks for extra in extras(chunk)] == []
    *pieces, last, used = chunks
    assert {piece.choices[0].finish_reason for piece in pieces} == {None}
    assert pieces[0].choices[0].delta.role == "assistant"
    assert last.choices[0].finish_reason == "length"
    assert last.perf_metrics["prompt-tokens"] == used.usage.prompt_tokens
    assert (used.choices, used.usage.completion_tokens) == ([], 8)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ask(client).choices[0].message.content


def test_the_prefix_without_a_base_url_is_served_too(cloud):
    answer = httpx.post(
        f"{cloud.url}/inference/v1/chat/completions",
        json={"model": MODEL, "messages": TICKET, "max_tokens": 2},
        headers={"authorization": f"Bearer {cloud.api_key}"},
    )
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_async(cloud):
    async def work():
        async with AsyncFireworks(
            base_url=cloud.url,
            api_key=cloud.api_key,
            max_retries=0,
            _strict_response_validation=True,
        ) as client:
            answers = await asyncio.gather(*(ask(client) for _ in range(3)))
            stream = await ask(client, stream=True)
            return answers, [chunk async for chunk in stream]

    answers, chunks = asyncio.run(work())
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert chunks[-1].usage.completion_tokens == 8


def test_seed_stop_and_logprobs(client):
    drawn = [
        ask(client, temperature=1.0, seed=seed).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    whole = ask(client, logprobs=True, top_logprobs=2).choices[0]
    told = whole.logprobs.content
    assert "".join(token.token for token in told) == whole.message.content
    assert whole.message.content[told[3].text_offset :].startswith(told[3].token)
    assert len(told[0].top_logprobs) == 2
    legacy = ask(client, logprobs=1).choices[0].logprobs
    assert legacy.token_logprobs == pytest.approx([token.logprob for token in told])
    stop = told[2].token
    stopped = ask(client, stop=stop).choices[0]
    assert stopped.finish_reason == "stop"
    assert stop not in stopped.message.content


def test_text_completions(client):
    asked = {"model": MODEL, "prompt": "One, two, three,", "temperature": 0}
    answer = client.completions.create(**asked, max_tokens=4, logprobs=1)
    assert answer.choices[0].text == " four, five,"
    pieces = list(client.completions.create(**asked, max_tokens=4, stream=True))
    assert "".join(p.choices[0].text for p in pieces if p.choices) == " four, five,"
    assert pieces[-1].usage.completion_tokens == 4


def test_a_json_schema_is_enforced_at_any_temperature(client):
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": FORM}}
    for seed in range(5):
        answer = ask(
            client, response_format=form, max_tokens=40, temperature=1.5, seed=seed
        )
        value = json.loads(answer.choices[0].message.content)
        Draft202012Validator(FORM).validate(value)
        assert set(value) == {"intent", "urgent"}  # objects are closed


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "json_schema", "json_schema": json.dumps(FORM)}, '{"intent": '),
        ({"type": "json_object", "schema": FORM}, '{"intent": '),
        ({"type": "grammar", "grammar": 'root ::= "yes" | "no"'}, ""),
    ],
)
def test_other_ways_to_give_a_form(client, form, expected):
    answer = ask(client, response_format=form, max_tokens=40).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content.startswith(expected)
    if form["type"] == "grammar":
        assert answer.message.content in ("yes", "no")


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        "any",
        {"type": "function", "function": {"name": "lookup_order"}},
        {"type": "function", "name": "lookup_order"},
    ],
)
def test_a_forced_tool_call_has_valid_arguments(client, choice):
    asked = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 60}
    answer = ask(client, **asked).choices[0]
    chunks = list(ask(client, **asked, stream=True))
    streamed = [c.choices[0].delta.tool_calls for c in chunks if c.choices]
    (call,) = answer.message.tool_calls
    assert answer.finish_reason == "tool_calls"
    assert call.function.name == "lookup_order"
    assert type(json.loads(call.function.arguments)["urgent"]) is bool
    (told,) = [calls for calls in streamed if calls]
    assert told[0].function.arguments == call.function.arguments


def test_with_auto_the_model_decides_and_the_text_streams(client):
    asked = {"tools": [TOOL], "tool_choice": "auto", "max_tokens": 24}
    answer = ask(client, **asked).choices[0]
    assert bool(answer.message.content) != bool(answer.message.tool_calls)
    pieces = [c for c in ask(client, **asked, stream=True) if c.choices]
    assert len(pieces) > 3
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == (answer.message.content or "")


def test_a_call_that_was_cut_is_no_call(client):
    answer = ask(client, tools=[TOOL], tool_choice="required", max_tokens=6).choices[0]
    assert answer.finish_reason == "length"
    assert answer.message.tool_calls is None


BAD = {
    "two answers": {"n": 2},
    "an unknown field": {"extra_body": {"min_p": 0.1}},
    "no messages": {"messages": []},
    "a temperature": {"temperature": 3},
    "an unknown tool": {"tools": [TOOL], "tool_choice": "none_such"},
    "a form": {"response_format": {"type": "xml"}},
    "no schema": {"response_format": {"type": "json_schema"}},
    "bad GBNF": {"response_format": {"type": "grammar", "grammar": "root ::= ("}},
    "too long": {"max_tokens": 9999, "context_length_exceeded_behavior": "error"},
}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_bad_input_gets_a_400_in_the_envelope(client, cloud, options):
    before = cloud.state.generations
    with pytest.raises(fireworks.BadRequestError) as raised:
        ask(client, **options)
    assert raised.value.body["error"]["message"]
    assert raised.value.body["error"]["type"] == "invalid_request_error"
    assert cloud.state.generations == before


@pytest.mark.parametrize(
    "keyword",
    [
        {"oneOf": [{"type": "string"}]},
        {"type": "string", "pattern": "^A"},
        {"type": "string", "minLength": 1},
        {"type": "string", "maxLength": 3},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "integer", "minimum": 3},
        {"$ref": "https://example.com/schema.json"},
    ],
)
@pytest.mark.parametrize("wrap", ["schema", "tool"])
def test_an_unsupported_keyword_is_refused(client, keyword, wrap):
    inner = {"type": "object", "properties": {"a": {"anyOf": [keyword]}}}
    options = {
        "response_format": {"type": "json_schema", "json_schema": {"schema": inner}}
    }
    if wrap == "tool":
        function = {"name": "f", "parameters": inner}
        options = {"tools": [{"type": "function", "function": function}]}
    with pytest.raises(fireworks.BadRequestError) as raised:
        ask(client, **options)
    named = next(key for key in keyword if key not in ("type", "items"))
    assert named in raised.value.body["error"]["message"]


def test_a_property_may_be_named_like_a_keyword():
    form = {"type": "object", "properties": {"pattern": {"type": "string"}}}
    assert schema.closed(form)["additionalProperties"] is False
    with pytest.raises(GrammarError):
        schema.closed({"pattern": "x"})


def test_a_wrong_key_and_an_unknown_model(client):
    with pytest.raises(fireworks.AuthenticationError):
        ask(client.with_options(api_key="fw_wrong"))
    with pytest.raises(fireworks.NotFoundError) as raised:
        ask(client, model="accounts/fireworks/models/none-such")
    assert "none-such" in raised.value.body["error"]["message"]


def test_a_known_prompt_is_cached_for_its_own_session_only(client):
    long = [{"role": "user", "content": "A word, and another. " * 30}]
    cached = []
    for options in (
        {"user": "ann"},
        {"user": "ann"},
        {"user": "bob"},
        {"extra_headers": {"x-session-affinity": "ann"}},
        {"user": "ann", "prompt_cache_isolation_key": "wall"},
    ):
        answer = ask(client, messages=long, max_tokens=1, **options)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    new, same, other, header, walled = cached
    assert new == other == walled == 0
    assert same == header > 100


def test_a_client_that_leaves_ends_its_generation(client, cloud, model, monkeypatch):
    ended, uses = cloud.state.ended, []

    def note(route, use):
        uses.append(use)
        ended(route, use)

    monkeypatch.setattr(cloud.state, "ended", note)
    # All 1,500 tokens if nobody stops it (it repeats itself): seconds on any machine.
    story = [{"role": "user", "content": "Tell me a long story about the sea."}]
    with pytest.raises(fireworks.APITimeoutError):
        ask(client, messages=story, max_tokens=1500, timeout=0.2)
    stream = ask(client, messages=story, max_tokens=1500, stream=True)
    next(iter(stream))
    stream.close()
    process.wait_until(lambda: len(uses) == 2, 60, "the end of both generations")
    assert [use.finish_reason for use in uses] == ["cancelled"] * 2
    process.wait_until(
        lambda: model.engine.snapshot().active == 0, 60, "an engine without work"
    )


# Faults.


def test_faults_strike_as_often_as_ordered():
    faults = Faults()
    faults.order(Fault("cold", times=2))
    faults.order(Fault("cut"))
    struck = [faults.strike("cold", "broken") for _ in range(3)]
    assert [fault is not None for fault in struck] == [True, True, False]
    assert faults.strike("cut").kind == "cut"
    faults.order(Fault("cold", times=None))
    assert all(faults.strike("cold") for _ in range(9))
    faults.clear()
    assert faults.strike("cold") is None


@pytest.mark.parametrize(
    "text", ["fire", "cut; often=2", "cut; after=x", "cut; after=0"]
)
def test_a_fault_header_that_is_wrong(text):
    with pytest.raises(ValueError, match=r"fault|invalid literal"):
        from_header(text)


def test_a_fault_by_header(client):
    chunks = list(ask(client, stream=True, extra_headers={"x-fault": "cut; after=3"}))
    assert len(chunks) == 3
    assert chunks[-1].choices[0].finish_reason is None
    with pytest.raises(fireworks.RateLimitError) as raised:
        ask(client, extra_headers={"x-fault": "rate_limit; seconds=7"})
    assert raised.value.response.headers["retry-after"] == "7"
    with pytest.raises(fireworks.BadRequestError):
        ask(client, extra_headers={"x-fault": "fire"})


# The client that everyone has already.


def test_the_openai_client(cloud):
    with openai.OpenAI(
        base_url=f"{cloud.url}/inference/v1", api_key=cloud.api_key, max_retries=0
    ) as client:
        answer = ask(client)
        stream = list(ask(client, stream=True, stream_options={"include_usage": True}))
        called = ask(client, tools=[TOOL], tool_choice="required", max_tokens=60)
        text = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=2)
        with pytest.raises(openai.NotFoundError) as raised:
            ask(client, model="gpt-4")
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    assert stream[-1].usage.completion_tokens == 8
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)
    assert text.choices[0].text
    assert raised.value.body["message"]


def test_prices():
    price = prices.PerToken(input=1.0, cached=0.1, output=4.0)
    assert price.dollars(1_000_000, 0, 0) == 1.0
    assert price.dollars(1_000_000, 1_000_000, 1_000_000) == pytest.approx(4.1)
    assert price.dollars(0, 0, 1_000_000, batch=True) == 2.0
    assert prices.serverless("accounts/fireworks/models/any", 0.1) is prices.UP_TO_4B
    assert prices.serverless("a/kimi-k3#b", 1) is prices.SERVERLESS["kimi-k3"]
    assert prices.Prices().gpu_usd("NVIDIA_H100_80GB", 3600) == 8.0
    with pytest.raises(ValueError, match="add its price"):
        prices.Prices().gpu_usd("ABACUS", 1)
