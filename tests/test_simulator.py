"""The simulator beside theory, beside a slow one, and beside what must never happen."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from local_cloud.scaling import day, theory, traffic
from local_cloud.scaling.planning import cheapest, cost_per_1000
from local_cloud.scaling.policies import Load
from local_cloud.scaling.simulator import Fleet, Overflow, Trace, simulate
from scaling_strategies import (
    HPA,
    KPA,
    LeastConnections,
    PowerOfTwo,
    QueueLength,
    Random,
    RoundRobin,
)
from tests.benchmarks.balancer import Requests

MEAN_S = 0.05


def loaded(seed: int, servers: int, rho: float, requests: int):
    return traffic.steady(np.random.default_rng(seed), servers, rho, MEAN_S, requests)


# Known answers


@pytest.mark.parametrize(("servers", "rho"), [(1, 0.5), (2, 0.7), (5, 0.8), (20, 0.8)])
def test_one_queue_is_erlang_c(servers, rho):
    trace = simulate(*loaded(1, servers, rho, 1_000_000), Fleet(servers))
    trace = trace.after(100_000)
    load = servers * rho
    expected = theory.mmc_wait(servers, load, MEAN_S)
    assert trace.waits.mean() == pytest.approx(expected, rel=0.02)
    waits = theory.erlang_c(servers, load)
    assert (trace.waits > 0).mean() == pytest.approx(waits, rel=0.02)
    p99 = theory.mmc_wait_quantile(servers, load, MEAN_S, 0.99)
    assert np.quantile(trace.waits, 0.99) == pytest.approx(p99, rel=0.03)


def test_one_queue_for_slots_is_the_same():
    load = loaded(2, 6, 0.8, 20_000)
    apart, together = (simulate(*load, Fleet(n, slots=6 // n)) for n in (6, 2))
    assert np.array_equal(apart.ends, together.ends)


def test_constant_service_waits_half():
    arrivals, services = loaded(3, 1, 0.8, 500_000)
    services = traffic.constant(MEAN_S, len(services))
    trace = simulate(arrivals, services, Fleet(1))
    assert trace.waits.mean() == pytest.approx(theory.md1_wait(0.8, MEAN_S), rel=0.02)


def test_power_of_two_is_mitzenmachers():
    assert theory.power_of_choices(0.9, 50) == pytest.approx(130.70, abs=0.005)
    trace = simulate(*loaded(4, 1000, 0.9, 2_000_000), Fleet(1000), PowerOfTwo(seed=4))
    assert 1000 * trace.after(300_000).mean_s == pytest.approx(130.70, rel=0.01)


def test_round_robin_is_d_m_1():
    assert theory.round_robin(0.9, 50) == pytest.approx(258.9, abs=0.05)
    trace = simulate(*loaded(5, 1000, 0.9, 1_500_000), Fleet(1000), RoundRobin())
    expected = theory.round_robin(0.9, 50, 1000)
    assert 1000 * trace.after(700_000).mean_s == pytest.approx(expected, rel=0.02)


def test_random_is_m_m_1():
    assert theory.power_of_choices(0.9, 50, 1) == pytest.approx(500)
    trace = simulate(*loaded(6, 50, 0.9, 500_000), Fleet(50), Random(seed=6))
    assert 1000 * trace.after(70_000).mean_s == pytest.approx(500, rel=0.03)


def test_a_large_central_queue_waits_for_nobody():
    trace = simulate(*loaded(7, 1000, 0.9, 400_000), Fleet(1000))
    assert 50 + theory.mmc_wait(1000, 900, 50) == pytest.approx(50.0, abs=0.001)
    assert 1000 * trace.mean_s == pytest.approx(50.0, rel=0.01)


def test_the_order_of_balancing():
    """Who knows more waits less."""
    load = loaded(8, 20, 0.9, 120_000)
    pickers = [None, LeastConnections(), PowerOfTwo(seed=8), RoundRobin(), Random(8)]
    means = [simulate(*load, Fleet(20), picker).mean_s for picker in pickers]
    assert means == sorted(means)


def test_erlang_of_the_tables():
    """Erlang's own tables: 10 lines and 5 Erlang block 1.84 %."""
    assert theory.erlang_b(10, 5) == pytest.approx(0.01838, abs=5e-6)
    assert theory.erlang_c(1, 0.3) == pytest.approx(0.3)
    assert theory.erlang_c(2, 3) == 1.0
    assert math.isinf(theory.mmc_wait(2, 2, 1))
    assert theory.round_robin(0.9, 1, 1) == pytest.approx(10)  # of one server: M/M/1


