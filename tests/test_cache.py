"""The response cache: right answers only, one computation each, and HTTP around it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_cloud.scaling import cache, semantic
from local_cloud.scaling.cache import Answer, CachedApp, ResponseCache, Rules
from tests import api_fixtures as api

ASKED = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
WHO = {"revision": "r1", "tenant": "t1", "path": "/v1/chat/completions"}


class Clock:
    """Stands still until a test sets it ahead."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Model:
    """Something to ask: counts its calls, and answers when the gate is open."""

    def __init__(self, status: int = 200, body: bytes = b"{}") -> None:
        self.status, self.body, self.calls = status, body, 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> Answer:
        self.calls += 1
        await self.gate.wait()
        return Answer(self.status, self.body)


async def turns(count: int = 5) -> None:
    """Let everything else run that can."""
    for _ in range(count):
        await asyncio.sleep(0)


# The key.


def test_defaults_written_out_or_left_out_are_one_request() -> None:
    spelled = {**ASKED, "temperature": 0, "top_p": 1, "n": 1, "stream": False}
    nulls = {**ASKED, "temperature": None, "presence_penalty": None}
    names = {cache.key(one, **WHO) for one in (ASKED, spelled, nulls)}
    backwards = cache.key(dict(reversed(list(ASKED.items()))), **WHO)
    assert names == {backwards}
    limit = {k: v for k, v in ASKED.items() if k != "max_tokens"}
    assert cache.key(limit, **WHO) == cache.key({**limit, "max_tokens": 256}, **WHO)


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model": st.text(min_size=1, max_size=5),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system"]), "content": st.text()}
        ),
        min_size=1,
        max_size=3,
    ),
    "max_tokens": st.integers(1, 4096),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "n": st.integers(1, 16),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.lists(st.text(min_size=1, max_size=4), max_size=4),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.sampled_from(["1", "22"]), st.floats(-100, 100)),
    "top_logprobs": st.integers(0, 20),
    "tools": st.lists(st.dictionaries(st.text(), st.integers()), max_size=2),
    "user": st.text(),
}
REQUESTS = st.fixed_dictionaries(
    {name: VALUES[name] for name in ("model", "messages", "max_tokens")},
    optional={k: v for k, v in VALUES.items() if k not in ASKED},
)


@given(asked=REQUESTS, data=st.data())
def test_any_field_that_differs_is_another_key(
    asked: dict, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from([*VALUES, *WHO]))
    who, other_who, other = WHO, WHO, asked
    if name in WHO:
        other_who = {**WHO, name: WHO[name] + data.draw(st.text(min_size=1))}
    else:
        other = {**asked, name: data.draw(VALUES[name])}
    if cache.filled(asked) == cache.filled(other) and who == other_who:
        return  # drawn alike, or the default written out
    assert cache.key(asked, **who) != cache.key(other, **other_who)


@given(asked=REQUESTS)
def test_a_mistake_never_shares_the_key_of_what_is_right(asked: dict) -> None:
    """Or the one's refusal would be the other's answer."""
    name = cache.key(asked, **WHO)
    for wrong in (
        {**asked, "unknown": None},
        {**asked, "temperature": True},
        {**asked, "n": float(asked.get("n", 1))},
        {**asked, "max_completion_tokens": asked["max_tokens"] + 1},
    ):
        assert cache.key(wrong, **WHO) != name
    only = {k: v for k, v in asked.items() if k != "max_tokens"}
    only["max_completion_tokens"] = 8
    both = {**only, "max_tokens": 256}  # refused: they differ
    assert cache.key(only, **WHO) != cache.key(both, **WHO)


def test_the_order_of_a_schemas_fields_counts() -> None:
    def asked(*names: str) -> dict[str, Any]:
        return {**ASKED, "tools": [{name: {} for name in names}]}

    assert cache.key(asked("a", "b"), **WHO) != cache.key(asked("b", "a"), **WHO)


