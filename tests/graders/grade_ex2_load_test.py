"""Grades exercise 2: its parts by arithmetic, the whole on servers with a fault."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from exercises.unknown_server import ask_at, started
from tests.graders.plugin import Call, Submission, points

TOGETHER_S = 2.0  # a closed loop waits so long in vain, once
TEST_S = 25.0  # a load test may take 20 s; this machine may be busy
OTHERS = {"wait_s": 0.02}
STEADY = {"wait_s": 0.06}  # slow alone, and no slower under load
# Their capacities, 25 and 66 a second, are not to be guessed alike.
SERIAL = {"wait_s": 0.04, "at_once": 1}
REFUSES = {"wait_s": 0.03, "at_once": 2, "refuses": True}


# -- 1a


def drawn(submission: Submission, seed: int = 3) -> Call:
    found = submission.call("schedule", 200.0, 50.0, seed)
    found.must(isinstance(found.value, list), "a list", "due times come in order")
    found.must(
        len(found.value) > 100, "thousands of requests", "200/s are due for 50 s"
    )
    return found


@points(2, hint="The mean gap is one divided by the rate.")
def check_schedule_has_the_rate(submission: Submission) -> None:
    """As many requests are due as the rate says."""
    found = drawn(submission)
    n = len(found.value)
    because = "200/s for 50 s are 10,000, and chance moves that by a hundred or two"
    found.must(9_500 <= n <= 10_500, "9,500 to 10,500 requests", because, got=n)


@points(1, hint="Add up the gaps; stop before the end.")
def check_schedule_is_in_order(submission: Submission) -> None:
    """Due times rise, from 0 to below the duration."""
    found = drawn(submission)
    due = found.value
    right = due == sorted(due) and due[0] >= 0 and due[-1] < 50.0
    got = f"from {due[0]:.3f} to {due[-1]:.3f}"
    because = "what is due later cannot be sent earlier, and the run ends at 50 s"
    found.must(right, "rising times in [0, 50)", because, got=got)


@points(2, hint="random.Random has a method for gaps between independent events.")
def check_schedule_is_poisson(submission: Submission) -> None:
    """Gaps are exponential: users do not agree on taking turns."""
    found = drawn(submission)
    due = sorted(found.value)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = statistics.fmean(gaps)
    spread = statistics.stdev(gaps) / mean
    long = sum(gap > 2 * mean for gap in gaps) / len(gaps)
    because = "exponential gaps spread as far as their mean, and 13.5 % exceed twice it"
    right = 0.93 < spread < 1.07 and 0.12 < long < 0.15
    got = f"spread {spread:.2f} of the mean, {long:.1%} longer than twice it"
    found.must(right, "a spread of 1, and 13.5 % long gaps", because, got=got)


@points(1, hint="A generator of your own, made from the seed.")
def check_schedule_follows_the_seed(submission: Submission) -> None:
    """One seed, one schedule; and nobody else's random numbers change."""
    before = random.getstate()
    first, again, other = (drawn(submission, seed) for seed in (3, 3, 4))
    because = "two versions of a server must meet the very same load"
    first.must(first.value == again.value, "the same twice", because, got="another")
    first.must(first.value != other.value, "another by seed 4", because, got="the same")
    because = "seeding the shared generator changes what others draw from it"
    undisturbed = random.getstate() == before
    first.must(undisturbed, "random.getstate() as before", because, got="another")


# -- 1b


@dataclass
class Watched:
    """A `send` that notes when each request began, on its own clock."""

    together: int = 0  # so many must have begun until the first is answered
    blocks_s: float = 0.0  # the first request stops the whole program for so long
    fails: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.start = time.perf_counter()
        self.began: dict[int, float] = {}
        self.enough = asyncio.Event()
        self.before_answer = 0  # had begun when the first was answered

    async def __call__(self, number: int) -> None:
        self.began[number] = time.perf_counter() - self.start
        if number == 0 and self.blocks_s:
            time.sleep(self.blocks_s)  # not asyncio's: nothing else runs meanwhile
        if len(self.began) >= self.together:
            self.enough.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.enough.wait(), TOGETHER_S)
        self.before_answer = self.before_answer or len(self.began)
        self.enough.set()  # who waited in vain was enough
        if number in self.fails:
            raise ConnectionError("refused")