@pytest.mark.parametrize(("skew", "size"), [(0.8, 100), (1.0, 400), (1.2, 50)])
def test_che_is_a_simulated_lru(skew, size):
    items, requests = 2_000, 1_000_000
    popularity = 1 / np.arange(1, items + 1) ** skew
    rng = np.random.default_rng(9)
    asked = rng.choice(items, requests, p=popularity / popularity.sum()).tolist()
    cache: OrderedDict[int, None] = OrderedDict()
    hits, warm = 0, requests // 10
    for i, item in enumerate(asked):
        if item in cache:
            cache.move_to_end(item)
            hits += i >= warm
        else:
            cache[item] = None
            if len(cache) > size:
                cache.popitem(last=False)
    rate = hits / (requests - warm)
    assert theory.che_hit_rate(popularity, size) == pytest.approx(rate, abs=0.002)


def test_che_at_its_edges():
    popularity = np.ones(10)
    assert theory.che_hit_rate(popularity, 0) == 0
    assert theory.che_hit_rate(popularity, 10) == pytest.approx(1)
    assert theory.che_hit_rate(popularity, 5) == pytest.approx(0.5)


# Beside a slow simulator, which looks at every moment of a small run


def slowly(arrivals, services, servers):
    """First come first served in one queue, written down directly."""
    free, ends = [0.0] * servers, []
    for arrival, service in zip(arrivals, services, strict=True):
        first = free.index(min(free))
        free[first] = max(free[first], arrival) + service
        ends.append(free[first])
    return ends


TIMES = some.lists(some.floats(0, 10), min_size=1, max_size=60)


@settings(deadline=None)
@given(gaps=TIMES, servers=some.integers(1, 5), data=some.data())
def test_one_queue_is_what_it_says(gaps, servers, data):
    services = data.draw(
        some.lists(some.floats(0, 20), min_size=len(gaps), max_size=len(gaps))
    )
    arrivals = np.cumsum(gaps)
    trace = simulate(arrivals, np.array(services), Fleet(servers))
    assert trace.ends == pytest.approx(slowly(arrivals, services, servers))


@settings(deadline=None)
@given(gaps=TIMES, servers=some.integers(1, 5), data=some.data())
def test_round_robin_is_a_queue_each(gaps, servers, data):
    services = np.array(
        data.draw(
            some.lists(some.floats(0, 20), min_size=len(gaps), max_size=len(gaps))
        )
    )
    arrivals = np.cumsum(gaps)
    trace = simulate(arrivals, services, Fleet(servers), RoundRobin())
    for i in range(servers):
        one = slice(i, None, servers)
        assert trace.ends[one] == pytest.approx(slowly(arrivals[one], services[one], 1))


# Replicas that come and go


@dataclass
class Plan:
    """An autoscaler that follows a list, then stays; remembers what it saw."""

    wanted: list[int]
    seen: list[Load] = field(default_factory=list)

    def desired(self, load: Load) -> int:
        self.seen.append(load)
        return self.wanted[min(len(self.seen), len(self.wanted)) - 1]

    def reset(self) -> None:
        self.seen = []


@settings(deadline=None, max_examples=80)
@given(
    wanted=some.lists(some.integers(0, 6), max_size=20),
    seed=some.integers(0, 10_000),
    slots=some.integers(1, 3),
    start_s=some.sampled_from([0.0, 0.3, 2.5]),
    picker=some.sampled_from([None, RoundRobin, LeastConnections, PowerOfTwo]),
)
def test_nothing_is_lost_while_replicas_come_and_go(
    wanted, seed, slots, start_s, picker
):
    rng = np.random.default_rng(seed)
    arrivals = traffic.poisson(rng, 20, 200)
    services = traffic.exponential(rng, 0.1, 200)
    fleet = Fleet(2, slots, start_s, tick_s=0.5)
    plan = Plan([*wanted, 1])  # at least one in the end
    trace = simulate(arrivals, services, fleet, picker() if picker else None, plan)
    assert (trace.starts >= arrivals).all()
    assert trace.ends == pytest.approx(trace.starts + services)
    assert trace.busy_s <= trace.replica_s * slots + 1e-6
    # Never more in work than slots of replicas that were ever asked for at once.
    most = slots * sum([2, *(max(0, t.desired - t.load.replicas) for t in trace.ticks)])
    moments = np.searchsorted(np.sort(trace.starts), trace.starts, side="right")
    ended = np.searchsorted(np.sort(trace.ends), trace.starts, side="right")
    assert (moments - ended).max() <= most


