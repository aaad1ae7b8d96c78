"""Drift: silent on what is noise, loud on what is not, and never sure too early."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from starlette.testclient import TestClient

from local_cloud.monitoring import drift
from local_cloud.monitoring.drift import WINDOW, DriftCollector, Watch
from local_cloud.monitoring.light_load import CODE, ENGLISH, prompts
from local_cloud.monitoring.scrape import parse
from model_api import create_app
from models import Model
from monitoring_setup import psi
from serving.settings import Settings

LARGE = 10_000  # values of a baseline whose own error is small


def fed(watch: Watch, values: Sequence[float]) -> float:
    for value in values:
        watch.observe(value)
    return watch.value()


def normal(count: int, seed: int, mean: float = 0.0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(mean, 1.0) for _ in range(count)]


def test_psi_is_what_the_formula_says():
    a, b = (100.5 / 301, 200.5 / 301), (200.5 / 301, 100.5 / 301)
    by_hand = sum((y - x) * math.log(y / x) for x, y in zip(a, b, strict=True))
    assert psi([100, 200], [200, 100]) == pytest.approx(by_hand)
    assert psi([200, 100], [100, 200]) == pytest.approx(by_hand)  # symmetric
    assert psi([150, 150], [150, 150]) == 0


def test_an_empty_bin_is_no_infinity():
    assert 1 < psi([300, 0], [0, 300]) < math.inf


@pytest.mark.parametrize("counts", [([150, 149], [200, 200]), ([400, 0], [10, 10])])
def test_too_few_values_are_refused(counts: tuple[list[int], list[int]]):
    with pytest.raises(ValueError, match=r"expected 300 .* found .*wait"):
        psi(*counts)


def test_the_limit_is_what_noise_exceeds_once_in_a_hundred_windows():
    """Of windows that the bootstrap never saw."""
    watch = Watch("x", normal(LARGE, 0), psi)
    assert watch.limit == pytest.approx(0.063, abs=0.007)
    scores = [fed(watch, normal(WINDOW, seed)) for seed in range(1, 601)]
    above = sum(score > watch.limit for score in scores)
    assert above <= 15  # 6 on average; more than 15 in 1 of 1,700 such tests
    assert max(scores) > 0.8 * watch.limit  # and it is no higher than need be


def test_a_small_baseline_has_a_higher_limit():
    """A fixed threshold would be wrong for one of them."""
    small, large = (Watch("x", normal(n, 0), psi) for n in (WINDOW, LARGE))
    assert small.limit > 1.5 * large.limit


@pytest.mark.parametrize("mean", [0.4, -0.4])
def test_a_shifted_stream_is_found(mean: float):
    watch = Watch("x", normal(LARGE, 0), psi)
    assert fed(watch, normal(WINDOW, 1, mean)) > watch.limit


@pytest.mark.parametrize("value", [4.0, 6.0])
def test_a_shift_of_what_never_varied_is_found(value: float):
    watch = Watch("x", [5.0] * 500, psi)
    assert fed(watch, [5.0] * WINDOW) <= watch.limit
    assert fed(watch, [value] * WINDOW) > watch.limit


def test_prompts_and_answers_of_the_real_model(model: Model):
    """Code instead of words: more tokens, another confidence, as many words."""

    def tokens(words: Sequence[str], count: int, seed: int) -> list[float]:
        texts = prompts(words, count, seed)
        return [float(len(model.tokenizer.encode(text))) for text in texts]

    watch = Watch("prompt_tokens", tokens(ENGLISH, LARGE, 0), psi)
    assert fed(watch, tokens(ENGLISH, WINDOW, 1)) <= watch.limit
    assert fed(watch, tokens(CODE, WINDOW, 2)) > watch.limit


def test_memory_stays_bounded_and_the_window_slides():
    watch = Watch("x", normal(LARGE, 0), psi)
    assert fed(watch, normal(20 * WINDOW, 1, mean=3)) > watch.limit
    assert fed(watch, normal(WINDOW, 2)) <= watch.limit  # the drift is forgotten
    assert len(watch._places) == sum(watch._counts) == WINDOW


def test_until_the_window_is_full_nothing_is_known():
    watch = Watch("x", normal(LARGE, 0), psi)
    assert math.isnan(fed(watch, normal(WINDOW - 1, 1)))
    assert math.isfinite(fed(watch, [0.0]))


def test_it_is_exported_under_the_name_the_alert_reads():
    watches = [
        Watch("prompt_tokens", normal(WINDOW, 0), psi),
        Watch("words", normal(WINDOW, 1), psi),
        Watch("confidence", normal(WINDOW, 2), psi, of="output"),
    ]
    registry = CollectorRegistry()
    registry.register(DriftCollector(*watches))
    fed(watches[0], normal(WINDOW, 3, mean=2))
    seen = parse(generate_latest(registry).decode())
    score = seen.total("model_input_drift_psi", feature="prompt_tokens")
    assert score == watches[0].value()
    assert score > seen.total("model_input_drift_limit", feature="prompt_tokens") > 0
    assert math.isnan(seen.total("model_input_drift_psi", feature="words"))
    assert seen.series("model_output_drift_psi", feature="confidence")


def test_an_api_exports_the_drift_of_its_prompts_once_it_is_asked_to(model: Model):
    app = create_app(Settings(), model=model)
    with TestClient(app, client=("127.0.0.1", 1)) as http:
        assert "model_input_drift" not in http.get("/metrics").text
        watch = Watch("prompt_tokens", [float(i % 8) for i in range(WINDOW)], psi)
        metrics = app.state.service.metrics
        drift.watch_prompts(metrics, watch)
        body = {"model": model.name, "prompt": "Tell me of the sea.", "max_tokens": 1}
        told = http.post("/v1/completions", json=body).json()["usage"]
        assert sum(watch._counts) == 1
        for _ in range(WINDOW - 1):
            metrics.generated(
                prompt=told["prompt_tokens"], completion=1, first_s=0.1, total_s=0.1
            )
        seen = parse(http.get("/metrics").text)
    score = seen.total("model_input_drift_psi", feature="prompt_tokens")
    assert score > seen.total("model_input_drift_limit", feature="prompt_tokens")


@pytest.mark.parametrize(
    ("baseline", "window"),
    [(normal(299, 0), 300), (normal(300, 0), 299), ([math.nan] * 300, 300)],
)
def test_a_baseline_that_tells_nothing_is_refused(baseline: list[float], window: int):
    with pytest.raises(ValueError, match=r"expected a baseline .* found .*collect"):
        Watch("x", baseline, psi, window=window)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused(value: float):
    watch = Watch("x", normal(WINDOW, 0), psi)
    with pytest.raises(ValueError, match=r"expected a finite number"):
        watch.observe(value)
    assert math.isnan(watch.value())


def test_counting_at_once_and_one_by_one_agree():
    watch = Watch("x", np.random.default_rng(0).integers(0, 6, 400).tolist(), psi)
    values = [-1.0, 0.0, 0.5, 3.0, 5.0, 99.0]
    for value in values:
        watch.observe(value)
    assert watch._counts == watch.count(values)
    assert drift.edges(np.array([1.0, 1.0, 2.0])).count(1.0) == 1