def fired(submission: Submission, send: Watched, due: list[float]) -> Call:
    found = submission.call("fire", send, due)
    text = f"fire(send, {due})"
    found = Call(text, list(found.value))
    because = "every request that was due must be accounted for"
    count = len(found.value)
    found.must(count == len(due), f"{len(due)} samples", because, got=count)
    return found


@points(3, hint="Begin a task for each request before you await any of them.")
def check_fire_waits_for_no_answer(submission: Submission) -> None:
    """Requests are sent when due, though no answer has come."""
    due = [0.0, 0.01, 0.02, 0.03, 0.04]
    send = Watched(together=len(due))
    found = fired(submission, send, due)
    because = "all five were due, and none was answered until the last one was sent"
    sent = send.before_answer
    found.must(sent == len(due), "5 sent before any answer", because, got=sent)
    early = [i for i, at in enumerate(due) if send.began[i] < at - 0.01]
    because = "sent too early is another load than the schedule's"
    found.must(not early, "none sent before it is due", because, got=early)


@points(3, hint="One start for the run; done_s and due_s are both told from there.")
def check_fire_counts_from_due(submission: Submission) -> None:
    """A request that was sent late counts as slow."""
    send = Watched(blocks_s=0.12)
    found = fired(submission, send, [0.0, 0.03, 0.06])
    whole_s = time.perf_counter() - send.start
    because = "the program stood still for 0.12 s, and what was due then waited for it"
    for i, (due, least) in enumerate(((0.0, 0.12), (0.03, 0.09), (0.06, 0.06))):
        sample = found.value[i]
        found.must(sample.due_s == due, f"due_s {due}", "so says the schedule", sample)
        latency = sample.latency_s
        right = least * 0.95 <= latency <= whole_s - due  # the run ended after it
        expected = f"a latency of {least:.2f} s or little more for request {i}"
        found.must(right, expected, because, got=f"{latency:.3f}")


@points(1, hint="What send raises belongs to that one request.")
def check_fire_keeps_failures(submission: Submission) -> None:
    """A failed request is a sample, and the others go on."""
    found = fired(submission, Watched(fails=(1,)), [0.0, 0.01, 0.02])
    ok = [sample.ok for sample in found.value]
    because = "a refused caller is a result; leaving it out makes the server look good"
    found.must(ok == [True, False, True], "ok, not ok, ok", because, got=ok)


@points(1, hint="asyncio.gather keeps the order in which tasks were handed to it.")
def check_fire_keeps_the_order(submission: Submission) -> None:
    """Samples come in the order of the schedule."""

    async def send(number: int) -> None:
        await asyncio.sleep(0.06 if number == 0 else 0.0)

    found = submission.call("fire", send, [0.0, 0.01, 0.02])
    due = [sample.due_s for sample in found.value]
    because = "the first is answered last, and sample i is of request i"
    found.must(due == [0.0, 0.01, 0.02], "due_s as scheduled", because, got=due)


# -- 2a


@points(2, hint="Round the rank up, not the value.")
def check_percentile_was_measured(submission: Submission) -> None:
    """Nearest rank: one of the values that were measured."""
    values = [15.0, 20.0, 35.0, 40.0, 50.0]
    random.Random(1).shuffle(values)
    for q, expected in ((5, 15.0), (30, 20.0), (40, 20.0), (50, 35.0), (100, 50.0)):
        found = submission.call("percentile", [values], q)
        because = f"{q} % of the five values are no larger than {expected:g}"
        found.equals(expected, because)


@points(2, hint="First together, then sorted, then one percentile.")
def check_percentile_is_of_all_values(submission: Submission) -> None:
    """Workers' values are put together, not their percentiles."""
    for q, expected in ((99, 1.0), (99.5, 100.0)):
        found = submission.call("percentile", [[1.0] * 990, [100.0] * 10], q)
        because = "of 1,000 requests 990 took 1 s; a worker with ten has a small say"
        found.equals(expected, because)


