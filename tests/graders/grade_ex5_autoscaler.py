"""Grades exercise 5: two formulas, then a policy by what it does in the simulator."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from exercises import load_shapes
from exercises.load_shapes import KNOWN, SERVICE, Service, Shape
from local_cloud.scaling import theory
from local_cloud.scaling.policies import Autoscaler, Load
from local_cloud.scaling.simulator import Trace
from tests.graders.plugin import Call, Submission, points

# Another service than the exercise's: half as long a request, half as much patience.
BRISK = Service(service_s=0.5, promise_s=2.5, start_s=20.0, minimum=1)
HIDDEN: dict[str, tuple[Shape, Service]] = {
    "spike": (load_shapes.spike(4, 9, 700, 1200), SERVICE),
    "slow wave": (load_shapes.sine(3, 14, 1700), SERVICE),
    "falling load": (load_shapes.ramp(16, 3, 400, 1200), SERVICE),
    "noise": (load_shapes.noise(10, 0.05, seed=3), SERVICE),
    "wave of short requests": (load_shapes.sine(8, 32, 600), BRISK),
}
SHAPES = {name: (shape, SERVICE) for name, shape in KNOWN.items()} | HIDDEN
SEED = 7
OF_FIXED, OF_HPA, TURNS, BACK_S = 1.25, 0.9, 12, 180.0
LIMIT_S = 30.0


# -- 1: the formulas


@points(2, hint="Halve the range from 0 to all replicas busy, forty times.")
def check_capacity_is_the_largest_rate(submission: Submission) -> None:
    """At this rate 95 % wait as long as they may, and at a higher one longer."""
    for replicas, service_s, wait_s in (
        (1, 1.0, 2.0),
        (3, 0.2, 0.1),
        (8, 2.0, 0.0),
        (40, 0.5, 0.5),
    ):
        found = submission.call("capacity", replicas, service_s, wait_s)
        because = f"a little more makes one in twenty wait over {wait_s:g} s"
        found.near(largest_rate(replicas, service_s, wait_s), because)


def largest_rate(replicas: int, service_s: float, wait_s: float) -> float:
    def excess(load: float) -> float:
        wait = theory.mmc_wait_quantile(replicas, load, service_s, 0.95)
        return wait - wait_s - 1e-12  # a wait of nothing is not too long yet

    return theory.bisect(excess, 0.0, float(replicas)) / service_s


@points(1, hint="Compare first: NaN is neither above 0 nor below.")
def check_capacity_refuses_nonsense(submission: Submission) -> None:
    """No replica, or times that no clock can measure, are refused."""
    for replicas, service_s, wait_s, what in (
        (0, 1.0, 1.0, "no replica serves nobody"),
        (2, 0.0, 1.0, "a request that takes no time has no rate that is too high"),
        (2, 1.0, -1.0, "nobody waits less than nothing"),
        (2, math.nan, 1.0, "a reading was broken"),
    ):
        submission.refuses(
            ValueError, "capacity", replicas, service_s, wait_s, because=what
        )


@points(2, hint="A queue of (rate - before) x cold_s shrinks by after - rate a second.")
def check_hurts_until_the_queue_is_gone(submission: Submission) -> None:
    """The pain lasts longer than the start: until what piled up is served."""
    for rate, before, after, cold_s, expected in (
        (15.0, 10.0, 20.0, 30.0, 60.0),
        (15.0, 10.0, 40.0, 30.0, 36.0),
        (30.0, 10.0, 32.0, 10.0, 110.0),
    ):
        found = submission.call("hurts_s", rate, before, after, cold_s)
        because = (
            f"{(rate - before) * cold_s:g} requests pile up in {cold_s:g} s, and "
            f"{after - rate:g} a second of them are served then"
        )
        found.near(expected, because)


@points(1, hint="Two cases have no queue, or no end of it.")
def check_hurts_never_or_for_ever(submission: Submission) -> None:
    """No pain where the old fleet copes; no end of it where the new one does not."""
    for rate, before, after, expected, because in (
        (8.0, 10.0, 20.0, 0.0, "the old fleet serves more than comes"),
        (10.0, 10.0, 20.0, 0.0, "the old fleet serves all that comes"),
        (25.0, 10.0, 20.0, math.inf, "the queue grows after the start, too"),
        (20.0, 10.0, 20.0, math.inf, "the queue stays as long as it is"),
    ):
        submission.call("hurts_s", rate, before, after, 30.0).equals(expected, because)


# -- 2: the policy, asked directly


@dataclass(frozen=True)
class Asked:
    """What a policy was shown, and what it answered."""

    loads: list[Load]
    answers: list[Any]

    def must_be_within(self, service: Service) -> None:
        low, high = service.minimum, service.maximum
        for load, answer in zip(self.loads, self.answers, strict=True):
            whole = isinstance(answer, numbers.Integral) and low <= int(answer) <= high
            call = Call(f"autoscaler({service}).desired({load})", answer)
            because = "the minimum is promised to the users, the maximum to who pays"
            call.must(whole, f"a whole number from {low} to {high}", because)

    def must_equal(self, other: Asked, when: str, because: str) -> None:
        pairs = zip(self.loads, self.answers, other.answers, strict=True)
        for load, answer, expected in pairs:
            call = Call(f"autoscaler(...).desired({load}) {when}", answer)
            call.equals(expected, because)


def asked(
    submission: Submission,
    policy: Any,
    erlangs: Sequence[float | Load],
    start_s: float = 0.0,
) -> Asked:
    """Shows a policy requests in flight, at a fleet that follows it at once.

    A `Load` among them is shown as it is, whatever the fleet.
    """
    there, found = 6, Asked([], [])
    for i, n in enumerate(erlangs):
        now = start_s + SERVICE.tick_s * (i + 1)
        load = replace(n, time_s=now) if isinstance(n, Load) else seen(now, there, n)
        with submission.explained(f"autoscaler(...).desired({load})"):
            answer = policy.desired(load)
        found.loads.append(load)
        found.answers.append(answer)
        if isinstance(answer, numbers.Integral):
            there = max(1, min(int(answer), 1000))
    return found


def seen(now: float, there: int, in_flight: float) -> Load:
    """How a fleet looks that so many requests are at."""
    queue = max(0, round(in_flight - there))
    mean = in_flight / there
    return Load(now, there, metric=mean, queue=queue, concurrency=in_flight)


def policy_of(submission: Submission, service: Service = SERVICE) -> Any:
    return submission.call("autoscaler", service).value


TEN_MINUTES = 120  # looks


@points(2, hint="Bound the very last value, whatever it was computed from.")
def check_stays_within_bounds(submission: Submission) -> None:
    """Never fewer than the minimum, never more than the maximum; and it uses both."""
    service = Service(minimum=3, maximum=9)
    for in_flight, end, when in (
        (0.0, 3, "nothing came for ten minutes"),
        (500.0, 9, "500 requests were there for ten minutes"),
    ):
        policy = policy_of(submission, service)
        found = asked(submission, policy, [5.0] * 10 + [in_flight] * TEN_MINUTES)
        found.must_be_within(service)
        call = Call(f"autoscaler({service}).desired({found.loads[-1]})", ...)
        got = str(found.answers[-1])
        call.must(found.answers[-1] == end, f"{end} replicas", when, got=got)


@points(2, hint="NaN that was once added to a memory never leaves it again.")
def check_survives_broken_readings(submission: Submission) -> None:
    """A broken reading puts no answer out of bounds, and spoils none afterwards."""
    for broken in (
        Load(0.0, ready=8, metric=None, missing=8, concurrency=math.nan),
        Load(0.0, ready=0, starting=0, metric=None, queue=30, concurrency=20.0),
        Load(0.0, ready=8, metric=math.nan, concurrency=6.0),
    ):
        course = [6.0] * 24 + [broken] + [200.0] * 24
        found = asked(submission, policy_of(submission), course)
        found.must_be_within(SERVICE)
        call = Call(f"autoscaler(...).desired({found.loads[-1]})", ...)
        because = "200 requests are there, and the broken reading is two minutes old"
        got = str(found.answers[-1])
        call.must(found.answers[-1] >= 20, "20 replicas at least", because, got=got)


@points(2, hint="All that it remembers is made in reset(); load.time_s is its clock.")
def check_same_loads_same_answers(submission: Submission) -> None:
    """It answers alike after a reset, and whatever its clock started at."""
    rng = np.random.default_rng(SEED)
    course = (8 + rng.normal(0, 3, 100).cumsum()).clip(0, 60).tolist()
    policy = policy_of(submission)
    first = asked(submission, policy, course)
    asked(submission, policy, [90.0] * 20, start_s=500.0)
    with submission.explained("autoscaler(...).reset()"):
        policy.reset()
    again = asked(submission, policy, course)
    again.must_equal(first, "after reset()", "the past is forgotten")
    later = asked(submission, policy_of(submission), course, start_s=2.0**20)
    because = "only the time between two looks matters, not the time itself"
    later.must_equal(first, "twelve days later", because)


# -- 2: the policy, in the simulator

Runs = Callable[[str], Trace]


@pytest.fixture(scope="session")
def runs(submission: Submission) -> Runs:
    """The policy on a shape, each simulated once."""

    @cache
    def run(name: str) -> Trace:
        shape, service = SHAPES[name]
        return play(submission, name, shape, policy_of(submission, service), service)

    return run


def play(
    submission: Submission,
    name: str,
    shape: Shape,
    policy: Autoscaler,
    service: Service = SERVICE,
) -> Trace:
    with submission.explained(f"autoscaler(...) on {name}"):
        return load_shapes.played(shape, service, policy, SEED)


def must_keep(trace: Trace, service: Service, name: str) -> None:
    p95 = trace.quantile(0.95)
    most = max(tick.desired for tick in trace.ticks)
    Call(f"autoscaler(...) on {name}", p95).must(
        p95 <= service.promise_s,
        f"a p95 of at most {service.promise_s:g} s",
        "that is the promise",
        got=f"{p95:.1f} s, with up to {most} replicas",
    )


def must_follow(runs: Runs, name: str) -> None:
    """Claims that a load which changes fivefold moves the fleet, too."""
    sizes = [tick.desired for tick in runs(name).ticks]
    least, most = min(sizes), max(sizes)
    because = "the load changes fivefold; a fleet that never does is paid for nothing"
    call, got = Call(f"autoscaler(...) on {name}", sizes), f"from {least} to {most}"
    call.must(2 * least <= most, "its largest fleet twice its smallest", because, got)


@points(2, hint="python -m exercises.ex5_autoscaler shows both shapes, beside the HPA.")
def check_keeps_the_promise_on_known_shapes(runs: Runs) -> None:
    """The ramp and the wave of exercises/load_shapes.py are served in time."""
    must_follow(runs, "ramp")
    for name in KNOWN:
        must_keep(runs(name), SERVICE, name)


@points(3, hint="What would it do if load doubled at once?", slow=True, limit_s=LIMIT_S)
def check_keeps_the_promise_on_hidden_shapes(runs: Runs) -> None:
    """Shapes that nobody showed it are served in time, too."""
    must_follow(runs, "falling load")
    for name, (_, service) in HIDDEN.items():
        must_keep(runs(name), service, name)


def must_cost(runs: Runs, share: float, whose: str, other: Runs) -> None:
    mine = sum(runs(name).replica_s for name in SHAPES)
    most = share * sum(other(name).replica_s for name in SHAPES)
    Call("autoscaler(...) on all shapes together", mine).must(
        mine <= most,
        f"at most {most:,.0f} replica-seconds",
        f"that is {share:g} times what {whose} took in the same run",
        got=f"{mine:,.0f}",
    )


@points(
    2, hint="A large fleet needs less spare than a small.", slow=True, limit_s=LIMIT_S
)
def check_costs_little_more_than_hindsight(runs: Runs) -> None:
    """All shapes cost at most 1.25 times what the cheapest fixed fleets cost."""
    whose = "the cheapest fleets that keep the promise and never change"
    must_cost(
        runs,
        OF_FIXED,
        whose,
        lambda name: load_shapes.cheapest_fixed(*SHAPES[name], SEED),
    )


@points(2, hint="It pays five minutes for each peak; for how long must you?", slow=True)
def check_costs_less_than_the_hpa(runs: Runs) -> None:
    """All shapes cost at most 0.9 times what the lesson's HPA takes for them."""

    def by_hpa(name: str) -> Trace:
        shape, service = SHAPES[name]
        return load_shapes.played(shape, service, load_shapes.hpa(service), SEED)

    must_cost(runs, OF_HPA, "the lesson's HPA", by_hpa)


