"""The API around the real model: every endpoint, every refusal, every disturbance."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from pathlib import Path

import httpx
import pytest

from course import process
from tests.api_fixtures import (
    ADMIN_KEY,
    BEARER,
    CHAT,
    KEY,
    KEYS,
    NAME,
    OTHER_KEY,
    app,
    client,
    get,
    model,
    post,
    question,
    run,
    served,
    until,
)

ROOT = Path(__file__).parent.parent
ENDLESS = {"max_tokens": 900, "logit_bias": {"2": -100, "0": -100}}
PATIENT_MS = 600_000  # TTFT target of a server that sheds nobody, however slow it is


@pytest.fixture(scope="module")
def api():
    return app(ttft_target_ms=PATIENT_MS)


@pytest.fixture(scope="module")
def keyed():
    return app(api_keys=KEYS, ttft_target_ms=PATIENT_MS)


def events(response: httpx.Response) -> list[dict]:
    """The events of a stream, which must end in [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def active() -> int:
    now = model().engine.snapshot()
    return now.active + now.queued


def ended(*reasons: str) -> int:
    """How many answers have ended, for one of these reasons or for any."""
    finished = model().engine.snapshot().finished
    return sum(finished.get(reason, 0) for reason in reasons or finished)


# ## Answers


def test_a_chat_has_openai_shape(api):
    answer = post(api, CHAT, question()).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == NAME
    assert answer["system_fingerprint"] == model().revision
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8
    used = answer["usage"]
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_the_same_as_the_whole(api, n):
    body = question(max_tokens=20, n=n, temperature=0.8, seed=7)
    whole = post(api, CHAT, body).json()
    told = events(post(api, CHAT, {**body, "stream": True}))
    for choice in whole["choices"]:
        parts = [
            piece
            for event in told
            for piece in event["choices"]
            if piece["index"] == choice["index"]
        ]
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == choice["message"]["content"]
        assert parts[0]["delta"]["role"] == "assistant"
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    texts = {choice["message"]["content"] for choice in whole["choices"]}
    assert len(texts) == n, "each of n answers has a seed of its own"


def test_usage_comes_last_if_asked_for(api):
    body = question(stream=True, stream_options={"include_usage": True})
    *pieces, last = events(post(api, CHAT, body))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert all(piece["usage"] is None for piece in pieces)
    assert all("usage" not in e for e in events(post(api, CHAT, question(stream=True))))


def test_a_prefix_is_found_again_by_its_own_caller_only(keyed):
    text = " ".join(f"Fact {number}: it is so." for number in range(60))
    # A system message of its own: what comes first in other tests is known already.
    messages = [{"role": "system", "content": text}, {"role": "user", "content": "So?"}]
    body = question(messages=messages, max_tokens=2)

    def cached(key):
        answer = post(keyed, CHAT, body, authorization=f"Bearer {key}").json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(KEY) == 0
    assert cached(KEY) > 300
    assert cached(OTHER_KEY) == 0


def test_stop_strings_end_the_answer(api):
    full = post(api, CHAT, question(max_tokens=24)).json()["choices"][0]
    text = full["message"]["content"]
    stop = text[5:9]
    cut = post(api, CHAT, question(max_tokens=24, stop=[stop])).json()["choices"][0]
    assert cut["message"]["content"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_logprobs_of_chat(api):
    body = question(max_tokens=3, logprobs=True, top_logprobs=2)
    choice = post(api, CHAT, body).json()["choices"][0]
    told = choice["logprobs"]["content"]
    assert "".join(t["token"] for t in told) == choice["message"]["content"]
    for token in told:
        assert token["logprob"] <= 0
        assert len(token["top_logprobs"]) == 2
        assert token["top_logprobs"][0]["token"] == token["token"]  # greedy
        assert bytes(token["bytes"]).decode() == token["token"]
    streamed = events(post(api, CHAT, {**body, "stream": True}))
    parts = [e["choices"][0]["logprobs"] for e in streamed]
    assert [t for p in parts if p for t in p["content"]] == told


def test_a_list_of_prompts_is_a_batch(api):
    prompts = ["One, two, three,", "The sky is"]
    body = {"model": NAME, "prompt": prompts, "max_tokens": 6, "logprobs": 1}
    answer = post(api, "/v1/completions", body).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        alone = post(api, "/v1/completions", {**body, "prompt": prompt}).json()
        assert alone["choices"][0]["text"] == choice["text"]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        offsets = choice["logprobs"]["text_offset"]
        assert offsets[0] == 0
        assert offsets == sorted(offsets)
    ids = [model().tokenizer.encode(prompt) for prompt in prompts]
    as_ids = post(api, "/v1/completions", {**body, "prompt": ids}).json()
    assert [c["text"] for c in as_ids["choices"]] == [
        c["text"] for c in answer["choices"]
    ]


def test_a_schema_is_kept(api):
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "n": {"type": "integer"}},
        "required": ["colour", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema}}
    body = question(max_tokens=40, response_format=form)
    said = json.loads(post(api, CHAT, body).json()["choices"][0]["message"]["content"])
    assert said["colour"] in ("red", "blue")
    assert isinstance(said["n"], int)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_tool_is_called_as_its_schema_says(api, choice):
    body = question(max_tokens=60, tools=[WEATHER], tool_choice=choice)
    told = post(api, CHAT, body).json()["choices"][0]
    (call,) = told["message"]["tool_calls"]
    assert told["finish_reason"] == "tool_calls"
    assert told["message"]["content"] is None
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    streamed = events(post(api, CHAT, {**body, "stream": True}))
    parts = [e["choices"][0] for e in streamed]
    (delta,) = [p["delta"] for p in parts if "tool_calls" in p["delta"]]
    assert delta["tool_calls"][0]["function"] == call["function"]
    assert parts[-1]["finish_reason"] == "tool_calls"
    back = [
        *body["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "18 degrees, sunny"},
    ]
    assert post(api, CHAT, question(messages=back, tools=[WEATHER])).status_code == 200


def test_tools_may_be_left_alone(api):
    for choice in ("none", "auto"):
        body = question(tools=[WEATHER], tool_choice=choice)
        plain = post(api, CHAT, body).json()["choices"][0]
        streamed = events(post(api, CHAT, {**body, "stream": True}))
        text = "".join(e["choices"][0]["delta"].get("content", "") for e in streamed)
        if plain["message"]["content"] is not None:
            assert text == plain["message"]["content"]


def test_labels_are_scored(api):
    labels = ["positive", "negative"]
    body = {"model": NAME, "input": ["I love it.", "Awful."], "labels": labels}
    answer = post(api, "/v1/classify", body).json()
    assert [result["index"] for result in answer["results"]] == [0, 1]
    for result in answer["results"]:
        assert set(result["scores"]) == set(labels)
        assert sum(result["scores"].values()) == pytest.approx(1)
        assert result["label"] == max(labels, key=result["scores"].__getitem__)
    single = post(api, "/v1/classify", {**body, "input": "I love it."}).json()
    assert single["results"][0]["scores"] == pytest.approx(
        answer["results"][0]["scores"], abs=1e-6
    )


# ## Health, pages, metrics


def test_health_has_four_questions(api):
    for name in ("startup", "live", "progress"):
        assert get(api, f"/health/{name}").status_code == 200
    ready = get(api, "/health/ready").json()
    assert ready.keys() == {"status", "rows", "active", "queued", "tokens_per_second"}
    assert (ready["status"], ready["rows"]) == ("ready", 8)


def test_not_ready_while_draining(api):
    other = app()
    other.state.service.draining = True
    assert get(other, "/health/ready").status_code == 503
    assert get(other, "/health/live").status_code == 200
    assert post(other, CHAT, question()).status_code == 200  # balancers need a while


def test_not_ready_before_the_model():
    from model_api import create_app
    from serving.settings import Settings

    empty = create_app(Settings())
    for name, status in (("startup", 503), ("ready", 503), ("live", 200)):
        assert get(empty, f"/health/{name}").status_code == status
    answer = post(empty, CHAT, question())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
    assert answer.headers["retry-after"]


def test_work_without_progress_is_told(api):
    impatient = app(stall_seconds=0)
    assert get(impatient, "/health/progress").status_code == 200  # idle is no stall

    async def work():
        async with client(impatient) as http:
            running = asyncio.create_task(http.post(CHAT, json=question(**ENDLESS)))
            while not active():
                await asyncio.sleep(0.01)
            answer = await http.get("/health/progress")
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            return answer

    assert run(work).status_code == 503
    until(lambda: not active())


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_run_nothing_from_elsewhere(api, path):
    answer = get(api, path)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert " on" + 'click="' not in answer.text
    assert 'style="' not in answer.text


def test_metrics_tell_what_happened(api):
    other = app()
    post(other, CHAT, question())
    post(other, CHAT, question(max_token=1))
    text = get(other, "/metrics").text
    assert f'gen_ai_server_tokens_total{{gen_ai_request_model="{NAME}"' in text
    assert 'http_response_status_code="422",http_route="/v1/chat/completions"' in text
    assert "engine_rows 8.0" in text
    assert "gen_ai_server_time_to_first_token_seconds_count" in text


# ## Refusals


def refused(api, body, path=CHAT, **headers) -> tuple[int, dict]:
    """Status and error of a refusal, whose envelope is checked."""
    answer = post(api, path, body, **headers)
    error = answer.json()["error"]
    assert {"message", "type", "param", "code", "request_id"} == error.keys()
    assert error["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, error


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b'{"model": "\xff"}', 400, "invalid_json"),
        (b'{"temperature": NaN}', 400, "invalid_json"),
        (b"[" * 50_000, 400, "invalid_json"),
        (b'{"n": 1, "n": 2}', 400, "invalid_json"),
        (b"[]", 422, "invalid_value"),
        (b"", 422, "invalid_value"),
        (b"x" * 2_000_000, 413, "body_too_large"),
        (question(max_token=1), 422, "invalid_value"),
        (question(model="gpt-4"), 404, "model_not_found"),
        (question(max_tokens=5000), 400, "context_length_exceeded"),
        (question(n=16, stop=["x"] * 10_000), 422, "invalid_value"),
        (question(logit_bias={"9999999": 1}), 400, "invalid_value"),
    ],
)
def test_every_refusal_has_the_envelope(api, body, status, code):
    found, error = refused(api, body)
    assert (found, error["code"]) == (status, code)
    assert len(error["message"]) < 400