@pytest.mark.parametrize(
    "body",
    [b'{"n":1,"n":2}', b"[1]", b"{", b"\xff", b'{"a":NaN}', b"[" * 99_999, b""],
    ids=["twins", "list", "broken", "bytes", "nan", "deep", "empty"],
)
def test_what_two_readers_may_read_differently_has_no_key(body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's errors are of this class
        cache.read(body)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, True),
        ({"temperature": 0}, True),
        ({"temperature": 0.7}, False),
        ({"temperature": 0.7, "seed": 0}, True),
        ({"temperature": 0.7, "seed": None}, False),
    ],
)
def test_only_what_would_be_answered_alike_is_kept(fields: dict, kept: bool) -> None:
    assert cache.is_deterministic({**ASKED, **fields}) is kept


# One computation for all.


def test_a_hundred_at_once_are_one_call() -> None:
    async def work() -> None:
        store, model = ResponseCache(), Model()
        model.gate.clear()
        asked = [asyncio.create_task(store.get("k", model)) for _ in range(100)]
        await turns()
        model.gate.set()
        found = await asyncio.gather(*asked)
        assert model.calls == 1
        assert {one.answer.body for one in found} == {b"{}"}
        assert store.counts["shared"] == 99
        assert (await store.get("k", model)).state == "hit"

    api.run(work)


def test_who_leaves_first_takes_nobody_along() -> None:
    async def work() -> None:
        store, model = ResponseCache(), Model()
        model.gate.clear()
        leader = asyncio.create_task(store.get("k", model))
        await turns()
        followers = [asyncio.create_task(store.get("k", model)) for _ in range(9)]
        await turns()
        leader.cancel()
        await turns()
        model.gate.set()
        assert {one.answer.status for one in await asyncio.gather(*followers)} == {200}
        assert model.calls == 1
        assert leader.cancelled()

    api.run(work)


def test_the_last_to_leave_ends_the_work() -> None:
    async def work() -> None:
        store, model = ResponseCache(), Model()
        model.gate.clear()
        asked = [asyncio.create_task(store.get("k", model)) for _ in range(3)]
        await turns()
        for one in asked:
            one.cancel()
        newcomer = asyncio.create_task(store.get("k", model))  # must not join the dying
        await turns()
        model.gate.set()
        assert (await newcomer).answer.status == 200
        assert model.calls == 2

    api.run(work)


def test_a_failure_reaches_all_and_is_not_kept() -> None:
    async def work() -> None:
        store, calls = ResponseCache(), 0

        async def fail() -> Answer:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0)
            raise ConnectionError("gone")

        for _ in range(2):
            asked = [store.get("k", fail) for _ in range(3)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(one, ConnectionError) for one in found)
        assert (calls, store.counts["failed"]) == (2, 2)

    api.run(work)


# How long, and how many.


def test_stale_answers_serve_while_one_renewal_runs() -> None:
    async def work() -> None:
        clock = Clock()
        rules = Rules(ttl_s=10, jitter=0, stale_s=5)
        store, model = ResponseCache(rules, clock=clock), Model()
        await store.get("k", model)
        clock.now += 11
        model.body = b"new"
        model.gate.clear()
        found = [await store.get("k", model) for _ in range(20)]
        assert {(one.state, one.age_s, one.answer.body) for one in found} == {
            ("stale", 11, b"{}")
        }
        await turns()
        assert model.calls == 2
        model.gate.set()
        await turns()
        fresh = await store.get("k", model)
        assert (fresh.state, fresh.answer.body) == ("hit", b"new")
        clock.now += 15
        assert (await store.get("k", model)).state == "miss"

    api.run(work)


@pytest.mark.parametrize(("status", "then"), [(503, "stale"), (401, "miss")])
def test_stale_answers_outlive_a_broken_server_not_a_lost_right(
    status: int, then: str
) -> None:
    async def work() -> None:
        clock = Clock()
        store = ResponseCache(Rules(ttl_s=10, jitter=0, stale_s=9), clock=clock)
        model = Model()
        await store.get("k", model)
        clock.now += 11
        model.status = status
        await store.get("k", model)
        await turns()
        assert (await store.get("k", model)).state == then
        await store.close()

    api.run(work)