@points(2, hint="Look further back before you give a replica away.", slow=True)
def check_does_not_flap(runs: Runs) -> None:
    """Noise of five percent does not set the fleet swinging; a real change moves it."""
    must_follow(runs, "falling load")
    turned = load_shapes.turns(runs("noise"))
    because = "the load stays within 5 %, and every turn starts a replica for nothing"
    call = Call("autoscaler(...) on noise", turned)
    call.must(turned <= TURNS, f"at most {TURNS} turns in half an hour", because)


class Loses:
    """A policy some of whose replicas are taken away: they end their work and go."""

    def __init__(self, policy: Any, at_s: float, share: float) -> None:
        self.policy, self.at_s, self.share = policy, at_s, share

    def desired(self, load: Load) -> int:
        wanted = self.policy.desired(load)
        if load.time_s != self.at_s:
            return wanted
        return load.replicas - math.ceil(self.share * load.replicas)

    def reset(self) -> None:
        self.policy.reset()


LOST_S = 900.0


@points(1, hint="Ask for what the load takes, not for a little more than is there.")
def check_survives_the_loss_of_half(submission: Submission) -> None:
    """Half the replicas go at once, and the promise is kept all the same."""
    policy = Loses(policy_of(submission), LOST_S, 0.5)
    what = "a steady load, with half the replicas lost"
    shape = load_shapes.noise(10, 0.0, seed=1)
    must_keep(play(submission, what, shape, policy), SERVICE, what)


@points(1, hint="Of no replica there is no mean: metric is None, and ready is 0.")
def check_survives_the_loss_of_all(submission: Submission) -> None:
    """All replicas go at once; nothing is lost, and soon all is as it was."""
    policy = Loses(policy_of(submission), LOST_S, 1.0)
    what = "a steady load, with all replicas lost"
    trace = play(submission, what, load_shapes.noise(10, 0.0, seed=1), policy)
    back = trace.after(int(np.searchsorted(trace.arrivals, LOST_S + BACK_S)))
    must_keep(back, SERVICE, f"{what}, from {BACK_S:g} s later on")
