"""The API's parts that need no model: keys, limits, ledger, JSON, layers, batcher."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from pydantic import ValidationError
from starlette.exceptions import HTTPException

import model_api
from serving import protocol, settings
from serving.asgi import Edge
from serving.errors import ApiError, failed_answer
from serving.idempotency import Ledger
from serving.limits import WINDOW_S, Budgets, OverBudget, Window
from serving.wire import ClientLeft, Wire
from tests.api_fixtures import run

# ## Settings and keys


def test_a_key_is_kept_as_a_digest_with_its_scopes():
    config = settings.load(api_keys="a" * 16 + "," + "b" * 20 + ":inference+admin, ")
    first, second = config.keys()
    assert first.scopes == {"inference"}
    assert second.scopes == {"inference", "admin"}
    assert len(first.digest) == 32
    assert "a" * 16 not in repr(config)


def test_keys_come_from_a_file_too(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# who: the web shop\n" + "c" * 16 + ":admin\n\n")
    (key,) = settings.load(api_keys_file=file).keys()
    assert key.scopes == {"admin"}


@pytest.mark.parametrize(
    ("entry", "telling"),
    [("short", "at least 16"), ("a" * 16 + ":root", "inference or admin")],
)
def test_a_bad_key_is_refused_without_being_shown(entry, telling):
    with pytest.raises(settings.ConfigurationError, match=telling) as raised:
        settings.load(api_keys=entry).keys()
    assert "a" * 16 not in str(raised.value)


def test_an_unreadable_key_file_says_so(tmp_path):
    config = settings.load(api_keys_file=tmp_path / "none")
    with pytest.raises(settings.ConfigurationError, match="API_KEYS_FILE"):
        config.keys()


def test_wrong_values_are_named(monkeypatch):
    monkeypatch.setenv("ROWS", "many")
    monkeypatch.setenv("DRAIN_SECONDS", "-1")
    with pytest.raises(settings.ConfigurationError) as raised:
        settings.load()
    assert "ROWS='many'" in str(raised.value)
    assert "DRAIN_SECONDS='-1'" in str(raised.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.8"])
def test_loopback_is_served_without_keys(host):
    settings.Settings().check_exposure(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_other_addresses_need_keys_or_a_word(host):
    with pytest.raises(settings.ConfigurationError, match="ALLOW_ANONYMOUS=1"):
        settings.Settings().check_exposure(host)
    settings.Settings(allow_anonymous=True).check_exposure(host)
    settings.Settings(api_keys="k" * 16).check_exposure(host)


def test_the_drain_delay_is_for_balancers():
    assert settings.Settings().drain_s("127.0.0.1") == 0
    assert settings.Settings().drain_s("0.0.0.0") == 5
    assert settings.Settings(drain_seconds=1).drain_s("127.0.0.1") == 1


def test_serving_everyone_by_accident_is_refused(capsys):
    assert model_api.main(["--serve", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "ALLOW_ANONYMOUS=1" in capsys.readouterr().err


# ## Budgets


@pytest.fixture(autouse=True)
def one_minute(monkeypatch):
    """The wall clock stands still: no minute ends in the middle of a test."""
    monkeypatch.setattr(time, "time", lambda: 1_800_000_001.0)


def budgets(requests: int, tokens: int) -> Budgets:
    return Budgets(requests, tokens, "async+memory://")


def test_fifty_at_once_never_exceed_a_token_budget():
    async def work():
        shared = budgets(1000, 1000)
        inside, most = 0, 0

        async def one():
            nonlocal inside, most
            reservation = await shared.reserve("t", 90)
            inside += 90
            most = max(most, inside)
            await asyncio.sleep(0.01)
            reservation.used = 90
            await shared.settle(reservation)

        results = await asyncio.gather(
            *(one() for _ in range(50)), return_exceptions=True
        )
        return most, results

    most, results = run(work)
    refused = [r for r in results if isinstance(r, OverBudget)]
    assert most == 990
    assert len(refused) == 39
    assert all(
        r.kind == "tokens" and 0 < r.retry_after_s <= 2 * WINDOW_S for r in refused
    )


def test_a_refusal_costs_nothing_and_settling_gives_the_rest_back():
    async def work():
        shared = budgets(10, 1000)
        reservation = await shared.reserve("t", 900)
        with pytest.raises(OverBudget):
            await shared.reserve("t", 200)
        held = await shared.headers("t")
        reservation.used = 100
        await shared.settle(reservation)
        return held, await shared.headers("t")

    held, settled = run(work)
    assert held["x-ratelimit-remaining-requests"] == "9"
    assert held["x-ratelimit-remaining-tokens"] == "100"
    assert settled["x-ratelimit-remaining-tokens"] == "900"
    assert settled["x-ratelimit-reset-tokens"].endswith("s")


def test_callers_do_not_share_a_budget():
    async def work():
        shared = budgets(1, 100)
        await shared.reserve("a", 100)
        await shared.reserve("b", 100)
        with pytest.raises(OverBudget) as raised:
            await shared.reserve("a", 1)
        return raised.value

    assert run(work).kind == "requests"


def test_what_never_fits_has_no_retry_after():
    async def work():
        with pytest.raises(OverBudget) as raised:
            await budgets(10, 100).reserve("t", 101)
        return raised.value

    assert run(work).retry_after_s is None


def test_no_limit_has_no_headers():
    async def work():
        free = budgets(0, 0)
        await free.settle(await free.reserve("t", 10**9))
        return await free.headers("t")

    assert run(work) == {}


def test_a_refund_after_its_window_leaves_no_credit(monkeypatch):
    now = 60_000_000.0  # a window's beginning
    monkeypatch.setattr(time, "time", lambda: now)

    async def work():
        nonlocal now
        shared = budgets(0, 1000)
        reservation = await shared.reserve("t", 900)
        now += WINDOW_S + 1
        await shared.settle(reservation)
        now += WINDOW_S
        return await shared.headers("t")

    assert run(work)["x-ratelimit-remaining-tokens"] == "1000"


@pytest.mark.parametrize(
    ("window", "cost", "wait_s"),
    [
        (Window(100, 30.0, 40, 90.0), 20, 6.0),  # 100*t/60 <= 40 at t = 24
        (Window(0, 0.0, 100, 90.0), 40, 54.0),  # in the next window: 100*t/60 <= 60
        (Window(0, 0.0, 100, 90.0), 100, 90.0),  # all of it must fade
    ],
)
def test_the_wait_is_when_the_cost_fits(window, cost, wait_s):
    assert window.wait_s(cost, 100) == pytest.approx(wait_s)


@pytest.mark.parametrize("uri", ["memory://", "async+nothing://", "x"])
def test_a_storage_that_cannot_work_is_named(uri):
    with pytest.raises(settings.ConfigurationError, match="LIMITS_STORAGE"):
        Budgets(1, 1, uri)


# ## Idempotency


def finish(ledger, entry, chunk=b"answer"):
    entry.chunks.append(chunk)
    ledger.finish(entry)


def test_the_same_again_replays_and_others_conflict():
    ledger = Ledger(ttl_s=60, max_bytes=1000)
    entry = ledger.begin("t", "k", "/p", b"body")
    with pytest.raises(ApiError, match="still runs"):
        ledger.begin("t", "k", "/p", b"body")
    with pytest.raises(ApiError, match="another body"):
        ledger.begin("t", "k", "/p", b"other")
    assert ledger.begin("another tenant", "k", "/p", b"other") is not entry
    finish(ledger, entry)
    assert ledger.begin("t", "k", "/p", b"body") is entry
    with pytest.raises(ApiError, match="another body"):
        ledger.begin("t", "k", "/elsewhere", b"body")


def test_abandoned_work_may_be_tried_again():
    ledger = Ledger(ttl_s=60, max_bytes=1000)
    entry = ledger.begin("t", "k", "/p", b"body")
    ledger.abandon(entry)
    assert ledger.begin("t", "k", "/p", b"another") is not entry


def test_memory_and_time_are_bounded():
    ledger = Ledger(ttl_s=60, max_bytes=100)
    running = ledger.begin("t", "running", "/p", b"")
    for number in range(50):
        finish(ledger, ledger.begin("t", str(number), "/p", b""), b"x" * 30)
    assert ledger.bytes <= 100
    assert len(ledger) <= 4
    with pytest.raises(ApiError):
        ledger.begin("t", "running", "/p", b"")
    short = Ledger(ttl_s=0, max_bytes=100)
    finish(short, short.begin("t", "k", "/p", b"1"))
    assert not short.begin("t", "k", "/p", b"2").done
    ledger.abandon(running)


# ## JSON and validation


@pytest.mark.parametrize(
    ("body", "telling"),
    [
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "64-bit"),
        (b"9" * 5000, "64 bits"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": {"b": 1, "b": 2}}', "twice"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'["\\ud800"]', "surrogate"),
        (b"[" * 100_000, "deeper"),
        (b"[" * 500 + b"]" * 500, "deeper"),
        (json.dumps({str(i): i for i in range(2000)}).encode(), "fields"),
    ],
)
def test_strict_json_says_what_is_wrong(body, telling):
    with pytest.raises(protocol.BadJson, match=telling):
        protocol.read_json(body)


def test_strict_json_reads_what_is_right():
    text = '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00", "[[[[{{"], "é": {}}'
    assert protocol.read_json(text.encode()) == json.loads(text)


def refusal(kind, body):
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(body)
    found = raised.value.errors()
    return protocol.explain([{**e, "loc": ("body", *e["loc"])} for e in found])


MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("fields", "param", "telling"),
    [
        ({"max_token": 3}, "max_token", "unknown field"),
        ({"n": "3"}, "n", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"stop": ["a"] * 10_000}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages.0", "expected content"),
        ({"messages": [{"role": "cat", "content": ""}]}, "messages.0.role", "'user'"),
        ({"stream_options": {}}, None, "needs stream=true"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, None, "differ"),
        ({"top_logprobs": 2}, None, "needs logprobs=true"),
        ({"tool_choice": "required"}, None, "needs tools"),
        ({"response_format": {"type": "xml"}}, "response_format", "'json_object'"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"store": True}, "store", "False"),
        ({"seed": 2**63}, "seed", "less than"),
    ],
)
def test_a_wrong_field_is_named(fields, param, telling):
    body = {"model": "m", "messages": MESSAGES, **fields}
    message, found = refusal(protocol.ChatRequest, body)
    assert found == param
    assert telling in message


@pytest.mark.parametrize(
    "prompt", [[], "", [[]], [1, "a"], [-1], [1.0], {}, None, [["a"]], [True]]
)
def test_odd_prompts_are_refused_or_empty(prompt):
    body = {"model": "m", "prompt": prompt}
    if prompt == "":  # a string like any other here; it has no tokens, see the plan
        assert protocol.CompletionRequest.model_validate(body).prompts == [""]
    else:
        assert refusal(protocol.CompletionRequest, body)[1].startswith("prompt")


def test_huge_wrong_lists_are_refused_at_the_first_item():
    body = {"model": "m", "prompt": [1.5] * 200_000}
    with pytest.raises(ValidationError) as raised:
        protocol.CompletionRequest.model_validate(body)
    assert raised.value.error_count() < 10


def test_prompts_are_one_or_many():
    def prompts(prompt):
        body = {"model": "m", "prompt": prompt}
        return protocol.CompletionRequest.model_validate(body).prompts

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1], [2, 3]]) == [[1], [2, 3]]


# ## The outermost layer


async def exchange(app, chunks, headers=(), pause_s=0.0, **options):
    """Send a body in chunks through an Edge around `app`; what came back."""
    seen, sent = [], []
    bounds = {"max_body_bytes": 100, "body_timeout_s": 0.05, **options}
    edge = Edge(app, on_finish=lambda *row: seen.append(row), **bounds)
    left = list(chunks)

    async def receive():
        await asyncio.sleep(pause_s)
        chunk = left.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "headers": list(headers)}
    await edge(scope, receive, send)
    return sent, seen, scope


async def reading(scope, receive, send):
    try:
        while (await receive()).get("more_body"):
            pass
        status = 200
    except HTTPException as error:
        status = error.status_code
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    ("chunks", "headers", "pause_s", "status"),
    [
        ([b"x" * 100], [], 0, 200),
        ([b"x" * 60, b"x" * 60, b"x"], [], 0, 413),
        ([b"x"], [(b"content-length", b"101")], 0, 413),
        ([b"x"], [], 0.2, 408),
    ],
)
def test_the_body_is_bounded_in_size_and_time(chunks, headers, pause_s, status):
    sent, seen, _ = run(lambda: exchange(reading, chunks, headers, pause_s))
    told = dict(sent[0]["headers"])
    assert sent[0]["status"] == status
    assert seen[0][2] == status
    if status != 200:
        assert told[b"connection"] == b"close"


@pytest.mark.parametrize(
    ("given", "kept"),
    [(b"my-id.1", True), (b"bad id", False), (b"x" * 200, False), (b"", False)],
)
def test_a_sane_request_id_is_kept(given, kept):
    headers = [(b"x-request-id", given)]
    sent, _, scope = run(lambda: exchange(reading, [b""], headers))
    told = dict(sent[0]["headers"])[b"x-request-id"]
    assert (told == given) is kept
    assert scope["state"]["request_id"] == told.decode()


def test_a_crash_becomes_the_envelope(caplog):
    async def crash(scope, receive, send):
        raise RuntimeError("a secret detail")

    sent, seen, _ = run(lambda: exchange(crash, [b""]))
    error = json.loads(sent[1]["body"])["error"]
    assert (sent[0]["status"], seen[0][2]) == (500, 500)
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]
    assert "a secret detail" in caplog.text


# ## Racing the disconnect, and the batcher


def test_work_ends_when_the_client_hangs_up():
    ended = []

    async def long_work():
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(True)
        return True

    async def work():
        async def receive():
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        with pytest.raises(ClientLeft):
            await model_api.unless_client_leaves(receive, long_work())

    run(work)
    assert ended == [True]


def test_work_that_finishes_or_fails_is_passed_on():
    async def work():
        async def receive():
            await asyncio.sleep(30)

        async def fine():
            return True

        async def broken():
            raise LookupError("no")

        assert await model_api.unless_client_leaves(receive, fine())
        with pytest.raises(LookupError):
            await model_api.unless_client_leaves(receive, broken())

    run(work)


def test_a_client_that_stops_reading_loses_its_answer():
    async def work():
        async def send(message):
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # as a full socket would

        wire = Wire(send, 0.05, "id", None)
        with pytest.raises(ClientLeft, match="stopped reading"):
            await wire.piece(b"data: x", {})

    run(work)


def test_a_stream_that_breaks_ends_in_an_error_and_without_done():
    sent = []

    async def work():
        async def send(message):
            sent.append(message)

        wire = Wire(send, 1.0, "id-1", None)
        await wire.piece(b"data: x", {"x-a": "b"})
        await wire.broken(failed_answer("error"))

    run(work)
    start, piece, last = sent
    assert (b"x-a", b"b") in start["headers"]
    assert piece["more_body"]
    assert not last["more_body"]
    event = json.loads(last["body"].removeprefix(b"data: "))
    assert event["error"]["request_id"] == "id-1"
    assert b"[DONE]" not in last["body"]


def test_the_batcher_fills_batches_and_keeps_results_apart():
    async def work():
        sizes = []

        async def double(items):
            sizes.append(len(items))
            await asyncio.sleep(0.01)
            return [ValueError("odd") if item == 3 else 2 * item for item in items]

        batcher = model_api.DynamicBatcher(double, most=4, window_s=0.01)
        serving = asyncio.create_task(batcher.serve())
        calls = [asyncio.create_task(batcher.submit(item)) for item in range(6)]
        calls[1].cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        serving.cancel()
        return sizes, results

    sizes, results = run(work)
    assert sizes[0] == 4
    assert sum(sizes) in (
        5,
        6,
    )  # a caller that left before its batch began may be in it
    assert results[0] == 0
    assert isinstance(results[3], ValueError)
    assert results[4:] == [8, 10]


def test_a_failed_batch_fails_its_callers_only():
    async def work():
        async def fail_once(items):
            if items == [1]:
                raise ConnectionError("down")
            return items

        batcher = model_api.DynamicBatcher(fail_once, most=1, window_s=0)
        serving = asyncio.create_task(batcher.serve())
        with pytest.raises(ConnectionError):
            await batcher.submit(1)
        answer = await batcher.submit(2)
        serving.cancel()
        return answer

    assert run(work) == 2


def test_a_batch_of_too_few_results_is_told_to_its_callers():
    async def work():
        async def forget_one(items):
            return items[1:]

        batcher = model_api.DynamicBatcher(forget_one, most=1, window_s=0)
        serving = asyncio.create_task(batcher.serve())
        for _ in range(2):  # the batcher lives on
            with pytest.raises(ValueError, match="expected a result a call, 1, found"):
                await batcher.submit(1)
        serving.cancel()

    run(work)
