"""The lesson's own trials: live scaling, a peak, what is reused, what is told of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import models
import scaling_strategies as lesson_file
from course import draw
from course.lesson import Run
from local_cloud.scaling import day, planning, releases, reuse, theory, traffic, trials
from local_cloud.scaling import peak as peaks
from local_cloud.scaling.haproxy import NoHAProxy
from local_cloud.scaling.jobs import SQLiteJobs
from local_cloud.scaling.policies import Limit, Rules
from local_cloud.scaling.redis_jobs import RedisJobs, redis_server
from local_cloud.scaling.simulator import Fleet, Trace, simulate
from scaling_strategies import HPA, LeastConnections, live_through, manifests
from tests.job_fixtures import needs_redis

WAVE = trials.Wave(seconds=2.5, low=5, high=60, most=4, tick_s=0.25, after_s=3.0)
PEAK = peaks.Peak(seconds=0.3, lease_s=2.0)


def quick_hpa() -> HPA:
    up, down = Rules(0, (Limit("Pods", 4, 1),)), Rules(1, (Limit("Percent", 100, 1),))
    return HPA(1.0, 1, WAVE.most, metric="requests", up=up, down=down)


@pytest.fixture(params=["haproxy", "portable"])
def balancers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The balancer that a machine has, and the one for machines without HAProxy."""
    if request.param == "haproxy":
        try:
            trials.find()
        except NoHAProxy as missing:
            pytest.skip(str(missing))
        return "HAProxy"

    def none_here() -> str:
        raise NoHAProxy("none here")

    monkeypatch.setattr(trials, "find", none_here)
    return "Proxy"


# Live.


def test_replicas_come_and_go_with_the_load_and_nothing_fails(
    balancers: str, tmp_path: Path
):
    found = trials.live(quick_hpa(), LeastConnections(), WAVE)
    assert found.balancer == balancers
    assert found.failed == 0
    assert len(found.outcomes) == len(found.simulated.arrivals) > 50
    assert found.most > 1
    assert found.ticks[0].load.ready == 1
    assert found.ticks[-1].desired < max(tick.desired for tick in found.ticks)
    assert max(tick.load.ready for tick in found.simulated.ticks) > 1
    table = trials.live_table(found)
    assert "waits instead of computing" in table.note
    assert table.note.startswith("0 failed")
    path = draw.picture(
        tmp_path / "live.png", lambda *axes: trials.draw_live(found, *axes), panels=3
    )
    assert path.stat().st_size > 10_000


def test_theory_is_drawn_where_a_queue_can_settle():
    ready, work = np.array([1, 2, 2, 0]), np.array([0.5, 1.0, 1.99, 0.2])
    stays = trials.stay_by_theory(ready, work, 0.05)
    assert stays[0] == pytest.approx(0.1)  # M/M/1 at half load
    assert stays[1] == pytest.approx(theory.mmc_wait(2, 1.0, 0.05) + 0.05)
    assert np.isnan(stays[2:]).all()


def test_latency_is_told_by_the_second_of_arrival():
    times, means = trials.by_second([0.1, 0.9, 2.5], np.array([0.1, 0.3, 0.5]))
    assert times == [0.5, 2.5]
    assert means == pytest.approx([200, 500])


def test_a_region_that_dies_costs_time_and_no_request():
    try:
        found = trials.failover(0.1, seconds=0.8)
    except NoHAProxy as missing:
        pytest.skip(str(missing))
    assert found.failed == 0
    assert found.median_ms(after=True) > 100  # the distance, there and back
    assert min(one.total_s for one in found.outcomes) < 0.1


# The day.


def test_the_day_is_the_same_each_time_and_has_a_noon():
    days = [day.arrivals(1, 3600) for _ in range(2)]
    assert (days[0] == days[1]).all()
    morning, _, noon = np.histogram(days[0], [0, 600, 1500, 2100])[0]
    assert noon > 3 * morning


