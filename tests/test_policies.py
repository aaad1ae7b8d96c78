"""The lesson's policies: beside the originals' numbers, under noise, and misused."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as some

from local_cloud.scaling.policies import Limit, Load, Rules
from local_cloud.scaling.releases import Outcomes, judge, majority, version_for
from scaling_strategies import (
    DEFAULT_DOWN,
    DEFAULT_UP,
    HPA,
    KPA,
    PICKERS,
    LeastConnections,
    PowerOfTwo,
    QueueLength,
    Random,
    RoundRobin,
)
from tests import policy_vectors as vectors

QUIET = settings(deadline=None, max_examples=60)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case[0])


@named(vectors.RATIOS)
def test_hpa_recommends_what_kubernetes_does(case):
    _, metric, target, readings, silent, unready, expected = case
    policy = HPA(target, maximum=1000, metric=metric)
    mean = sum(readings) / len(readings) if readings else None
    ready = len(readings) + silent
    load = Load(0.0, ready, unready, metric=mean, missing=silent)
    assert policy.recommend(load) == expected


@named(vectors.RATES)
def test_hpa_moves_as_fast_as_kubernetes(case):
    _, way, numbers, changes, current, wanted, minimum, maximum, expected = case
    pods, pods_s, percent, percent_s = numbers
    limits = [Limit("Pods", pods, pods_s)] if pods_s else []
    limits += [Limit("Percent", percent, percent_s)] if percent_s else []
    rules: dict[str, Any] = {way: Rules(0, tuple(limits))}
    policy = HPA(1.0, minimum, maximum, **rules)
    policy._pace.changed = [(970.0, change) for change in changes]
    assert (
        policy._pace.limited(1000.0, current, wanted, policy.minimum, policy.maximum)
        == expected
    )


@named(vectors.WINDOWS)
def test_hpa_looks_back_as_kubernetes_does(case):
    _, up_s, down_s, past, current, wanted, expected = case
    up, down = Rules(up_s, DEFAULT_UP.limits), Rules(down_s, DEFAULT_DOWN.limits)
    policy = HPA(1.0, maximum=1000, up=up, down=down)
    policy._pace.recommended = [(10_000.0 - age, n) for age, n in past]
    assert policy._pace.stabilised(10_000.0, current, wanted) == expected


@named(vectors.BOUNDS)
def test_hpa_keeps_its_bounds(case):
    _, minimum, maximum, current, mean, expected = case
    policy = HPA(1.0, minimum, maximum)
    assert policy.desired(Load(0.0, current, metric=mean)) == expected


@named(vectors.KPA)
def test_kpa_decides_what_knative_does(case):
    _, given_settings, steps = case
    rates = {"max_up": 10.0, "max_down": 10.0}
    policy = KPA(**{**rates, "utilisation": 1.0, "maximum": 10_000, **given_settings})
    for now, ready, stable, panic, expected in steps:
        assert policy.decide(now, ready, stable, panic) == expected


@named(vectors.QUEUES)
def test_queue_length_does_what_keda_says(case):
    _, given_settings, steps = case
    policy = QueueLength(**given_settings)
    for now, replicas, queue, expected in steps:
        assert policy.desired(Load(now, replicas, queue=queue)) == expected


def test_there_are_enough_vectors():
    hpa = [vectors.RATIOS, vectors.RATES, vectors.WINDOWS, vectors.BOUNDS]
    assert sum(map(len, hpa)) >= 30
    assert sum(len(steps) for _, _, steps in vectors.KPA) >= 30


def test_hpa_counts_its_own_moves():
    """Doubling within 15 s is used up by one move, and free again afterwards."""
    policy = HPA(1.0, maximum=100)
    assert policy.desired(Load(0.0, 10, metric=9.0)) == 20
    assert policy.desired(Load(5.0, 20, metric=9.0)) == 20
    assert policy.desired(Load(15.0, 20, metric=9.0)) == 40


def test_kpa_reads_both_looks_from_its_past():
    policy = KPA(target=10, utilisation=0.7, maximum=100)
    for tick in range(30):
        assert policy.desired(Load(2.0 * tick, 1, concurrency=7)) == 1
    # 6 s of 70 in flight: the long look barely moves, the short one asks for ten.
    wanted = [policy.desired(Load(t, 1, concurrency=70)) for t in (60.0, 62.0, 64.0)]
    assert wanted == [4, 7, 10]
    calm = [policy.desired(Load(66.0 + 2 * t, 10, concurrency=1)) for t in range(30)]
    assert set(calm) == {10}  # panic removes nothing
    later = [policy.desired(Load(126.0 + 2 * t, 10, concurrency=1)) for t in range(30)]
    assert min(later) == 5  # then at most by half in a tick


def test_kpa_lets_the_last_replica_go_after_the_grace():
    policy = KPA()
    wanted = [policy.desired(Load(2.0 * t, 1)) for t in range(20)]
    assert wanted == [1] * 15 + [0] * 5
    assert policy.desired(Load(40.0, 0)) == 0
    assert policy.desired(Load(42.0, 0, concurrency=1)) == 1


def test_kpa_that_just_started_keeps_what_there_is():
    assert KPA().desired(Load(0.0, 5, concurrency=1)) == 5


def test_hpa_is_off_where_there_is_nothing():
    """Kubernetes: autoscaling is disabled for what was scaled to 0."""
    assert HPA(1.0, minimum=2).desired(Load(0.0, 0, metric=9.0, queue=9)) == 0


@pytest.mark.parametrize("policy", [HPA(1.0), KPA(), QueueLength()])
def test_reset_forgets_everything(policy):
    fresh = memory(policy)
    for tick in range(5):
        policy.desired(Load(float(tick), 2, metric=3.0, queue=9, concurrency=300.0))
    assert memory(policy) != fresh
    policy.reset()
    assert memory(policy) == fresh


def memory(policy) -> dict[str, str]:
    """All that a policy holds, and an HPA within it."""
    whose = {"": policy, "its HPA's ": getattr(policy, "hpa", policy)}
    return {
        f"{who}{name}": repr(getattr(one, name))
        for who, one in whose.items()
        for name in {*vars(one), *getattr(one, "__dataclass_fields__", ())}
    }


# Noise


def noisy(policy, total: float, seed: int, hours: float, tick_s: float) -> list[int]:
    """Replicas over time under a steady load whose reading is off by up to 5 %."""
    rng, replicas = random.Random(seed), max(1, math.ceil(total))
    history = [replicas]
    for tick in range(int(hours * 3600 / tick_s)):
        now, seen = tick * tick_s, total * rng.uniform(0.95, 1.05)
        load = Load(now, replicas, metric=seen / replicas, concurrency=seen)
        replicas = policy.desired(load)
        history.append(replicas)
    return history


def turns(history: list[int]) -> int:
    """How often a fleet that had grown shrank, or the other way round."""
    steps = [b - a for a, b in pairwise(history) if a != b]
    return sum(a * b < 0 for a, b in pairwise(steps))


@QUIET
@given(total=some.floats(0.2, 40), seed=some.integers(0, 2**32))
def test_hpa_does_not_flap_under_noise(total, seed):
    policy = HPA(1.0, maximum=100)
    history = noisy(policy, total, seed, hours=4, tick_s=15)
    settled = history[300 // 15 + 1 :]  # before, it has no past to hold it back
    assert turns(settled) == 0
    assert abs(history[-1] - total) <= 1 + 0.1 * total


@QUIET
@given(total=some.floats(0.2, 40), seed=some.integers(0, 2**32))
def test_kpa_does_not_flap_under_noise(total, seed):
    """A mean of 30 readings is off by 0.5 % (one deviation): 3 % are six of them.

    Closer to a whole number of replicas Knative itself has no answer but a delay. Just
    below one replica the short look, of three readings, may ask for a second: panic.
    """
    assume(abs(total / max(1, round(total)) - 1) > 0.03)
    assume(not 1 / 1.05 <= total <= 1)
    policy = KPA(target=1.0, utilisation=1.0, maximum=100)
    history = noisy(policy, total, seed, hours=1, tick_s=2)
    settled = history[60:]  # the first minute has fewer readings to average
    assert set(settled) == {math.ceil(total)}


@QUIET
@given(total=some.floats(0.2, 40), seed=some.integers(0, 2**32))
def test_kpa_with_a_delay_keeps_what_it_added(total, seed):
    policy = KPA(target=1.0, utilisation=1.0, maximum=100, delay_s=300)
    history = noisy(policy, total, seed, hours=1, tick_s=2)
    for i, (before, after) in enumerate(pairwise(history)):
        if after > before:
            assert min(history[i + 1 : i + 150]) >= after


# Impossible numbers


@pytest.mark.parametrize(
    "make",
    [
        lambda: HPA(0),
        lambda: HPA(-1),
        lambda: HPA(math.nan),
        lambda: HPA(1, minimum=0),
        lambda: HPA(1, minimum=5, maximum=2),
        lambda: KPA(target=0),
        lambda: KPA(utilisation=0),
        lambda: KPA(minimum=-1),
        lambda: KPA(maximum=0),
        lambda: HPA(1.0, 1.5, 2.5),  # type: ignore[arg-type]
        lambda: HPA(1.0, tolerance=math.nan),
        lambda: HPA(1.0, tolerance=-0.1),
        lambda: KPA(target=-1, utilisation=-1),
        lambda: KPA(max_down=0),
        lambda: KPA(max_up=0.5),
        lambda: KPA(panic_at=math.nan),
        lambda: KPA(stable_s=0),
        lambda: KPA(panic_s=-6),
        lambda: KPA(grace_s=-1),
        lambda: Limit("pods", 4),  # type: ignore[arg-type]
        lambda: Limit("Pods", -4),
        lambda: Limit("Percent", 1.5),  # type: ignore[arg-type]
        lambda: Limit("Percent", 100, period_s=0),
        lambda: Rules(0, ()),
        lambda: Rules(-1, DEFAULT_UP.limits),
        lambda: QueueLength(activation=-1),
        lambda: QueueLength(cooldown_s=-1),
        lambda: QueueLength(per_replica=0),
        lambda: QueueLength(minimum=3, maximum=2),
    ],
)
def test_impossible_numbers_are_refused(make):
    with pytest.raises(ValueError, match=r"(?s)expected .*found|expected a minimum"):
        make()


@pytest.mark.parametrize("policy", [HPA(1.0), KPA()])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_reading_moves_nothing(policy, broken):
    policy.reset()
    load = Load(0.0, 3, 1, metric=broken, concurrency=broken)
    assert policy.desired(load) == 4


@QUIET
@given(
    policy=some.sampled_from([HPA(1.0, 2, 9), KPA(1.0, minimum=2, maximum=9)]),
    looks=some.lists(
        some.tuples(
            some.floats(-1e6, 1e6),  # clocks may jump, also back
            some.integers(0, 20),
            some.integers(0, 20),
            some.floats(-10, 1e6) | some.none(),
            some.integers(0, 5),
        ),
        max_size=30,
    ),
)
def test_whatever_is_read_the_bounds_hold(policy, looks):
    policy.reset()
    for now, ready, starting, reading, missing in looks:
        missing = min(missing, ready)
        load = Load(now, ready, starting, reading, missing, concurrency=reading or 0)
        off = isinstance(policy, HPA) and load.replicas == 0
        assert off or 2 <= policy.desired(load) <= 9


# Balancing


def test_round_robin_is_fair():
    picker = RoundRobin()
    assert [picker.pick([9, 0, 0]) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_round_robin_survives_a_fleet_that_shrinks():
    picker = RoundRobin()
    for count in (5, 4, 1, 3):
        assert 0 <= picker.pick([0] * count) < count


def test_random_reaches_everyone_about_equally():
    picker = Random(seed=1)
    counts = Counter(picker.pick([0] * 4) for _ in range(4000))
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(n - 1000) < 120 for n in counts.values())


def test_power_of_two_compares_two_different_members():
    picker = PowerOfTwo(seed=1)
    counts = Counter(picker.pick([0, 1, 2, 3]) for _ in range(6000))
    # The better of two different ones of four: 3/6, 2/6, 1/6, never the worst.
    assert counts[3] == 0
    assert [round(counts[i] / 1000) for i in range(3)] == [3, 2, 1]
    assert picker.pick([7]) == 0


def test_least_connections_takes_turns_among_equals():
    picker = LeastConnections()
    assert [picker.pick([0, 0, 0]) for _ in range(4)] == [0, 1, 2, 0]
    assert [picker.pick([3, 2, 3, 2]) for _ in range(3)] == [1, 3, 1]


@given(loads=some.lists(some.integers(0, 9), min_size=1, max_size=20))
def test_least_connections_is_the_least(loads):
    picker = LeastConnections()
    assert all(loads[picker.pick(loads)] == min(loads) for _ in range(5))


def test_pickers_are_made_anew():
    assert {name for name, make in PICKERS.items() if make() is None} == {
        "central queue"
    }
    assert PICKERS["round robin"]() is not PICKERS["round robin"]()


# A new version among users


def test_users_stay_with_their_version():
    users = [f"user-{i}" for i in range(20_000)]
    first = [version_for(user, 0.1, "one") for user in users]
    assert first == [version_for(user, 0.1, "one") for user in users]
    assert abs(first.count("canary") / len(users) - 0.1) < 0.01
    # A larger share adds users and sends none back.
    more = [version_for(user, 0.3, "one") for user in users]
    assert all(b == "canary" for a, b in zip(first, more, strict=True) if a == "canary")
    # Another experiment draws again: half of a tenth would be a coincidence.
    other = [version_for(user, 0.1, "two") for user in users]
    both = sum(a == b == "canary" for a, b in zip(first, other, strict=True))
    assert both / len(users) < 0.02


def verdicts(stable: float, canary: float, seeds: int, looks: int = 200) -> Counter:
    """Verdicts of many experiments, each looked at after every 50 requests."""
    found: Counter = Counter()
    for seed in range(seeds):
        rng, bad, seen, verdict = random.Random(seed), [0, 0], 0, "wait"
        while verdict == "wait" and seen < looks * 50:
            seen += 50
            for i, share in enumerate((stable, canary)):
                bad[i] += sum(rng.random() < share for _ in range(50))
            outcomes = [Outcomes(seen, failures) for failures in bad]
            verdict = judge(*outcomes, enough=5_000)
        found[verdict] += 1
    return found


def test_looking_often_does_not_cry_wolf():
    found = verdicts(0.02, 0.02, seeds=200)
    assert found["roll back"] / 200 <= 0.05
    assert found["promote"] + found["roll back"] == 200


def test_a_worse_canary_is_rolled_back():
    found = verdicts(0.02, 0.06, seeds=60)
    assert found["roll back"] >= 57


def test_no_requests_no_verdict():
    assert judge(Outcomes(0, 0), Outcomes(0, 0), enough=1) == "wait"
    assert judge(Outcomes(10, 0), Outcomes(10, 0), enough=11) == "wait"
    assert judge(Outcomes(10, 0), Outcomes(11, 0), enough=11) == "promote"


def test_majority():
    assert majority(["yes", "no", "yes"]) == ("yes", 2 / 3)
    assert majority(["b", "a"]) == ("b", 0.5)
    with pytest.raises(ValueError, match="found none"):
        majority([])