@pytest.mark.parametrize(
    ("status", "kept"),
    [(400, True), (404, True), (422, True), (401, False), (429, False), (500, False)],
)
def test_only_refusals_that_last_are_kept_and_only_for_a_moment(
    status: int, kept: bool
) -> None:
    async def work() -> None:
        clock = Clock()
        store, model = ResponseCache(Rules(negative_s=5), clock=clock), Model(status)
        await store.get("k", model)
        assert (await store.get("k", model)).state == ("hit" if kept else "miss")
        clock.now += 5
        assert (await store.get("k", model)).state == "miss"

    api.run(work)


def test_what_came_together_does_not_end_together() -> None:
    async def work() -> None:
        clock = Clock()
        rules = Rules(ttl_s=100, jitter=0.1, stale_s=0)
        store, model = ResponseCache(rules, clock=clock, seed=1), Model()
        for name in range(50):
            await store.get(str(name), model)
        clock.now += 89.9
        assert len(store._entries) == 50
        states = []
        clock.now += 10.1
        for name in range(50):
            states.append((await store.get(str(name), model)).state)
        assert 10 < states.count("hit") < 40

    api.run(work)


def test_memory_is_bounded_and_the_least_used_go_first() -> None:
    async def work() -> None:
        size = 1000 + cache.ENTRY_BYTES
        store, model = ResponseCache(Rules(max_bytes=3 * size)), Model(body=b"x" * 1000)
        for name in "abcacd":  # b was used least recently when d comes
            await store.get(name, model)
        assert (store.bytes, store.counts["evicted"]) == (3 * size, 1)
        before = model.calls
        for name in "acd":
            assert (await store.get(name, model)).state == "hit"
        assert model.calls == before
        await store.get("huge", Model(body=b"x" * 4 * size))
        assert store.bytes == 3 * size

    api.run(work)


def test_impossible_rules_are_refused() -> None:
    wrongs: list[dict[str, int]] = [{"ttl_s": -1}, {"jitter": 1}, {"max_bytes": -1}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="Rules: expected"):
            Rules(**wrong)


# In front of the real API, with the real model.


Client = Callable[..., Awaitable[httpx.Response]]


@asynccontextmanager
async def cached(store: ResponseCache | None = None, **options: Any):
    """The API behind a cache: a function that posts a question, and the cache."""
    store = store or ResponseCache()
    app = CachedApp(api.app(**options), store, revision=api.model().revision)

    async with api.client(app) as http:  # type: ignore[arg-type]

        async def ask(headers: dict[str, str] | None = None, **fields: Any):
            return await http.post(
                api.CHAT, json=api.question(**fields), headers=headers
            )

        yield ask, store
    await store.close()


def test_a_hundred_identical_requests_are_one_answer_of_the_model() -> None:
    async def work() -> None:
        async with cached() as (ask, _):
            before = sum(api.model().engine.snapshot().finished.values())
            told = await asyncio.gather(*(ask() for _ in range(100)))
            assert {one.status_code for one in told} == {200}
            assert len({one.content for one in told}) == 1
            assert sum(api.model().engine.snapshot().finished.values()) == before + 1
            again = await ask(temperature=0.0)
            assert again.headers["x-cache"] == "hit"
            assert again.content == told[0].content
            assert int(again.headers["age"]) >= 0

    api.run(work)


def test_who_has_the_answer_gets_304_and_no_body() -> None:
    async def work() -> None:
        async with cached() as (ask, _):
            first = await ask()
            tag = first.headers["etag"]
            assert first.headers["x-cache"] == "miss"
            for known in (tag, f'"other", W/{tag}', "*"):
                again = await ask({"if-none-match": known})
                assert (again.status_code, again.content) == (304, b"")
                assert again.headers["etag"] == tag
            assert (await ask({"if-none-match": '"other"'})).status_code == 200

    api.run(work)