@pytest.mark.parametrize("size", [3_000, 900_000])
def test_a_giant_prompt_is_refused_quickly(api, size):
    status, error = refused(api, question(messages=[chat_turn("word " * size)]))
    assert (status, error["code"]) in (
        (400, "context_length_exceeded"),
        (413, "body_too_large"),
    )


def chat_turn(text: str) -> dict:
    return {"role": "user", "content": text}


def test_unknown_paths_and_methods_have_it_too(api):
    missing = get(api, "/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = get(api, CHAT)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["code"] == "method_not_allowed"


def test_a_body_without_its_type_is_told(api):
    answer = post(api, CHAT, b"{}", **{"content-type": "text/plain"})
    assert answer.status_code == 422
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


BOMBS = [
    {"type": "string", "pattern": "^(a{1000}){1000}$"},
    {"$ref": "#"},
    {"allOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"$ref": "#/$defs/x"}}},
    {"enum": [str(number) for number in range(20_000)]},
    {"type": "object", "properties": {"a": {"$ref": "https://example.org/x"}}},
]


@pytest.mark.parametrize("schema", BOMBS)
def test_a_poisoned_schema_is_refused(api, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, error = refused(api, question(response_format=form))
    assert (status, error["code"]) == (400, "unsupported_schema")


def test_neighbours_of_refused_requests_notice_nothing(api):
    body = question(max_tokens=40)
    alone = post(api, CHAT, body).json()["choices"][0]["message"]["content"]

    async def work():
        async with client(api) as http:
            good = asyncio.create_task(http.post(CHAT, json=body))
            form = {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": BOMBS[0]},
            }
            bad = [
                http.post(CHAT, json=question(response_format=form)),
                http.post(CHAT, content=b"[" * 100_000),
                http.post(CHAT, json=question(messages=[chat_turn("x " * 9_000)])),
            ]
            statuses = [answer.status_code for answer in await asyncio.gather(*bad)]
            return statuses, (await good).json()

    statuses, answer = run(work)
    assert all(400 <= status < 500 for status in statuses)
    assert answer["choices"][0]["message"]["content"] == alone


def test_an_answer_that_takes_too_long_is_ended():
    slow = app(request_timeout_s=0.2)
    body = question(max_tokens=900, logit_bias={"2": -100, "0": -100})
    status, error = refused(slow, body)
    assert (status, error["code"]) == (504, "timeout")
    lines = post(slow, CHAT, {**body, "stream": True}).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert not active()


# ## Keys and budgets


def test_without_a_key_nothing_is_read(keyed):
    for headers in ({}, {"authorization": "Bearer nothing-like-a-key"}):
        answer = post(keyed, CHAT, b"{", **headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert post(keyed, CHAT, question(), authorization=KEY).status_code == 401
    assert post(keyed, CHAT, question(), **BEARER).status_code == 200


def test_scopes_open_what_they_say(keyed):
    admin = {"authorization": f"Bearer {ADMIN_KEY}"}
    assert get(keyed, "/metrics", **admin).status_code == 200
    assert get(keyed, "/metrics", **BEARER).status_code == 403
    assert post(keyed, CHAT, question(), **admin).status_code == 403
    assert get(keyed, "/v1/models", **BEARER).status_code == 200


def test_without_keys_strangers_see_no_metrics(api):
    async def work():
        stranger = httpx.ASGITransport(api, client=("10.0.0.9", 5))
        async with httpx.AsyncClient(transport=stranger, base_url="http://api") as http:
            return (await http.get("/metrics")).status_code

    assert run(work) == 403
    assert get(api, "/metrics").status_code == 200


@pytest.fixture
def one_minute(monkeypatch):
    """The wall clock stands still: no minute ends in the middle of the test."""
    monkeypatch.setattr(time, "time", lambda: 1_800_000_001.0)


@pytest.mark.usefixtures("one_minute")
def test_fifty_at_once_stay_within_the_token_budget():
    limit = 1500
    other = app(api_keys=KEYS, tokens_per_minute=limit, ttft_target_ms=600_000)

    async def work():
        async with client(other, headers=BEARER) as http:
            calls = [http.post(CHAT, json=question(max_tokens=50)) for _ in range(50)]
            return await asyncio.gather(*calls)

    answers = run(work)
    good = [answer for answer in answers if answer.status_code == 200]
    bad = [answer for answer in answers if answer.status_code == 429]
    assert len(good) + len(bad) == 50
    assert good
    assert bad
    spent = sum(answer.json()["usage"]["total_tokens"] for answer in good)
    assert spent <= limit
    for answer in bad:
        assert answer.headers["x-should-retry"] == "false"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "tokens_per_minute"
    left = int(get_budget(other)["x-ratelimit-remaining-tokens"])
    assert left == limit - spent


def get_budget(other) -> httpx.Headers:
    """The headers of an inference answer that costs nothing: a refusal."""
    return post(other, CHAT, b"{", **BEARER).headers


@pytest.mark.usefixtures("one_minute")
def test_refusals_cost_nothing():
    other = app(api_keys=KEYS, tokens_per_minute=1000)
    before = get_budget(other)
    for body in (
        b"{",
        question(max_token=1),
        question(model="x"),
        question(n=16, max_tokens=200),
    ):
        assert post(other, CHAT, body, **BEARER).status_code >= 400
    after = get_budget(other)
    for kind in ("requests", "tokens"):
        assert after[f"x-ratelimit-limit-{kind}"]
        name = f"x-ratelimit-remaining-{kind}"
        assert after[name] == before[name]


def test_an_overloaded_server_refuses_before_it_works(api):
    strict = app(ttft_target_ms=1)  # on the same model, for which others wait

    async def work():
        async with client(api) as patient, client(strict) as http:
            body = question(**ENDLESS)
            crowd = [
                asyncio.create_task(patient.post(CHAT, json=body)) for _ in "x" * 12
            ]
            while active() < 12:
                await asyncio.sleep(0.01)
            refusal = await http.post(CHAT, json=question())
            assert active() == 12  # it took neither a row nor a place in the queue
            for call in crowd:
                call.cancel()
            await asyncio.gather(*crowd, return_exceptions=True)
            return refusal

    refusal = run(work)
    assert refusal.status_code == 503
    assert refusal.json()["error"]["code"] == "overloaded"
    assert int(refusal.headers["retry-after"]) >= 1
    until(lambda: not active())


# ## Idempotency


@pytest.mark.parametrize("stream", [False, True])
def test_the_same_key_and_body_replay_byte_for_byte(keyed, stream):
    headers = {**BEARER, "idempotency-key": f"order-{stream}"}
    body = question(temperature=1.0, stream=stream)
    first = post(keyed, CHAT, body, **headers)
    answers = ended()
    for _ in range(3):
        again = post(keyed, CHAT, body, **headers)
        assert again.content == first.content
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["content-type"] == first.headers["content-type"]
    assert ended() == answers
    status, error = refused(keyed, question(seed=1), **headers)
    assert (status, error["code"]) == (422, "idempotency_key_reused")
    other = {
        "authorization": f"Bearer {OTHER_KEY}",
        "idempotency-key": f"order-{stream}",
    }
    assert "idempotent-replayed" not in post(keyed, CHAT, question(), **other).headers


def test_the_same_key_in_flight_conflicts(api):
    async def work():
        headers = {"idempotency-key": "twice"}
        async with client(api, headers=headers) as http:
            calls = [http.post(CHAT, json=question(max_tokens=40)) for _ in range(2)]
            return sorted(answer.status_code for answer in await asyncio.gather(*calls))

    assert run(work) == [200, 409]


def test_a_refused_request_may_be_tried_again(api):
    headers = {"idempotency-key": "again"}
    assert post(api, CHAT, question(model="x"), **headers).status_code == 404
    assert post(api, CHAT, question(), **headers).status_code == 200


# ## Clients that leave, or stop reading


@pytest.fixture(scope="module")
def address():
    with served(app(ttft_target_ms=PATIENT_MS, send_timeout_s=1)) as url:
        yield url


def connect(url: str, body: dict) -> socket.socket:
    """Send a request over a bare socket that holds little of an answer not read."""
    host, port = url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(raw)}\r\n\r\n"
    )
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.connect((host, int(port)))
    wire.sendall(head.encode() + raw)
    return wire


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_row(address, stream):
    cancelled = ended("cancelled")
    wire = connect(address, question(**ENDLESS, stream=stream))
    until(lambda: model().engine.snapshot().active == 1)
    if stream:
        assert b"200 OK" in wire.recv(100)
    steps = model().engine.snapshot().steps
    wire.close()
    until(lambda: not active())
    assert ended("cancelled") == cancelled + 1
    assert model().engine.snapshot().steps - steps < 200


def test_who_leaves_the_queue_frees_the_place(address):
    body = question(**ENDLESS, stream=True)
    cancelled = ended("cancelled")
    crowd = [connect(address, body) for _ in range(8)]
    until(lambda: model().engine.snapshot().active == 8)
    waiting = connect(address, body)
    until(lambda: model().engine.snapshot().queued == 1)
    waiting.close()
    until(lambda: model().engine.snapshot().queued == 0)
    assert model().engine.snapshot().active == 8
    assert ended("cancelled") == cancelled + 1
    for wire in crowd:
        wire.close()
    until(lambda: not active())


def test_who_leaves_in_prefill_frees_the_row(address):
    text = " ".join(str(number) for number in range(200))
    cancelled = ended("cancelled")
    asked = {**ENDLESS, "max_tokens": 300, "messages": [chat_turn(text)]}
    wire = connect(address, question(**asked))
    until(active)
    wire.close()
    until(lambda: not active())
    assert ended("cancelled") == cancelled + 1


def test_who_stops_reading_disturbs_nobody(address):
    cancelled = ended("cancelled")
    body = question(**ENDLESS, stream=True, logprobs=True, top_logprobs=20)
    stuck = [connect(address, body) for _ in range(3)]
    until(lambda: model().engine.snapshot().active == 3)
    answer = httpx.post(address + CHAT, json=question(), timeout=60, trust_env=False)
    assert answer.status_code == 200
    until(lambda: not active())  # long before their 900 tokens, and nobody hung up
    assert ended("cancelled") == cancelled + 3
    for wire in stuck:
        wire.close()


def test_neighbours_of_leavers_say_the_same(address):
    body = question(max_tokens=60)

    def said() -> str:
        answer = httpx.post(address + CHAT, json=body, timeout=60, trust_env=False)
        return answer.json()["choices"][0]["message"]["content"]

    alone = said()
    leavers = [connect(address, question(**ENDLESS, stream=True)) for _ in range(4)]
    until(lambda: model().engine.snapshot().active == 4)
    leavers[0].close()
    leavers[1].close()
    assert said() == alone
    for wire in leavers[2:]:
        wire.close()
    until(lambda: not active())


# ## The server as a process


def test_sigterm_under_load_breaks_no_stream():
    port = process.free_port()
    argv = [sys.executable, str(ROOT / "model_api.py"), "--serve", "--port", str(port)]
    env = {"DRAIN_SECONDS": "2", "ROWS": "4", "CONTEXT": "512"}
    env["TTFT_TARGET_MS"] = str(PATIENT_MS)
    url = f"http://127.0.0.1:{port}"
    with process.child(argv, env=env) as server:
        process.wait_until(lambda: process.answers(f"{url}/health/ready"), 60, "ready")
        body = question(max_tokens=150, stream=True)
        wires = [connect(url, body) for _ in range(6)]
        assert b"200 OK" in wires[0].recv(50)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not process.answers(f"{url}/health/ready"))
        late = httpx.post(url + CHAT, json=question(), timeout=60, trust_env=False)
        assert late.status_code == 200  # still serving in the drain delay
        for wire in wires:
            wire.settimeout(60)
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                chunk = wire.recv(65536)
                assert chunk, "the stream was cut"
                received += chunk
            assert b"data: [DONE]" in received
            wire.close()
        until(lambda: not server.alive)


def test_without_a_model_the_server_says_why_and_ends(tmp_path):
    (tmp_path / "file").write_text("in the way of a folder")
    argv = [sys.executable, str(ROOT / "model_api.py"), "--serve", "--port", "0"]
    env = {"MODEL_DIR": str(tmp_path / "file")}
    with process.child(argv, env=env) as server:
        until(lambda: not server.alive)
        assert server.process.returncode == 1
        assert "The model did not load" in server.output()
