"""Cost models and the power tuner: computed, simulated, and run on the platform."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from course.draw import picture
from local_cloud.functions import Function, Platform, Report, costs, tuning

ONE_VCPU: dict[str, Any] = {"memory_mb": costs.FULL_VCPU_MB, "vcpus": 1, "memory_gb": 2}


def test_a_bill_worked_out_by_hand():
    # 1,000,000 calls of 0.1 s at 512 MB: 50,000 GB-s and the fee of a million requests.
    assert costs.lambda_cost(1e6, 1e5, 512) == pytest.approx(0.20 + 50_000 * 16.6667e-6)


def test_a_container_bill_worked_out_by_hand():
    assert costs.container_cost(3600, 1, 2) == pytest.approx(0.04048 + 2 * 0.004445)
    served = costs.container_cost(10, 2, 1, costs.CLOUD_RUN, requests=1e6)
    assert served == pytest.approx(10 * (2 * 24e-6 + 2.5e-6) + 0.40)


def test_lambda_meets_fargate_at_47_6_percent_busy():
    assert costs.break_even_utilisation(**ONE_VCPU) == pytest.approx(0.476, abs=5e-4)


@pytest.mark.parametrize("call_s", [0.01, 0.1, 1.0, math.inf])
def test_at_the_break_even_both_bills_are_equal(call_s: float):
    share = costs.break_even_utilisation(**ONE_VCPU, call_s=call_s)
    busy_s = share * costs.MONTH_S
    function = costs.lambda_cost(busy_s / call_s, busy_s, costs.FULL_VCPU_MB)
    assert function == pytest.approx(costs.container_cost(costs.MONTH_S, 1, 2))


def test_short_calls_meet_the_container_sooner():
    shares = [costs.break_even_utilisation(**ONE_VCPU, call_s=s) for s in (0.005, 1)]
    assert shares[0] < shares[1] < costs.break_even_utilisation(**ONE_VCPU)


def test_provisioned_concurrency_pays_above_60_percent():
    share = costs.provisioned_break_even()
    assert share == pytest.approx(0.600, abs=5e-4)
    for busy_s, cheaper in ((share - 0.01, False), (share + 0.01, True)):
        ready = costs.provisioned_cost(1, busy_s, 1.0, 1024)
        assert (ready < costs.lambda_cost(1, busy_s, 1024)) is cheaper


@pytest.mark.parametrize("memory_mb", [128, 1769, 10_240])
def test_a_restore_costs_as_much_as_8_4_seconds_of_initialisation(memory_mb: int):
    seconds = costs.restore_in_init_s()
    assert seconds == pytest.approx(8.4, abs=0.05)
    restored = costs.lambda_cost(1, 0.0, memory_mb, restores=1)
    assert restored == pytest.approx(costs.lambda_cost(1, seconds, memory_mb))


def test_a_kept_snapshot_costs_by_the_second():
    kept = costs.lambda_cost(0, 0, 1024, snapshot_s=costs.MONTH_S)
    assert kept == pytest.approx(3.95, abs=0.01)  # US dollars a month and GB


@pytest.mark.parametrize(("rate", "keep_alive_s"), [(0.001, 300), (0.01, 300), (1, 2)])
def test_the_share_of_cold_calls_is_what_random_arrivals_show(
    rate: float, keep_alive_s: float
):
    chance = random.Random(7)
    calls = 100_000
    cold = sum(chance.expovariate(rate) > keep_alive_s for _ in range(calls))
    expected = costs.cold_probability(rate, keep_alive_s)
    spread = math.sqrt(expected * (1 - expected) / calls)
    assert cold / calls == pytest.approx(expected, abs=4 * spread)


def test_every_table_says_where_and_when_it_was_read():
    for price in costs.PRICES:
        assert price.source.startswith("https://")
        assert price.region
        year, month = map(int, price.read.split("-"))
        assert year >= 2025
        assert 1 <= month <= 12


def test_what_is_not_sold_has_no_cost():
    with pytest.raises(ValueError, match=r"Azure .* lists none; choose"):
        costs.provisioned_break_even(costs.AZURE_FLEX)
    with pytest.raises(ValueError, match="restore_per_gb"):
        costs.lambda_cost(1, 1, 128, costs.LAMBDA_ARM, restores=1)


@pytest.mark.parametrize("wrong", [-1.0, math.nan])
def test_negative_amounts_are_refused(wrong: float):
    with pytest.raises(ValueError, match="billed_s: expected 0 or more, found"):
        costs.lambda_cost(1, wrong, 128)
    with pytest.raises(ValueError, match="rate: expected"):
        costs.cold_probability(wrong, 300)


def test_the_picture_of_a_month(tmp_path: Path):
    def draw(ax):
        costs.draw_month(ax, **ONE_VCPU, call_s=0.1)
        names = [line.get_label() for line in ax.get_lines()]
        assert names == ["on demand", "provisioned", "container"]
        assert ax.get_lines()[0].get_ydata()[0] == 0

    assert picture(tmp_path / "month.png", draw).stat().st_size > 10_000


# -- the power tuner


def reports(memory_mb: int, *durations: float, **more: Any) -> list[Report]:
    def one(ms: float) -> Report:
        return Report("x", ms, math.ceil(ms), memory_mb, 90, **more)

    return [one(ms) for ms in durations]


CURVE = [
    *reports(128, 362, 360, 371),
    *reports(1024, 41, 41, 41),
    *reports(1769, 24, 24, 25),
    *reports(3008, 23.9, 23.9, 23.9),
]


def test_each_choice_is_the_best_of_its_kind():
    found = tuning.Tuning.of(CURVE)
    assert [p.memory_mb for p in found.points] == [128, 1024, 1769, 3008]
    assert found.points[0].duration_ms == 362
    assert found.cheapest.memory_mb == 1024
    assert found.fastest.memory_mb == 3008
    assert found.balanced().memory_mb == 1769
    assert found.balanced(1).memory_mb == 1024
    assert found.balanced(0).memory_mb == 3008
    with pytest.raises(tuning.TuningError, match="expected 0 to 1, found 2"):
        found.balanced(2)


def test_a_million_calls_cost_what_lambda_would_bill():
    (point,) = tuning.Tuning.of(reports(1024, 40.2, 40.7)).points
    assert point.billed_ms == 41
    assert point.usd_per_million == pytest.approx(0.20 + 41_000 * 16.6667e-6)


def test_cold_calls_and_sizes_that_fail_are_told_apart():
    cold = reports(512, 9_000, init_ms=800.0)
    dead = reports(128, 3_000, status="timeout")
    found = tuning.Tuning.of([*cold, *reports(512, 50), *dead, *reports(128, 90)])
    assert [(p.memory_mb, p.duration_ms, p.calls) for p in found.points] == [
        (512, 50, 1)
    ]
    assert found.failed == {128: "timeout"}
    with pytest.raises(tuning.TuningError, match=r"works, found \{128: 'timeout'\}"):
        tuning.Tuning.of(dead)
    with pytest.raises(tuning.TuningError, match="no warm call"):
        tuning.Tuning.of(cold)


def test_the_tuner_reads_the_log_of_any_lambda():
    lines = [f"2026-11-24T10:00:00Z  {report}" for report in CURVE]
    log = "START RequestId: x\n" + "\nEND RequestId: x\n".join(lines)
    assert tuning.reports_in(log) == CURVE


def test_the_picture_of_a_tuning_marks_the_best(tmp_path: Path):
    def draw(time_axis, cost_axis):
        tuning.draw_curve(time_axis, cost_axis, tuning.Tuning.of(CURVE))
        told = [text.get_text() for ax in (time_axis, cost_axis) for text in ax.texts]
        assert told == ["fastest: 3,008 MB", "cheapest: 1,024 MB"]
        assert "1,769" in cost_axis.get_title(loc="left")

    path = picture(tmp_path / "tuning.png", draw, panels=2, size=(12, 4.5))
    assert path.stat().st_size > 10_000


HANDLER = """
def work(event, context):
    if event["n"] < 0:
        raise ValueError("n")
    data = bytearray(event.get("mb", 0) << 20)
    return sum(range(event["n"])) + len(data)
