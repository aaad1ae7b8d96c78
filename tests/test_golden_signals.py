"""What is read of /metrics: of the real API, under a load that is known."""

from __future__ import annotations

import importlib
import math
import pkgutil
import shutil
import subprocess
from pathlib import Path
from urllib.error import URLError

import httpx
import pytest

import monitoring_setup
from course.measure import Series
from local_cloud.monitoring import light_load
from local_cloud.monitoring.names import NAMES
from local_cloud.monitoring.scrape import parse, quantile, scrape, share_under
from serving import trials
from serving.metrics import PER_TOKEN_S
from tests import api_fixtures as api

TOKENS = 6


@pytest.fixture(scope="module")
def seen() -> light_load.Seen:
    def ask() -> light_load.Body:
        return trials.small_talk(6, TOKENS)

    with trials.running_server("cpu", TTFT_TARGET_MS="60000") as url:
        return api.run(lambda: light_load.load(url, ask, 6, 2))


def test_the_signals_agree_with_what_the_clients_saw(seen: light_load.Seen):
    good = [outcome for outcome in seen.outcomes if outcome.ok]
    typos = [outcome for outcome in seen.outcomes if outcome.status == 422]
    assert len(good) > 3
    assert typos
    assert seen.requests() == len(seen.outcomes)
    assert seen.requests("4") == len(typos)
    assert seen.requests("5") == 0
    now = seen.counted
    label = {"gen_ai_token_type": "output"}
    written = now.total("gen_ai_server_tokens_total", **label)
    assert written == TOKENS * len(good)
    assert now.total("engine_generated_tokens_total") == written
    assert seen.highest("engine_active_rows") <= len(good)
    assert now.total("process_cpu_seconds_total") > 0


def test_a_row_is_active_while_an_answer_is_written():
    body = api.question(stream=True, max_tokens=900, logit_bias={"0": -100, "2": -100})
    with api.served(api.app()) as url:

        def active() -> float:
            return scrape(url).total("engine_active_rows")

        with httpx.stream("POST", url + api.CHAT, json=body, timeout=60) as answer:
            lines = answer.iter_lines()  # whoever lets go of it has left
            next(lines)
            assert active() == 1
        api.until(lambda: active() == 0)


def test_every_row_of_the_table_has_a_value(seen: light_load.Seen):
    rows = monitoring_setup.signals(seen)
    assert all(math.isfinite(row[4]) for row in rows)  # type: ignore[arg-type]
    lists = [{row[column] for row in rows} - {""} for column in range(3)]
    assert lists == [
        {"latency", "traffic", "errors", "saturation"},
        {"rate", "errors", "duration"},
        {"utilisation", "saturation", "errors"},
    ]


def test_the_first_token_is_later_for_clients_than_for_the_server(
    seen: light_load.Seen,
):
    """The server cannot see the way to it: its mean is less, but not by much."""
    name = monitoring_setup.FIRST_S
    own = seen.counted.total(f"{name}_sum") / seen.counted.total(f"{name}_count")
    theirs = Series(tuple(o.first_token_s or 0 for o in seen.outcomes if o.ok)).mean
    assert 0 < own < theirs


def test_each_name_of_ours_is_exported(seen: light_load.Seen):
    exported = {name for name, _ in seen.gauges[-1].samples}
    for name in (one.ours.partition("{")[0] for one in NAMES):
        if name != "energy_joules_total":  # by a collector of its own
            assert exported & {name, f"{name}_bucket"}, name


def test_each_convention_is_one():
    conventions = pytest.importorskip("opentelemetry.semconv")
    known: set[str] = set()
    for package in ("metrics", "_incubating.metrics"):
        where = importlib.import_module(f"{conventions.__name__}.{package}")
        for found in pkgutil.iter_modules(where.__path__):
            module = importlib.import_module(f"{where.__name__}.{found.name}")
            known |= {v for v in vars(module).values() if isinstance(v, str)}
    assert {one.convention for one in NAMES if one.convention} <= known


# ## Histograms

WAITS = [0.004 + 0.0001 * i for i in range(400)]  # 4 to 44 ms


def test_an_edge_on_the_promise_makes_the_share_exact():
    promise = 0.031  # between two edges of the API
    truth = sum(wait <= promise for wait in WAITS) / len(WAITS)
    coarse = light_load.as_histogram(WAITS, PER_TOKEN_S).buckets("it")
    fine = light_load.as_histogram(WAITS, [*PER_TOKEN_S, promise]).buckets("it")
    assert share_under(promise, fine) == pytest.approx(truth, abs=1e-12)
    assert abs(share_under(promise, coarse) - truth) > 0.005


def test_a_percentile_errs_by_less_than_its_bucket_is_wide():
    buckets = light_load.as_histogram(WAITS, PER_TOKEN_S).buckets("it")
    for q in (0.05, 0.5, 0.9, 0.99):
        guess, truth = quantile(q, buckets), Series(tuple(WAITS)).at(100 * q)
        above = min(edge for edge in buckets if edge >= truth)
        below = max([0.0, *(edge for edge in buckets if edge < truth)])
        assert below <= guess <= above


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], math.nan), ([99.0], 2.5), ([0.003], 0.0099), ([0.003, 99.0], 2.5)],
)
def test_percentiles_at_the_ends(values: list[float], expected: float):
    """None of nothing; beyond the last edge, that edge; within the first, from 0."""
    buckets = light_load.as_histogram(values, PER_TOKEN_S).buckets("it")
    assert quantile(0.99, buckets) == pytest.approx(expected, nan_ok=True)


# ## Increases


def test_a_child_made_with_its_first_error_hides_it():
    assert light_load.first_errors(made_up_front=False) == 0
    assert light_load.first_errors(made_up_front=True) == 3


def test_a_restarted_server_has_counted_from_zero():
    seen = parse("a_total 2\n", at=3) - parse("a_total 7\n", at=1)
    assert seen.total("a_total") == 2
    assert seen.seconds == 2


def test_a_server_that_does_not_answer_is_no_empty_scrape():
    with pytest.raises(URLError, match="refused"):
        scrape("http://127.0.0.1:9")


# ## The same by Prometheus itself

UNIT = """
rule_files: []
evaluation_interval: 15s
tests:
  - interval: 15s
    input_series:
      - series: late_total
        values: '_ _ 3 3 3'
      - series: early_total
        values: '0 0 3 3 3'
BUCKETS
    promql_expr_test:
      - expr: increase(late_total[1m]) > 0
        eval_time: 1m
      - expr: increase(early_total[1m]) > bool 2
        eval_time: 1m
        exp_samples: [{labels: '{}', value: 1}]
      - expr: histogram_quantile(0.9, it_bucket)
        eval_time: 1m
        exp_samples: [{labels: '{}', value: QUANTILE}]
"""


@pytest.mark.prometheus
@pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool: apt-get install prometheus"
)
def test_prometheus_agrees(tmp_path: Path):
    """On the lost first increment, and on a percentile."""
    buckets = light_load.as_histogram(WAITS, PER_TOKEN_S).buckets("it")
    edges = ["+Inf" if math.isinf(edge) else str(edge) for edge in buckets]
    series = "\n".join(
        f"      - series: 'it_bucket{{le=\"{edge}\"}}'\n        values: '{count:g}x4'"
        for edge, count in zip(edges, buckets.values(), strict=True)
    )
    text = UNIT.replace("BUCKETS", series)
    path = tmp_path / "unit.yml"
    path.write_text(text.replace("QUANTILE", repr(quantile(0.9, buckets))))
    argv = ["promtool", "test", "rules", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