def test_autoscalers_serve_all_and_cost_less_than_the_peaks_fleet():
    arrivals = day.arrivals(2, 1800)
    traces = {name: live_through(arrivals, name) for name in lesson_file.SCALERS}
    assert all(len(trace.ends) == len(arrivals) for trace in traces.values())
    terms = day.Terms(promise_s=2.0, price_hour=1.0)
    costs = {name: terms.per_1000(trace) for name, trace in traces.items()}
    assert costs["HPA"] < costs[lesson_file.FOR_PEAK]
    assert costs["KPA"] < costs[lesson_file.FOR_PEAK]
    table = day.table(traces, terms)
    assert [row[0] for row in table.rows] == list(lesson_file.SCALERS)
    office = table.rows[0]
    assert office[1] == pytest.approx(lesson_file.OFFICE, rel=0.01)
    kept = {row[0]: row[5] for row in table.rows}
    assert kept[lesson_file.FOR_PEAK] == "yes"
    assert kept == {
        name: "yes" if trace.quantile(0.95) <= 2.0 else "no"
        for name, trace in traces.items()
    }


def test_the_cheapest_fleet_is_told_with_its_price(capsys: pytest.CaptureFixture[str]):
    load = traffic.steady(np.random.default_rng(1), 4, 0.8, 0.5, 5_000)

    def simulated(replicas: int) -> Trace:
        return simulate(*load, Fleet(replicas), LeastConnections())

    terms, run = day.Terms(promise_s=2.0, price_hour=0.5), Run()
    day.show_cheapest(run, LeastConnections, load, terms)
    told = run.events[-1]
    plan = planning.cheapest(simulated, 2.0, 0.5, most=64)
    assert plan
    assert f"{plan.replicas} replicas" in told["name"]
    assert (told["value"], told["unit"]) == (plan.per_1000, "$")
    day.show_cheapest(run, LeastConnections, load, replace(terms, promise_s=0.001))
    assert run.events[-1]["value"] == f"more than {day.MOST}"


@pytest.mark.parametrize(("failing", "verdict"), [(0.0, "promote"), (0.5, "roll back")])
def test_a_canary_meets_its_users_alone_and_is_judged(failing: float, verdict: str):
    found = releases.split(users=60, share=0.2, failing=failing, rounds=3)
    assert found.verdict == verdict
    assert found.strayed == 0
    users = [f"user-{n}" for n in range(60)]
    chosen = [releases.version_for(user, 0.2, "live") for user in users]
    assert found.met == chosen.count("canary") > 0
    rounds = found.canary.requests // found.met
    assert found.stable == releases.Outcomes(rounds * (60 - found.met), 0)
    assert (found.canary.failures > 0) == (failing > 0)


def test_who_looks_again_and_again_is_wrong_more_often_than_the_judge():
    naive, proper = releases.false_alarms(200, 50, 200, 0.02, seed=3)
    assert naive > 0.1
    assert proper <= 0.05
    assert releases.false_alarms(10, 5, 10, 0.0, seed=1) == (0.0, 0.0)


def test_a_majority_is_right_as_often_as_the_binomial_says():
    assert releases.majority_right(0.8, 3, 20_000, seed=1) == pytest.approx(
        0.8**3 + 3 * 0.8**2 * 0.2, abs=0.01
    )
    assert releases.majority_right(1.0, 3, 10, seed=1) == 1.0


# A peak.


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with peaks.server(PEAK) as url:
        yield url


def test_a_server_alone_refuses_most_of_a_peak(server: str, balancers: str):
    peak = replace(PEAK, rate_per_s=400, patience_s=0.1)
    outcomes = peaks.direct(server, LeastConnections(), peak)
    assert {outcome.status for outcome in outcomes} == {200, 503}
    assert len(outcomes) == 120


def check_queued(found: peaks.Queued) -> None:
    assert (found.accepted, found.refused, found.lost) == (len(PEAK.due), 0, 0)
    assert found.done == found.accepted
    assert (found.killed_state, found.killed_tries) == ("done", 2)
    assert found.redelivered_s <= PEAK.lease_s + 5  # a busy machine stands still
    assert (found.poison_state, found.poison_tries) == ("dead", 5)
    told = peaks.table(len(PEAK.due), 40, {"a queue": found}, PEAK).cells()
    assert told[0][1:3] == ["40", f"{len(PEAK.due) - 40}"]
    assert told[1][-1] == "dead, 5 tries"


def test_a_queue_keeps_all_of_a_peak(server: str, tmp_path: Path):
    check_queued(peaks.queued(str(tmp_path / "jobs"), server, PEAK))