def test_tenants_and_sampling_are_kept_apart_and_keys_are_asked_for() -> None:
    async def work() -> None:
        async with cached(api_keys=api.KEYS) as (ask, _):
            mine, yours = api.BEARER, {"authorization": f"Bearer {api.OTHER_KEY}"}
            states = [
                (await ask(who, **fields)).headers["x-cache"]
                for who, fields in (
                    (mine, {}),
                    (yours, {}),
                    (mine, {"seed": 1, "temperature": 0.9}),
                    (mine, {"seed": 2, "temperature": 0.9}),
                    (mine, {"seed": 1, "temperature": 0.9}),
                )
            ]
            assert states == ["miss", "miss", "miss", "miss", "hit"]
            for _ in range(2):
                assert (await ask()).status_code == 401

    api.run(work)


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ({}, {"temperature": 0.9}),
        ({}, {"stream": True}),
        ({"cache-control": "no-store"}, {}),
        ({"idempotency-key": "once"}, {}),
    ],
    ids=["drawn", "stream", "no-store", "idempotency"],
)
def test_what_must_not_be_kept_passes(headers: dict, fields: dict) -> None:
    async def work() -> None:
        async with cached() as (ask, store):
            for _ in range(2):
                told = await ask(headers, **fields)
                assert (told.status_code, told.headers["x-cache"]) == (200, "bypass")
            assert store.bytes == 0

    api.run(work)


def test_a_refusal_is_told_again_without_the_model() -> None:
    async def work() -> None:
        async with cached() as (ask, _):
            first, again = await ask(max_tokens=0), await ask(max_tokens=0)
            assert (first.status_code, first.content) == (
                again.status_code,
                again.content,
            )
            assert (first.status_code, again.headers["x-cache"]) == (422, "hit")

    api.run(work)


def test_bad_bodies_get_the_applications_own_errors() -> None:
    app = CachedApp(api.app(max_body_bytes=2000), ResponseCache(), revision="r")
    for body, status in ((b"{", 400), (b'{"n":1,"n":1}', 400), (b" " * 3000, 413)):
        told = api.post(app, api.CHAT, body)  # type: ignore[arg-type]
        assert (told.status_code, told.headers["x-cache"]) == (status, "bypass")
    assert "x-cache" not in api.get(app, "/health/live").headers  # type: ignore[arg-type]


def test_a_client_that_hangs_up_ends_what_nobody_waits_for() -> None:
    async def work() -> None:
        store, ended = ResponseCache(), asyncio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        messages = [
            {"type": "http.disconnect"},
            {"type": "http.request", "body": json.dumps(ASKED).encode()},
        ]

        async def receive() -> Any:
            await asyncio.sleep(0.01)
            return messages.pop()

        scope = {"type": "http", "method": "POST", "path": api.CHAT}
        scope |= {"headers": [(b"content-type", b"application/json")]}
        sent: list[Any] = []
        app = CachedApp(slow, store, revision="r")
        await app(scope, receive, sent.append)
        async with asyncio.timeout(5):
            await ended.wait()
        assert not sent
        with suppress(asyncio.CancelledError):
            await store.close()

    api.run(work)


# The semantic cache: what is wrong with it.


def test_the_semantic_cache_is_off_and_confuses_opposites_when_on() -> None:
    embed = semantic.embedder(api.model().tokenizer)
    off = semantic.SemanticCache(embed)
    off.put("What is gravity?", "A force.")
    assert off.get("What is gravity?") is None
    rates = {row.threshold: row for row in semantic.trial(embed)}
    assert rates[0.5].right > 0.5
    # No threshold is good: where paraphrases are found, opposites are too.
    assert all(row.false >= row.right for row in rates.values())
    with pytest.raises(ValueError, match="expected a cosine"):
        semantic.SemanticCache(embed, 95)