def test_a_new_replica_serves_when_it_has_started():
    arrivals, services = np.zeros(3), np.full(3, 10.0)
    fleet = Fleet(1, start_s=4, tick_s=1)
    trace = simulate(arrivals, services, fleet, None, Plan([2]))
    assert trace.starts.tolist() == [0, 5, 10]  # asked for at 1 s, ready at 5 s
    assert trace.ends.tolist() == [10, 15, 20]
    assert trace.replica_s == 20 + 19


def test_a_removed_replica_ends_its_work_and_gets_no_more():
    arrivals, services = np.array([0.0, 0.0, 2.0, 2.5]), np.full(4, 3.0)
    fleet = Fleet(2, tick_s=1)
    trace = simulate(arrivals, services, fleet, RoundRobin(), Plan([1]))
    assert trace.starts.tolist() == [0, 0, 3, 6]
    assert trace.replica_s == 9 + 3  # the second one left at 3 s


def test_requests_wait_for_a_fleet_of_none():
    fleet = Fleet(0, start_s=2, tick_s=1)
    for picker in (None, RoundRobin()):
        trace = simulate(np.array([0.5, 0.6]), np.ones(2), fleet, picker, Plan([1]))
        assert trace.starts.tolist() == [3, 4]


def test_an_autoscaler_sees_what_happens():
    """Three requests of 1.5 s from 0 s on, at one replica, seen every second."""
    plan = Plan([1])
    simulate(np.zeros(3), np.full(3, 1.5), Fleet(1, tick_s=1), None, plan)
    assert [load.concurrency for load in plan.seen] == [3, 2.5, 2, 1, 0.5]
    assert [load.queue for load in plan.seen] == [2, 1, 0, 0, 0]
    plan = Plan([1])
    fleet = Fleet(1, slots=2, tick_s=1, metric="utilisation")
    simulate(np.zeros(3), np.full(3, 1.5), fleet, None, plan)
    assert [load.metric for load in plan.seen] == [1, 0.75, 0.5]


@pytest.mark.parametrize(
    "policy",
    [HPA(2.0, metric="requests", maximum=40), KPA(2, maximum=40), QueueLength(2.0)],
)
def test_the_lessons_policies_follow_a_day(policy):
    rng = np.random.default_rng(10)
    arrivals = traffic.daily(rng, low=2, high=60, day_s=3600)
    services = traffic.lognormal(rng, 0.2, 1.0, len(arrivals))
    fleet = Fleet(2, start_s=5, tick_s=2)
    trace = simulate(arrivals, services, fleet, LeastConnections(), policy)
    ready = [tick.load.ready for tick in trace.ticks]
    assert max(ready) >= 8  # at noon 12 Erlang
    assert ready[-1] < max(ready)
    assert trace.replica_s < max(ready) * 3600  # cheaper than noon's fleet all day


def test_a_fleet_that_never_comes_is_an_error():
    with pytest.raises(ValueError, match="found 1 without a replica"):
        simulate(np.zeros(1), np.ones(1), Fleet(0), None, Plan([0]))


# Somewhere else


def test_a_burst_overflows_to_the_cloud():
    load = loaded(11, 4, 1.5, 20_000)
    fleet = Fleet(4, overflow=Overflow(limit=8, extra_s=0.1))
    trace = simulate(*load, fleet)
    elsewhere = trace.overflowed
    assert 0.3 < elsewhere.mean() < 0.5  # a third cannot be served here
    assert trace.waits[elsewhere].max() == 0
    extra = trace.sojourns[elsewhere] - load[1][elsewhere]
    assert extra == pytest.approx(np.full(elsewhere.sum(), 0.1))
    # Whoever stays finds at most seven others: Erlang's loss, with places to wait.
    assert trace.waits[~elsewhere].max() < 10 * 8 * MEAN_S
    price = cost_per_1000(trace, price_hour=1.0, price_overflow=0.01)
    hours = trace.replica_s / 3600
    assert price == pytest.approx((hours + 0.01 * elsewhere.sum()) / 20)