@needs_redis
def test_so_does_redis(server: str, tmp_path: Path):
    with redis_server(tmp_path) as url:
        check_queued(peaks.queued(url, server, PEAK))


def test_a_queue_is_opened_by_its_place(tmp_path: Path):
    with peaks.opened(str(tmp_path / "jobs")) as here:
        assert isinstance(here, SQLiteJobs)
    with peaks.opened("redis://127.0.0.1:1/0") as there:  # opens nothing yet
        assert isinstance(there, RedisJobs)


# What is reused.


def test_jobs_are_done_by_whatever_does_them(tmp_path: Path):
    with SQLiteJobs(tmp_path / "jobs") as jobs:
        found = reuse.answered(jobs, lambda n: n * n, [2, 3])
    assert [(one.state, one.result) for one in found] == [("done", 4), ("done", 9)]


def test_jobs_that_never_end_are_not_waited_for_for_ever(tmp_path: Path):
    def fails(_: int) -> None:
        raise ValueError("no")

    with (
        SQLiteJobs(tmp_path / "jobs") as jobs,
        pytest.raises(TimeoutError, match="1 jobs to end"),
    ):
        reuse.answered(jobs, fails, [1], deadline_s=0.3)


def test_a_beginning_stays_with_a_replica_and_turns_do_not():
    names = ("one", "two", "three")
    turns, routed = reuse.by_turns(names), reuse.by_prefix(names)
    prompt = list(range(64))
    assert [turns(prompt) for _ in range(4)] == ["one", "two", "three", "one"]
    assert len({routed([*prompt, question]) for question in range(20)}) == 1
    others = {routed(list(range(start, start + 64))) for start in range(0, 6400, 64)}
    assert others == set(names)


def test_routing_by_prefix_finds_more_than_turns(model: models.Model):
    def load() -> models.Model:
        return models.load(rows=2, context=512, shelf=8)

    prompts = reuse.conversations(model, beginnings=12, count=48, seed=1)
    turns, routed = reuse.compare_routing(("one", "two", "three"), load, prompts, 24)
    assert routed >= turns + 25


def test_a_crowd_costs_one_answer_whatever_the_cache_holds(model: models.Model):
    from model_api import create_app
    from serving.settings import Settings

    app = create_app(Settings(ttft_target_ms=600_000), model=model)
    found = reuse.ask_repeatedly(app, model, callers=20, tokens=4)
    assert [(one.what, one.computed) for one in found] == [
        ("none", 20),
        ("empty", 1),
        ("full", 0),
        ("outdated", 1),
    ]
    assert len(reuse.asked_table(found).rows) == 4


# What is told, and what is deployed.


def test_without_redis_the_lesson_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: models.Model,
):
    monkeypatch.setattr(peaks.shutil, "which", lambda name: None)
    run = Run(quick=True)
    run._kept["model"] = model
    lesson_file.demo_queues(run)
    told = capsys.readouterr().out
    assert "SKIPPED" in told
    assert "apt-get install -y redis-server" in told
    kinds = [event["kind"] for event in run.events]
    assert kinds[-1] == "concluded"
    assert "0 lost" in json.dumps(run.events[-1])


def test_keda_reads_the_stream_that_the_queue_writes():
    (scaled,) = (d for d in manifests()["keda.yaml"] if d["kind"] == "ScaledObject")
    queue = RedisJobs("redis://127.0.0.1:1/0")
    for trigger in scaled["spec"]["triggers"]:
        assert trigger["metadata"]["stream"] == f"{{{queue.name}}}:priority:0"
        assert trigger["metadata"]["consumerGroup"] == "workers"


def test_what_theory_knows_is_ordered_as_the_lesson_claims():
    known = lesson_file.FLEET.known_s()
    order = ["random", "round robin", "power of two", "central queue"]
    figures = [known[name] or math.nan for name in order]
    assert figures == sorted(figures, reverse=True)
    assert known["power of two"] == pytest.approx(0.1307, rel=1e-3)
    assert known["random"] == pytest.approx(0.5, rel=1e-3)


def test_also_a_quick_look_at_balancing_is_near_to_theory():
    found = trials.balance(Run(), lesson_file.PICKERS, lesson_file.SMALL, 150_000)
    for name, known in lesson_file.SMALL.known_s().items():
        if known:
            assert found[name] == pytest.approx(1000 * known, rel=0.1)