"""


@pytest.fixture
def busy(tmp_path: Path) -> Function:
    (tmp_path / "busy.py").write_text(HANDLER)
    return Function("busy", "busy.work", code=tmp_path, timeout_s=20.0)


def test_a_real_function_is_tuned(busy: Function):
    heard: list[int] = []
    with Platform() as cloud:
        found = tuning.tune(
            cloud,
            busy,
            {"n": 500_000},
            sizes_mb=[256, 1769],
            calls=3,
            on_call=lambda: heard.append(1),
        )
    assert [(p.memory_mb, p.calls) for p in found.points] == [(256, 3), (1769, 3)]
    assert found.failed == {}
    assert len(heard) == 8
    assert found.fastest.memory_mb == 1769  # a seventh of the CPU is seven times slower


def test_a_size_that_is_too_small_is_named(busy: Function):
    with Platform() as cloud:
        asked = {"n": 10, "mb": 300}
        found = tuning.tune(cloud, busy, asked, sizes_mb=[128, 512], calls=1)
    assert [p.memory_mb for p in found.points] == [512]
    assert set(found.failed) == {128}


def test_a_payload_that_the_function_refuses_tunes_nothing(busy: Function):
    with Platform() as cloud, pytest.raises(tuning.TuningError, match="Tune with"):
        tuning.tune(cloud, busy, {"n": -1}, sizes_mb=[512], calls=1)
