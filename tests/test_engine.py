"""The engine: the same answer in any company, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
from models import Sampling, build, grammar
from models.engine import ALONE, CHUNK, SHORTEST_HIT
from models.model import SyncStream
from models.quality import TEXTS, log_softmax, open_graph
from models.runtime import TILE, Runtime, chunk_size, usable_cores
from models.text import Tokenizer
from tests.conftest import idle

Answer = list[tuple[int, float]]  # token ids and their log-probabilities
DEADLINE_S = 60.0  # of every wait: reached by a hang alone
ENDLESS = {"max_tokens": 1900, "logit_bias": ((2, -100), (0, -100))}  # no end token
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def small() -> Iterator[models.Model]:
    """Four rows and no prefix cache: every answer is computed from its beginning."""
    with models.load(rows=4, shelf=0) as model:
        yield model


@pytest.fixture(autouse=True)
def nothing_left(small: models.Model) -> Iterator[None]:
    yield
    assert not idle(small), "an answer was left in the engine"


@cache
def text_ids() -> list[int]:
    """Tokens of ordinary text to cut prompts from."""
    tokenizer = Tokenizer.load(build.ensure().tokenizer)
    return tokenizer.encode((TEXTS / "prose.txt").read_text() * 4)


def cut(length: int, start: int = 0) -> list[int]:
    return text_ids()[start : start + length]


def ask(
    model: models.Model,
    ids: list[int],
    *,
    tenant: str = "",
    deadline_s: float | None = None,
    **sampling,
) -> SyncStream:
    asked = Sampling(**{"logprobs": 0, "max_tokens": 24, **sampling})
    return SyncStream(model.engine, ids, asked, tenant, deadline_s)


def answer(stream: SyncStream) -> Answer:
    return [(token.id, token.logprob) for piece in stream for token in piece.tokens]


def text(stream: SyncStream) -> str:
    return "".join(piece.text for piece in stream)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end, "the awaited condition never came"
        time.sleep(0.001)


# The same answer, bit for bit: token ids and log-probabilities are compared by ==.


class Strangers:
    """Callers who ask at random times for random things, until the block ends."""

    def __init__(self, model: models.Model, count: int) -> None:
        self._model, self._count, self._over = model, count, threading.Event()
        self._begun: set[int] = set()

    def __enter__(self) -> Strangers:
        self._pool = ThreadPoolExecutor(self._count)
        self._callers = [self._pool.submit(self._call, i) for i in range(self._count)]
        until(lambda: len(self._begun) == self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        for caller in self._callers:
            caller.result()

    def _call(self, number: int) -> None:
        choose = random.Random(number)
        while not self._over.is_set():
            stream = self._request(choose)
            leaves_after = choose.choice([1, 5, 1000, 1000])  # pieces
            for place, _ in enumerate(stream):
                self._begun.add(number)
                if place >= leaves_after or self._over.is_set():
                    break

    def _request(self, choose: random.Random) -> SyncStream:
        length = choose.choice([1, 9, 20, 20, 33, 33, 60, 129])
        kind = choose.choice(["greedy", "plain", "warm", "regex", "penalty"])
        return ask(
            self._model,
            cut(length, choose.randrange(500)),
            tenant=f"stranger {choose.randrange(3)}",
            max_tokens=choose.randrange(2, 60),
            temperature=1.2 if kind == "warm" else 0,
            seed=choose.randrange(1000),
            logprobs=None if kind == "plain" else 2,
            grammar=grammar.regex("[a-z ]{5,80}") if kind == "regex" else None,
            presence_penalty=0.7 if kind == "penalty" else 0,
        )


SUBJECTS = (cut(9), cut(40, 100), cut(129, 200), cut(257, 300))


@pytest.fixture(scope="module")
def single() -> Iterator[models.Model]:
    """An engine with a single row and no memory: nobody else is ever in it."""
    with models.load(rows=1, shelf=0) as model:
        yield model


@pytest.fixture(scope="module")
def alone(single: models.Model) -> list[Answer]:
    return [answer(ask(single, ids, max_tokens=16)) for ids in SUBJECTS]


@pytest.mark.parametrize("others", [7, 15, 31])
def test_an_answer_is_the_same_among_others(
    model: models.Model, alone: list[Answer], others: int
):
    # Four at once, so that each is among three known ones and the strangers.
    with Strangers(model, others - 3):
        tenant = f"among {others}"
        streams = [ask(model, ids, tenant=tenant, max_tokens=16) for ids in SUBJECTS]
        assert [answer(stream) for stream in streams] == alone
    assert [stream.cached_tokens for stream in streams] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "length", [1, 2, 3, 17, 127, 128, 129, 130, 131, 255, 257, 258, 385, 513, 641]
)
def test_how_a_prompt_is_cut_changes_nothing(small: models.Model, length: int):
    alone = answer(ask(small, cut(length), max_tokens=3))  # chunks of up to 512
    neighbour = ask(small, cut(20, 900), **ENDLESS)
    until(lambda: neighbour.completion_tokens)  # from now on, chunks of up to CHUNK
    assert answer(ask(small, cut(length), max_tokens=3)) == alone
    assert neighbour.finish_reason is None
    neighbour.cancel()


def test_a_row_that_moves_takes_its_newest_token_along(small: models.Model):
    expected = answer(ask(small, cut(30), max_tokens=30))
    # The other ends first, in the middle of a decode, and its row still holds other
    # numbers: those of an answer that came before.
    answer(ask(small, cut(90, 600), max_tokens=40))
    first = ask(small, cut(30, 300), max_tokens=9)
    last = ask(small, cut(30), max_tokens=30)
    assert len(answer(first)) == 9
    assert answer(last) == expected


def test_decode_computes_each_row_alike_in_batches_of_1_to_32():
    runtime = Runtime(build.ensure().graph, rows=33, context=80, threads=usable_cores())
    lengths = [2 + (7 * row) % 50 for row in range(32)]
    tokens = [text_ids()[600 + row] for row in range(32)]
    for row, length in enumerate(lengths):
        runtime.prefill(row, cut(length, 20 * row), 0, last=False)
    crowd = runtime.decode(tokens, lengths).copy()
    for rows in range(1, 32):
        few = runtime.decode(tokens[:rows], lengths[:rows])
        assert np.array_equal(few, crowd[:rows]), f"{rows} rows differ from 32"
    for row, length in enumerate(lengths):
        runtime.copy(row, 0, length)
        one = runtime.decode(tokens[row : row + 1], [length])
        assert np.array_equal(one[0], crowd[row]), f"row {row} alone differs"


@pytest.fixture(scope="module")
def cold(single: models.Model) -> Answer:
    """What follows 300 tokens that are all computed."""
    return answer(ask(single, cut(300), max_tokens=5))


@pytest.mark.parametrize("shared", [16, 127, 128, 129, 170, 298, 299, 300])
def test_a_prefix_hit_changes_nothing(model: models.Model, cold: Answer, shared: int):
    before, tenant = cut(shared) + cut(300 - shared, 1000), f"prefix {shared}"
    answer(ask(model, before, tenant=tenant, max_tokens=1))
    hit = ask(model, cut(300), tenant=tenant, max_tokens=5)
    assert answer(hit) == cold
    # The two texts may go on alike by chance.
    assert min(shared, 298) <= hit.cached_tokens <= min(shared + 2, 298)


def test_another_tenant_gets_no_hit(model: models.Model):
    ids = cut(540, 50)
    answer(ask(model, ids, tenant="one", max_tokens=1))
    other = ask(model, ids, tenant="two", max_tokens=1)
    answer(other)
    assert other.cached_tokens == 0
    own = ask(model, ids, tenant="one", max_tokens=1)
    answer(own)
    assert own.cached_tokens == len(ids) - 2


def test_a_short_beginning_is_not_copied(model: models.Model):
    ids = cut(SHORTEST_HIT - 1) + cut(40, 700)
    answer(ask(model, cut(300), tenant="short", max_tokens=1))
    stream = ask(model, ids, tenant="short", max_tokens=1)
    answer(stream)
    assert stream.cached_tokens == 0


def test_equal_prompts_at_once_are_computed_once(model: models.Model):
    ids, before = cut(200, 77), model.engine.snapshot()
    streams = [ask(model, ids, tenant="eight", max_tokens=20) for _ in range(8)]
    answers = [answer(stream) for stream in streams]
    assert all(one == answers[0] for one in answers)
    after = model.engine.snapshot()
    assert after.prompt_tokens - before.prompt_tokens == 200 + 7 * 2
    assert after.cached_tokens - before.cached_tokens == 7 * 198


def test_more_tenants_than_the_shelf_holds(model: models.Model):
    for number in range(40):
        answer(ask(model, cut(20), tenant=f"guest {number}", max_tokens=1))
    first = ask(model, cut(20), tenant="guest 0", max_tokens=1)
    last = ask(model, cut(20), tenant="guest 39", max_tokens=1)
    assert answer(first) == answer(last)
    assert (first.cached_tokens, last.cached_tokens) == (0, 18)


def test_many_questions_push_out_no_other_beginning():
    one, other = cut(100), cut(100, 1000)
    with models.load(rows=1, shelf=2) as model:

        def known(beginning: list[int], question: int) -> int:
            ids = beginning + cut(10, 2000 + 20 * question)
            stream = ask(model, ids, max_tokens=1)
            answer(stream)
            return stream.cached_tokens

        assert [known(one, 0), known(other, 1)] == [0, 0]
        for question in range(2, 6):
            assert known(one, question) >= len(one)
        assert known(other, 6) >= len(other)


def test_a_long_end_is_kept_beside_its_like():
    """Two conversations that began with the same instructions are no repetition."""
    begun = [cut(100) + cut(100, start) for start in (1000, 2000)]
    with models.load(rows=1, shelf=2) as model:
        for ids in begun:
            answer(ask(model, ids, max_tokens=1))
        again = [ask(model, ids, max_tokens=1) for ids in begun]
        for stream in again:
            answer(stream)
    assert [stream.cached_tokens for stream in again] == [198, 198]


@given(left=st.integers(1, 2000), budget=st.integers(2, ALONE))
def test_no_position_is_ever_computed_alone(left: int, budget: int):
    taken = chunk_size(left, budget)
    assert 0 <= taken <= budget
    assert left - taken != 1
    assert taken == left == 1 or taken % TILE != 1


@given(left=st.integers(2, 2000), budgets=st.lists(st.integers(2, CHUNK), min_size=1))
def test_every_prompt_is_finished(left: int, budgets: list[int]):
    # Each step brings a whole budget; scraps of one, as small as 2, may be passed over.
    steps = 0
    while left:
        for budget in (CHUNK, *budgets):
            if left:
                left -= chunk_size(left, budget)
        steps += 1
        assert steps <= 2000 // (CHUNK - 2) + 2


def test_a_scrap_of_budget_waits_for_the_next_step():
    assert chunk_size(3, 2) == 0
    assert chunk_size(3, 3) == 3


# Ending early.


def cancel(leaver: SyncStream) -> tuple[int, int]:
    """Cancel, and say how many tokens it had generated and how many prefilled by then.

    The engine asks for this lock at the start of every step: while it is held, the step
    in progress is the last that does not know.
    """
    with leaver._engine._work:
        leaver.cancel()
        return leaver._job.generated, leaver._job.filled


def test_cancelling_in_decode_frees_the_row_within_a_step(small: models.Model):
    expected = answer(ask(small, cut(25, 40), max_tokens=40))
    leaver = ask(small, cut(25), **ENDLESS)
    stayer = ask(small, cut(25, 40), max_tokens=40)
    pieces = iter(leaver)
    for _ in range(4):
        next(pieces)
    told, _ = cancel(leaver)
    *_, last = pieces
    # The step in progress ends, and the next one begins with dropping.
    assert leaver.completion_tokens <= told + 1
    assert last.finish_reason == leaver.finish_reason == "cancelled"
    assert small.engine.snapshot().active <= 1
    assert answer(stayer) == expected


def test_cancelling_in_prefill_frees_the_row_within_a_step(small: models.Model):
    sampling = {**ENDLESS, "max_tokens": 40}
    expected = answer(ask(small, cut(25, 40), **sampling))
    stayer = ask(small, cut(25, 40), **ENDLESS)
    until(lambda: stayer.completion_tokens > 0)
    leaver = ask(small, cut(2000))
    until(lambda: leaver._job.filled > 0)
    _, filled = cancel(leaver)
    assert [piece.finish_reason for piece in leaver] == ["cancelled"]
    assert leaver._job.filled <= filled + CHUNK < 2000
    until(lambda: stayer.completion_tokens >= 40)
    stayer.cancel()
    assert answer(stayer)[:40] == expected


def test_cancelling_in_the_queue_leaves_the_others_alone(small: models.Model):
    prompts = [cut(20, 30 * place) for place in range(4)]
    sampling = {**ENDLESS, "max_tokens": 20}
    expected = [answer(ask(small, ids, **sampling)) for ids in prompts]
    running = [ask(small, ids, **ENDLESS) for ids in prompts]
    until(lambda: all(stream.completion_tokens for stream in running))
    waiting = [ask(small, cut(20, 500 + place), max_tokens=2) for place in range(3)]
    assert small.engine.snapshot().queued == 3
    assert small.engine.snapshot().queued_prompt_tokens == 60
    waiting[1].cancel()
    assert [piece.finish_reason for piece in waiting[1]] == ["cancelled"]
    assert waiting[1].completion_tokens == waiting[1]._job.filled == 0
    until(lambda: all(stream.completion_tokens >= 20 for stream in running))
    for stream in running:
        stream.cancel()
    assert [answer(stream)[:20] for stream in running] == expected
    for stream in (waiting[0], waiting[2]):
        assert answer(stream)
        assert stream.queued_s > 0


def test_work_after_an_idle_hour_is_no_stall(small: models.Model):
    engine = small.engine
    with engine._work:  # the engine's thread cannot begin before this block ends
        engine._step_ended -= 3600
        stream = ask(small, cut(20), max_tokens=2)
        assert engine.snapshot().queued == 1
        assert engine.snapshot().stalled_s < 60
    answer(stream)


def test_cancelling_twice_or_too_late_is_harmless(small: models.Model):
    stream = ask(small, cut(20), max_tokens=2)
    answer(stream)
    stream.cancel()
    stream.cancel()
    assert stream.finish_reason in ("length", "stop")
    assert answer(ask(small, cut(20), max_tokens=2))


def test_a_deadline_ends_an_answer_with_its_text_so_far(small: models.Model):
    late = ask(small, cut(20), deadline_s=3600, **ENDLESS)
    until(lambda: late.completion_tokens >= 5)
    late._job.deadline = 0.0  # an hour has passed
    found = text(late)
    assert late.finish_reason == "deadline"
    asked = {**ENDLESS, "max_tokens": late.completion_tokens}
    assert found == text(ask(small, cut(20), **asked))


def test_a_deadline_passes_in_the_queue_too(small: models.Model):
    stream = ask(small, cut(20), deadline_s=0)
    assert [(piece.text, piece.finish_reason) for piece in stream] == [("", "deadline")]


def test_a_stream_left_halfway_frees_its_row(small: models.Model):
    stream = ask(small, cut(20), **ENDLESS)
    for _ in stream:
        break
    until(lambda: not small.engine.snapshot().active)
    assert stream.finish_reason == "cancelled"


def test_a_stream_read_again_has_nothing_more(small: models.Model):
    stream = ask(small, cut(20), max_tokens=2)
    assert list(stream)
    assert list(stream) == []


def test_who_never_reads_stalls_nobody(small: models.Model):
    silent = [ask(small, cut(20, place), max_tokens=60) for place in range(3)]
    assert answer(ask(small, cut(20, 90), max_tokens=30))
    until(lambda: all(stream.finish_reason for stream in silent))
    assert sum(len(answer(stream)) for stream in silent) == sum(
        stream.completion_tokens for stream in silent
    )


# asyncio.


def run(work):
    async def bounded():
        async with asyncio.timeout(DEADLINE_S):
            return await work

    return asyncio.run(bounded())


async def answer_async(stream) -> Answer:
    return [(t.id, t.logprob) async for piece in stream for t in piece.tokens]


def test_async_streams_equal_sync_ones(small: models.Model):
    prompts = [cut(15, 40 * place) for place in range(6)]
    asked = Sampling(max_tokens=20, logprobs=0)

    async def all_at_once() -> list[Answer]:
        streams = [small.submit(ids, asked) for ids in prompts]
        return await asyncio.gather(*map(answer_async, streams))

    expected = [answer(ask(small, ids, max_tokens=20)) for ids in prompts]
    assert run(all_at_once()) == expected


def test_a_loop_closed_in_mid_stream_harms_nobody(small: models.Model):
    async def leave() -> models.AsyncStream:
        stream = small.submit(cut(20), Sampling(max_tokens=1900))
        await anext(stream)
        return stream

    stream = run(leave())
    until(lambda: not small.engine.snapshot().active)
    assert stream.finish_reason == "cancelled"
    assert answer(ask(small, cut(20), max_tokens=5))


def test_closed_loops_are_forgotten(small: models.Model):
    async def one() -> None:
        await answer_async(small.submit(cut(5), Sampling(max_tokens=1)))

    for _ in range(5):
        run(one())
    assert len(small._loops) <= 1


def test_news_of_an_earlier_piece_may_come_late(
    small: models.Model, monkeypatch: pytest.MonkeyPatch
):
    """The loop hears of the last but one piece while the last is being made."""
    put = small.engine._put

    def late(job, piece):
        if piece.finish_reason is not None:
            heard = threading.Event()
            loop.call_soon_threadsafe(
                lambda: (job.notify.__self__._wake([job]), heard.set())
            )
            assert heard.wait(DEADLINE_S)
        put(job, piece)

    async def one() -> Answer:
        nonlocal loop
        loop = asyncio.get_running_loop()
        return await answer_async(
            small.submit(cut(9), Sampling(max_tokens=4, logprobs=0))
        )

    loop: asyncio.AbstractEventLoop
    monkeypatch.setattr(small.engine, "_put", late)
    assert len(run(one())) == 4


# What is drawn.


def test_seeds(model: models.Model):
    def warm(seed: int | None) -> Answer:
        return answer(ask(model, cut(30), temperature=1.0, seed=seed, max_tokens=16))

    seven = warm(7)
    with Strangers(model, 5):
        assert warm(7) == seven
    assert len({tuple(warm(seed)) for seed in range(4)}) == 4
    assert len({tuple(warm(None)) for _ in range(4)}) == 4


def test_a_stop_string_ends_the_text_before_it(small: models.Model):
    whole = text(ask(small, cut(40), max_tokens=40))
    word = whole.split()[4]
    stream = ask(small, cut(40), max_tokens=40, stop=(word, "never in this text"))
    assert text(stream) == whole[: whole.index(word)]
    assert stream.finish_reason == "stop"
    assert stream.completion_tokens < 40


def test_logprobs_are_those_of_the_whole_text_read_at_once(small: models.Model):
    ids = cut(60)
    stream = ask(small, ids, max_tokens=30, logprobs=3)
    tokens = [token for piece in stream for token in piece.tokens]
    drawn = [token.id for token in tokens]
    logits = open_graph(build.ensure()).every_logit(ids + drawn[:-1])
    expected = log_softmax(logits)[len(ids) - 1 :]
    for token, row in zip(tokens, expected, strict=True):
        # Whole texts are computed by another kernel, whose rounding differs.
        assert token.logprob == pytest.approx(float(row[token.id]), abs=0.25)
        assert token.top[0][0] == token.id  # greedy
        logprobs = [top[3] for top in token.top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert token.logprob == logprobs[0]
    assert "".join(token.text for token in tokens) == text(
        ask(small, ids, max_tokens=30)
    )


def test_json_that_a_schema_allows(model: models.Model):
    ids = model.prompt("Describe a person as JSON.")
    form = grammar.json_schema(SCHEMA)
    asked = [{"temperature": 1.3, "seed": seed} for seed in range(4)] + [{}]
    streams = [ask(model, ids, grammar=form, max_tokens=90, **one) for one in asked]
    for stream in streams:
        found = json.loads(text(stream))
        assert list(found) == ["name", "age", "colour"]
        assert isinstance(found["name"], str)
        assert 0 <= found["age"] <= 120
        assert found["colour"] in ("red", "green", "blue")
        assert stream.finish_reason == "stop"


def test_text_that_an_expression_matches(model: models.Model):
    pattern = r"[A-Z]{2}-[0-9]{4}(; [a-z]{1,8} [0-9])?"
    asked = {"grammar": grammar.regex(pattern), "temperature": 1.5}
    streams = [ask(model, cut(30), seed=seed, **asked) for seed in range(6)]
    assert all(re.fullmatch(pattern, text(stream)) for stream in streams)


def test_a_grammar_that_fails_in_mid_answer_ends_that_answer_only(
    small: models.Model, monkeypatch: pytest.MonkeyPatch
):
    expected = answer(ask(small, cut(30, 60), max_tokens=30))
    others = [ask(small, cut(30, 60), max_tokens=30)]
    stream = ask(small, cut(30), grammar=grammar.regex("[a-z ]{50,90}"), max_tokens=40)
    others.append(ask(small, cut(30, 60), max_tokens=30))
    matcher, accepted = stream._job.sampler._matcher, 0
    assert matcher is not None
    accept_one = matcher.accept

    def accept(id: int) -> None:
        nonlocal accepted
        accepted += 1
        if accepted > 5:
            raise models.GrammarError("regex: too costly from here on")
        accept_one(id)

    monkeypatch.setattr(matcher, "accept", accept)
    text(stream)
    assert (stream.finish_reason, stream.completion_tokens) == ("error", 5)
    assert stream.error == "regex: too costly from here on"
    assert [answer(other) for other in others] == [expected, expected]


def test_classify_prefers_the_right_label(model: models.Model):
    # All but one of these at least: the model is small, but it does read the text.
    labels = ["positive", "negative"]
    asked = {
        "I love this!": "positive",
        "This is terrible, I hate it.": "negative",
        "Quick delivery and perfect fit": "positive",
        "The battery dies within an hour": "negative",
        "My kids adore it": "positive",
        "What a waste of two hours": "negative",
    }
    found = model.classify(list(asked), labels)
    best = [max(one, key=one.__getitem__) for one in found]
    right = sum(a == b for a, b in zip(best, asked.values(), strict=True))
    assert right >= len(asked) - 1
    assert all(sum(one.values()) == pytest.approx(1) for one in found)
    with Strangers(model, 6):
        assert run(model.classify_async("I love this!", labels)) == found[:1]


def test_a_label_is_scored_by_the_text_that_ends_with_it(model: models.Model):
    labels = ["no", "not sure"]
    questions = model.questions("Will it rain?", labels)
    graph, scores = open_graph(build.ensure()), []
    for ids, sampling in questions:
        whole = log_softmax(graph.every_logit([*ids, *sampling.forced]))
        places = np.arange(len(ids) - 1, len(whole) - 1), list(sampling.forced)
        scores.append(float(whole[places].sum()))
    (found,) = model.classify("Will it rain?", labels)
    odds = np.log(found["no"] / found["not sure"])
    assert odds == pytest.approx(scores[0] - scores[1], abs=0.5)


# Bad input, and the ends of what fits.


@pytest.mark.parametrize("length", [0, 2048, 100_000])
def test_a_prompt_that_does_not_fit_is_refused(small: models.Model, length: int):
    with pytest.raises(models.PromptTooLong, match=f"1 to 2047 tokens, found {length}"):
        ask(small, [5] * length)
    assert small.engine.snapshot().queued == 0


@pytest.mark.parametrize("wrong", [-1, 49_152, 2**40])
def test_a_wrong_token_id_reaches_nobody_else(small: models.Model, wrong: int):
    neighbour = ask(small, cut(20), max_tokens=10)
    with pytest.raises(ValueError, match=r"expected token ids 0 to 49151, found"):
        ask(small, [*cut(20), wrong])
    assert answer(neighbour)


def test_a_full_context_ends_an_answer_by_length():
    with models.load(rows=2, shelf=2, context=64) as model:
        forever = {"max_tokens": 500, "logit_bias": ((2, -100), (0, -100))}
        for length in (1, 2, 50, 62, 63):
            stream = ask(model, cut(length), **forever)
            assert len(answer(stream)) == 64 - length
            assert stream.finish_reason == "length"
        assert answer(ask(model, cut(10), max_tokens=3))


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"shelf": -1}, {"context": 0}, {"context": 8193}]
)
def test_impossible_sizes_are_refused(wrong: dict[str, Any]):
    with pytest.raises(models.ModelError, match=f"{next(iter(wrong))}: expected"):
        models.load(**wrong)


# The end of an engine.


def test_closing_with_a_drain_finishes_answers():
    with models.load(rows=2, shelf=0) as model:
        streams = [ask(model, cut(20, 9 * place), max_tokens=12) for place in range(4)]
        model.close(drain_s=DEADLINE_S)
        assert [len(answer(stream)) for stream in streams] == [
            stream.completion_tokens for stream in streams
        ]
        assert {stream.finish_reason for stream in streams} <= {"length", "stop"}


def test_closing_at_once_cancels():
    model = models.load(rows=1, shelf=0)
    streams = [ask(model, cut(20), max_tokens=2000) for _ in range(3)]
    next(iter_ := iter(streams[0]))
    model.close()
    model.close()
    assert [piece.finish_reason for piece in iter_][-1] == "cancelled"
    assert [text(stream) for stream in streams[1:]] == ["", ""]
    with pytest.raises(models.EngineClosed, match="load the model again"):
        ask(model, cut(5))


@pytest.mark.parametrize("call", ["decode", "prefill", "copy"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_runtime_ends_every_answer_with_the_reason(
    call: str, monkeypatch: pytest.MonkeyPatch
):
    with models.load(rows=2, shelf=1) as model:

        def fail(*_: object):
            raise RuntimeError("out of memory on the moon")

        streams = [ask(model, cut(20, place), max_tokens=30) for place in range(5)]
        until(lambda: streams[1].completion_tokens > 2)
        monkeypatch.setattr(model.engine._runtime, call, fail)
        for stream in streams:
            answer(stream)
        ends = {stream.finish_reason for stream in streams}
        assert "error" in ends
        assert ends <= {"error", "length", "stop"}
        failed = [one for one in streams if one.finish_reason == "error"]
        assert all("out of memory on the moon" in (one.error or "") for one in failed)
        with pytest.raises(models.EngineClosed, match=r"moon.*load the model again"):
            ask(model, cut(5))
        assert model.engine.snapshot().active == model.engine.snapshot().queued == 0


# All of it at once.


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns every few instructions: races come to light."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_many_submit_while_the_engine_looks_through_its_queue(
    small: models.Model, hasty_threads: None
):
    def burst(number: int) -> None:
        streams = [ask(small, cut(2, number), max_tokens=1) for _ in range(400)]
        for stream in streams:
            stream.cancel()
        for stream in streams:
            assert stream.finish_reason != "error"
            answer(stream)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(burst, range(6)))
    assert answer(ask(small, cut(5), max_tokens=2))


STORM_PROMPTS = (
    cut(12),
    cut(60),
    cut(60) + cut(8, 700),  # begins like the one before
    cut(129, 20),
    cut(129, 20) + cut(30, 800),
    cut(33, 400),
)
STORM_SAMPLINGS: tuple[dict, ...] = (
    {"max_tokens": 3},
    {"max_tokens": 17},
    {"max_tokens": 8, "temperature": 1.0, "seed": 5},
    {"max_tokens": 12, "frequency_penalty": 0.5},
)


def test_storm(model: models.Model, small: models.Model):
    solo = {
        (p, s): answer(ask(small, ids, **sampling))
        for p, ids in enumerate(STORM_PROMPTS)
        for s, sampling in enumerate(STORM_SAMPLINGS)
    }
    choose, before = random.Random(1), model.engine.snapshot()

    async def one(delay_s: float, p: int, s: int, tenant: str, end: str) -> str:
        await asyncio.sleep(delay_s)
        stream = model.submit(
            STORM_PROMPTS[p],
            Sampling(logprobs=0, **STORM_SAMPLINGS[s]),
            tenant=tenant,
            deadline_s=choose.random() if end == "deadline" else None,
        )
        found: Answer = []
        async for piece in stream:
            found += [(token.id, token.logprob) for token in piece.tokens]
            if end == "cancel" and choose.random() < 0.3:
                stream.cancel()
        assert found == solo[p, s][: len(found)]
        if stream.finish_reason in ("stop", "length"):
            assert found == solo[p, s]
        return stream.finish_reason or ""

    async def all_of_them() -> list[str]:
        requests = [
            one(
                choose.uniform(0, 6),
                choose.randrange(len(STORM_PROMPTS)),
                choose.randrange(len(STORM_SAMPLINGS)),
                f"storm {choose.randrange(4)}",
                choose.choice(["", "", "", "cancel", "deadline"]),
            )
            for _ in range(300)
        ]
        return await asyncio.gather(*requests)

    reasons = run(all_of_them())
    assert {"length", "cancelled"} <= set(reasons)
    assert "error" not in reasons
    after = model.engine.snapshot()
    assert (after.active, after.queued) == (0, 0)
    ended = sum(after.finished.values()) - sum(before.finished.values())
    assert ended == len(reasons) == 300
