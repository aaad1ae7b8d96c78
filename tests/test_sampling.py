"""What may be asked of an answer, and how its tokens are drawn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ModelError
from models.sampling import Sampler, Sampling, greedy, largest_ids, nucleus, pick

VOCABULARY = 1000


def row(seed=0, spread=3.0):
    random = np.random.default_rng(seed)
    return (random.standard_normal(VOCABULARY) * spread).astype(np.float32)


def drawn(sampling, count=50, spread=3.0):
    sampler = Sampler(sampling, VOCABULARY)
    return [sampler.draw(row(place, spread)).id for place in range(count)]


def log_softmax(logits):
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact - exact.max()).sum()) - exact.max()


# What may be asked.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected an integer of at least 1, found 0"),
        ({"max_tokens": 1.5}, "max_tokens: expected an integer"),
        ({"max_tokens": True}, "max_tokens: expected an integer"),
        ({"temperature": math.nan}, "temperature: expected 0 to 2, found nan"),
        ({"temperature": math.inf}, "temperature: expected 0 to 2, found inf"),
        ({"temperature": -0.1}, "temperature: expected 0 to 2"),
        ({"temperature": "hot"}, "temperature: expected a number"),
        ({"top_p": 0}, "top_p: expected more than 0"),
        ({"top_p": 1.01}, "top_p: expected 0 to 1"),
        ({"seed": "x"}, "seed: expected an integer, found 'x'"),
        ({"stop": "END"}, "stop: expected a tuple of strings"),
        ({"stop": tuple("abcde")}, "stop: expected at most 4 strings, found '5"),
        ({"stop": ("",)}, "stop: expected strings of 1 to 256 characters"),
        ({"stop": ("x" * 257,)}, "one of 257 characters"),
        ({"stop": ("\ud800",)}, "stop: expected valid Unicode"),
        ({"presence_penalty": 2.1}, "presence_penalty: expected -2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty: expected -2 to 2"),
        ({"logit_bias": {5: 1.0}}, "logit_bias: expected a tuple"),
        ({"logit_bias": ((-1, 1.0),)}, "token id: expected an integer of at least 0"),
        ({"logit_bias": ((5, 101.0),)}, "bias of token 5: expected -100 to 100"),
        ({"logit_bias": ((5, 1.0), (5, 2.0))}, "each token once"),
        ({"logit_bias": tuple((n, 1.0) for n in range(301))}, "at most 300 tokens"),
        (
            {"logprobs": 21},
            "logprobs: expected an integer of at least 0 and at most 20",
        ),
        ({"forced": (-1,)}, "forced: expected an integer of at least 0"),
    ],
)
def test_a_wrong_request_is_explained(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_ten_thousand_stop_strings_give_a_short_error():
    with pytest.raises(ValueError, match="at most 4") as refusal:
        Sampling(stop=("x" * 200,) * 10_000)
    assert len(str(refusal.value)) < 200


def test_ids_past_the_vocabulary_are_refused():
    for wrong in (Sampling(logit_bias=((VOCABULARY, 1.0),)), Sampling(forced=(1000,))):
        with pytest.raises(ValueError, match="token ids below 1000, found 1000"):
            Sampler(wrong, VOCABULARY)


# Greedy.


def test_greedy_takes_the_largest_and_of_equals_the_lowest_id():
    logits = row()
    logits[[700, 30, 512]] = 99
    assert Sampler(Sampling(), VOCABULARY).draw(logits).id == 30
    assert greedy(np.stack([logits, row(1)])) == [30, int(row(1).argmax())]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_an_error_and_not_a_token(sampling, value):
    logits = row()
    logits[123] = value
    with pytest.raises(ModelError, match=r"found (nan|inf) for token 123"):
        Sampler(sampling, VOCABULARY).draw(logits)
    with pytest.raises(ModelError, match="for token 123"):
        greedy(np.stack([row(1), logits]))


def test_the_callers_row_stays_as_it_is():
    logits = row()
    before = logits.copy()
    sampler = Sampler(
        Sampling(
            temperature=0.7,
            top_p=0.9,
            presence_penalty=1,
            frequency_penalty=1,
            logit_bias=((5, -100.0),),
            logprobs=3,
        ),
        VOCABULARY,
    )
    for _ in range(5):
        sampler.draw(logits)
    assert np.array_equal(logits, before)


# Drawing.


def test_the_same_seed_draws_the_same_tokens():
    first = drawn(Sampling(temperature=1.0, top_p=0.9, seed=7))
    assert drawn(Sampling(temperature=1.0, top_p=0.9, seed=7)) == first
    assert drawn(Sampling(temperature=1.0, top_p=0.9, seed=8)) != first
    assert drawn(Sampling(temperature=1.0, seed=-1)) == drawn(
        Sampling(temperature=1.0, seed=-1)
    )


def test_no_seed_draws_afresh():
    asked = Sampling(temperature=2.0)
    assert drawn(asked) != drawn(asked)


def test_draws_follow_the_probabilities():
    logits = np.full(VOCABULARY, -50, np.float32)
    shares = np.array([0.5, 0.3, 0.2])
    temperature = 0.5
    logits[[10, 20, 30]] = np.log(shares) * temperature
    sampler = Sampler(Sampling(temperature=temperature, seed=1), VOCABULARY)
    ids = [sampler.draw(logits).id for _ in range(4000)]
    found = np.array([ids.count(id) for id in (10, 20, 30)]) / len(ids)
    assert found == pytest.approx(shares, abs=0.03)  # more than 3 standard deviations


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    sampler = Sampler(Sampling(temperature=temperature, seed=0), VOCABULARY)
    assert sampler.draw(row()).id == row().argmax()


def sorted_nucleus(weights, top_p):
    """The definition, by sorting everything."""
    order = sorted(range(len(weights)), key=lambda id: (-weights[id], id))
    reached = np.cumsum(weights[order], dtype=np.float64) >= top_p * weights.sum(
        dtype=np.float64
    )
    count = int(reached.argmax()) + 1 if reached.any() else len(weights)
    return sorted(order[:count])


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 3000),
    spread=st.sampled_from([0.0, 0.01, 1.0, 4.0, 20.0]),
    steps=st.sampled_from([2, 5, 10**6]),  # few steps: many equal weights
    top_p=st.floats(1e-9, 1.0, exclude_max=True),
    uniform=st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None, max_examples=300)
def test_top_p_is_exact(seed, size, spread, steps, top_p, uniform):
    logits = np.random.default_rng(seed).integers(0, steps, size) / steps * spread
    weights = np.exp(logits - logits.max()).astype(np.float32)
    expected = sorted_nucleus(weights, top_p)
    assert nucleus(weights, top_p).tolist() == expected
    shares = np.cumsum(weights[expected], dtype=np.float64)
    place = int((shares > uniform * shares[-1]).argmax())
    assert pick(weights, top_p, uniform) == expected[place]


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0]), min_size=1, max_size=20),
    top_p=st.sampled_from([1e-9, 0.5, 0.999999999, 1.0]),
    uniform=st.sampled_from([0.0, 0.5, 1 - 2**-53]),
)
def test_a_token_without_weight_is_never_picked(weights, top_p, uniform):
    weights = np.array([*weights, 1.0], np.float32)
    assert weights[pick(weights, top_p, uniform)] > 0


# Penalties, bias, forced tokens, log-probabilities.


def test_penalties_count_what_was_drawn():
    logits = np.zeros(VOCABULARY, np.float32)
    logits[:3] = [10.0, 9.5, 9.2]
    frequency = Sampler(Sampling(frequency_penalty=0.4), VOCABULARY)
    assert [frequency.draw(logits).id for _ in range(6)] == [0, 0, 1, 0, 2, 1]
    presence = Sampler(Sampling(presence_penalty=1.0), VOCABULARY)
    assert [presence.draw(logits).id for _ in range(5)] == [0, 1, 2, 0, 0]


def test_bias_forbids_and_forces():
    best = int(row().argmax())
    forbidden = Sampler(Sampling(logit_bias=((best, -100.0),)), VOCABULARY)
    assert forbidden.draw(row()).id == int(np.argsort(row())[-2])
    certain = Sampling(temperature=1.0, seed=0, logit_bias=((42, 100.0),))
    assert set(drawn(certain)) == {42}


def test_forced_tokens_are_scored_in_order():
    sampler = Sampler(Sampling(forced=(5, 900, 5), logprobs=0), VOCABULARY)
    for place, id in enumerate((5, 900, 5)):
        assert not sampler.finished
        draw = sampler.draw(row(place))
        assert draw.id == id
        assert draw.logprob == pytest.approx(log_softmax(row(place))[id], abs=1e-5)
    assert sampler.finished
    with pytest.raises(ModelError, match="at most 3 draws"):
        sampler.draw(row())


def test_log_probabilities_are_the_models_own():
    asked = Sampling(
        temperature=0.5, seed=3, logprobs=5, logit_bias=((1, 50.0),), top_p=0.5
    )
    draw = Sampler(asked, VOCABULARY).draw(row())
    exact = log_softmax(row())
    assert draw.id == 1
    assert draw.logprob == pytest.approx(exact[1], abs=1e-5)
    best = np.argsort(-exact, kind="stable")[:5]
    assert [id for id, _ in draw.top] == best.tolist()
    assert [value for _, value in draw.top] == pytest.approx(exact[best], abs=1e-5)


def test_nothing_is_scored_unasked():
    assert Sampler(Sampling(), VOCABULARY).draw(row())[1:] == (None, ())


@given(
    logits=st.lists(st.integers(-5, 5), min_size=1, max_size=600),
    count=st.integers(1, 20),
)
def test_the_largest_ids_are_exact(logits, count):
    values = np.array(logits, np.float32)
    expected = sorted(range(len(logits)), key=lambda id: (-logits[id], id))[:count]
    assert largest_ids(values, count) == expected