def test_overflow_without_waiting_is_erlang_b():
    fleet = Fleet(5, overflow=Overflow(limit=5))
    trace = simulate(*loaded(12, 5, 0.8, 400_000), fleet)
    expected = theory.erlang_b(5, 4)
    assert trace.overflowed.mean() == pytest.approx(expected, rel=0.02)


# Cost at the promise


def test_the_cheapest_fleet_is_the_first_that_keeps_the_promise():
    arrivals, services = loaded(13, 10, 0.8, 50_000)

    def simulated(replicas: int) -> Trace:
        return simulate(arrivals, services, Fleet(replicas), LeastConnections())

    plan = cheapest(simulated, target_s=0.2, price_hour=3.6, most=64)
    assert plan
    assert plan.p95_s <= 0.2 < simulated(plan.replicas - 1).quantile(0.95)
    assert plan.per_1000 == pytest.approx(
        simulated(plan.replicas).replica_s * 0.001 / 50
    )
    assert cheapest(simulated, target_s=0.01, price_hour=1, most=64) is None


def test_one_fast_server_beats_two_slow_ones():
    """Vertical against horizontal, if twice the machine is twice as fast."""
    arrivals, services = loaded(14, 2, 0.7, 500_000)
    fast = simulate(arrivals, services / 2, Fleet(1))
    slow = simulate(arrivals, services, Fleet(2))
    assert fast.mean_s < slow.mean_s
    assert fast.mean_s == pytest.approx(MEAN_S / 2 / 0.3, rel=0.03)


# Load, and misuse


def test_the_same_seed_is_the_same_run():
    means = {
        simulate(*loaded(15, 10, 0.9, 5_000), Fleet(10), PowerOfTwo(seed=1)).mean_s
        for _ in range(2)
    }
    assert len(means) == 1


def test_traffic_is_what_it_says():
    rng = np.random.default_rng(16)
    day = traffic.daily(rng, 10, 50, 1000, days=2)
    assert len(day) == pytest.approx(60_000, rel=0.02)
    noon = ((day > 450) & (day < 550)).sum() / 100
    assert noon == pytest.approx(50, rel=0.05)
    burst = traffic.bursts(rng, 10, 100, 9, 1, 20_000)
    assert len(burst) / 20_000 == pytest.approx(19, rel=0.05)
    counts = np.bincount(burst.astype(int))
    assert counts.var() > 10 * counts.mean()  # Poisson: equal
    for seconds in (
        traffic.lognormal(rng, 2.0, 3.0, 400_000),
        traffic.exponential(rng, 2.0, 400_000),
    ):
        assert seconds.mean() == pytest.approx(2.0, rel=0.05)
    answers = traffic.language_model(
        rng,
        100_000,
        prompt_tokens=500,
        answer_tokens=100,
        longest=10_000,
        prefill_per_s=5_000,
        decode_per_s=50,
    )
    assert answers.mean() == pytest.approx(0.1 + 2.0, rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_gaps_and_services_know_nothing_of_each_other(seed):
    """Or a long service always follows a long gap, and queues look short."""
    benchmark = Requests.drawn(60.0, seed)
    arrivals = day.arrivals(seed, 3600)
    simulated = day.services(seed, 0.5, len(arrivals))
    for due, services in (
        (benchmark.due, benchmark.services),
        (arrivals, simulated),
        loaded(seed, 5, 0.8, 10_000),
    ):
        gaps = np.diff(due)
        for after in (services[1:], services[:-1]):
            assert abs(np.corrcoef(gaps, after)[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: simulate(np.zeros(2), np.ones(1), Fleet(1)), "as many services"),
        (lambda: simulate(np.zeros(0), np.zeros(0), Fleet(1)), "at least one"),
        (lambda: simulate(np.array([1.0, 0.0]), np.ones(2), Fleet(1)), "ascending"),
        (lambda: simulate(np.zeros(1), -np.ones(1), Fleet(1)), "below 0"),
        (lambda: simulate(np.zeros(1), np.ones(1), Fleet(0)), "found neither"),
        (lambda: Fleet(1, slots=0), "slots"),
        (lambda: Fleet(-1), "replicas"),
        (lambda: Fleet(1, tick_s=0), "tick_s"),
        (
            lambda: traffic.varying(np.random.default_rng(1), lambda t: t, 1, 100),
            "raise peak",
        ),
        (lambda: theory.erlang_b(-1, 1), "at least 0"),
    ],
)
def test_misuse_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