@points(1, hint="Nobody measured anything: that is no number.")
def check_percentile_needs_values(submission: Submission) -> None:
    """No value is an error, an empty worker is none, and nothing is changed."""
    because = "there is no percentile of nothing, and 0 would look excellent"
    submission.refuses(ValueError, "percentile", [[], []], 50, because=because)
    groups = [[], [3.0, 1.0, 2.0]]
    found = submission.call("percentile", groups, 50)
    found.equals(2.0, "a worker without requests takes nothing away")
    because = "a function that asks for values must not sort its caller's"
    found.must(groups == [[], [3.0, 1.0, 2.0]], "the groups unchanged", because, groups)


# -- 2b, on servers with a fault


@dataclass(frozen=True)
class Examined:
    """What the submission found out about one server."""

    call: Call
    planted: str
    pool: dict[str, Any]  # of the planted route

    def must_name(self, because: str) -> None:
        route = self.call.value.route
        self.call.must(route == self.planted, self.planted, because, got=route)

    def must_bear(self) -> None:
        """Claims that the rate it tells is about what the route can do."""
        at_once, wait_s = self.pool["at_once"], self.pool["wait_s"]
        most, told = at_once / wait_s, self.call.value.sustained_per_s
        because = (
            f"{at_once} at once, {wait_s:g} s each, are {most:.0f} a second at most"
        )
        expected = f"{0.3 * most:.0f} to {1.5 * most:.0f} a second"
        right = 0.3 * most <= told <= 1.5 * most
        self.call.must(right, expected, because, got=told)


def examined(submission: Submission, **routes: dict[str, Any]) -> Examined:
    """Lets the submission test a server; the planted fault is the route with a pool."""
    planted = next(name for name, route in routes.items() if "at_once" in route)
    asked: set[str] = set()
    with started({f"/{name}": route for name, route in routes.items()}) as port:

        async def ask(route: str) -> None:
            asked.add(route)
            await ask_at(port, f"/{route}")

        found = submission.call("find_bottleneck", ask, list(routes))
    because = "the result says which route, and how much it sustains"
    found.must(hasattr(found.value, "sustained_per_s"), "a Bottleneck", because)
    unasked = sorted(set(routes) - asked)
    because = "who was never asked may be the one"
    found.must(not unasked, "each route to be asked", because, got=f"none of {unasked}")
    return Examined(found, planted, routes[planted])


@pytest.fixture(scope="session")
def serial(submission: Submission) -> Examined:
    """A server one of whose routes has a pool of a single connection."""
    return examined(submission, report=STEADY, search=OTHERS, summary=SERIAL)


@pytest.fixture(scope="session")
def refusing(submission: Submission) -> Examined:
    """A server one of whose routes refuses whom its pool has no connection for."""
    return examined(submission, report=STEADY, chat=REFUSES, search=OTHERS)


@points(3, hint="Ask which gets worse, not which is bad.", slow=True, limit_s=TEST_S)
def check_finds_the_route_that_queues(serial: Examined) -> None:
    """It finds the route that queues, beside one that is slow at any rate."""
    serial.must_name(
        "it serves one request at a time and queues at 100 a second, where all others "
        "answer as fast as at one"
    )


@points(2, hint="What does an error count as?", slow=True, limit_s=TEST_S)
def check_finds_the_route_that_refuses(refusing: Examined) -> None:
    """It finds the route that refuses under load, and so looks fast."""
    refusing.must_name("it refuses most of 100 a second, and a refusal comes fast")


@points(1, hint="Raise the rate step by step.", slow=True, limit_s=TEST_S)
def check_tells_what_the_route_sustains(serial: Examined, refusing: Examined) -> None:
    """The rate it tells is one that the route can sustain, on either server."""
    for found in (serial, refusing):
        found.must_name("a rate is of the route that breaks")
        found.must_bear()
