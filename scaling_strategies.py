"""Many replicas of one model: how many, which one next, who waits, and what is reused.

One server answers well until the day it is busy. Then latency does not grow with load
but explodes, and whoever adds servers by feel pays for idle ones at night and fails at
noon. What decides are a few policies, each a formula and a memory: when to add a
replica, whom to send a request, whom to let wait, what not to compute twice. They are
written here once; the simulator, the control loop and Kubernetes all run the same ones.

You will see: three autoscalers on one day of traffic; four ways of balancing beside
what theory says of them; queues that keep what they accepted; caches that are right.

Run it:     python scaling_strategies.py              all four sections, a minute
            python scaling_strategies.py 2 --quick    one section, rough figures, soon
            python scaling_strategies.py --manifests  write deploy/ again
Import it:  from scaling_strategies import HPA, KPA, QueueLength, PICKERS
Needs:      pip install -r requirements.txt
Next:       replay your own traffic: simulate(arrivals, services, fleet, picker)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from course import lesson
from course.lesson import Run
from local_cloud.scaling import (
    day,
    deployment,
    releases,
    reuse,
    shapes,
    traffic,
    trials,
)
from local_cloud.scaling import peak as peaks
from local_cloud.scaling.policies import (
    ROUNDING,
    Autoscaler,
    Grace,
    Limit,
    Load,
    Looks,
    Pace,
    Picker,
    Rules,
    check_bounds,
    check_least,
    filled,
    least_from,
    within,
)
from local_cloud.scaling.simulator import Fleet, Overflow, Trace, simulate

if TYPE_CHECKING:
    from local_cloud.scaling.kubernetes import Manifest
    from models import Model

# ## Auto-scaling configurations
#
# An autoscaler is a thermostat: it compares a reading with a target, and the whole art
# is what to read, how long to look back, and how fast to move. Scaling up late costs
# latency, scaling down early costs it twice, because the replica that was just removed
# takes its start-up time to come back. So all three below are quick up and slow down.
#
# HPA reads the mean of a metric over the replicas. CPU is what most people configure,
# and wrong for a model: one caller keeps all cores busy, at 100 % the ratio to a target
# of 70 % is 1.43 however long the queue is. Requests in flight know no such ceiling.

DEFAULT_UP = Rules(0, (Limit("Percent", 100), Limit("Pods", 4)))
DEFAULT_DOWN = Rules(300, (Limit("Percent", 100),))


@dataclass
class HPA:
    """Kubernetes' HorizontalPodAutoscaler: replicas follow a metric's mean.

    `ceil(ready * metric / target)`, unless the ratio is within `tolerance` of 1. Then
    its `Pace` holds it back: what it recommended and changed shortly before.

    Source: kubernetes/kubernetes, pkg/controller/podautoscaler.
    """

    target: float  # of the mean; a share of the request if the metric is a resource
    minimum: int = 1
    maximum: int = 10
    metric: str = "cpu"
    tolerance: float = 0.1
    up: Rules = DEFAULT_UP
    down: Rules = DEFAULT_DOWN

    def __post_init__(self) -> None:
        self.reset()
        check_bounds("HPA", self.target, self.minimum, self.maximum)
        check_least(self, 0, "tolerance")
        if self.minimum < 1:
            raise ValueError(
                "HPA: expected a minimum of at least 1, because of no replica there is "
                "no mean; for less use KPA or QueueLength"
            )

    @property
    def is_resource(self) -> bool:
        return self.metric in ("cpu", "memory")

    def recommend(self, load: Load) -> int:
        """What the reading alone asks for, when in doubt what there is.

        If the ratio says the opposite once all who said nothing are counted, too,
        nothing happens.
        """
        silent = load.missing >= load.ready
        if silent or load.metric is None or not math.isfinite(load.metric):
            return load.replicas
        ratio = load.metric / self.target
        # All of what a pod requests is more than its target, if that is a share of it.
        busy = max(1.0, 1 / self.target) if self.is_resource else 1.0
        total, counted = filled(load, ratio, busy)
        if abs(total / counted - 1) <= self.tolerance + ROUNDING:
            return load.replicas
        wanted = math.ceil(total - ROUNDING)
        if ratio > 1:
            return max(wanted, load.replicas) if total > counted else load.replicas
        return min(wanted, load.replicas) if total < counted else load.replicas

    def desired(self, load: Load) -> int:
        current = load.replicas
        if current == 0:  # somebody switched it off, and an HPA stays off
            return 0
        if not self.minimum <= current <= self.maximum:  # at once, whatever is read
            return max(self.minimum, min(current, self.maximum))
        wanted, bounds = self.recommend(load), (self.minimum, self.maximum)
        return self._pace.step(load.time_s, current, wanted, *bounds)

    def reset(self) -> None:
        self._pace = Pace(self.up, self.down)


# KPA reads requests in flight, twice: over a minute, and over the last six seconds. If
# the short look asks for twice what there is, it panics: from then on it believes the
# larger of both and removes nothing, until the short look has been calm for a minute.
# Without requests it goes down to nothing.


@dataclass
class KPA:
    """Knative's autoscaler: replicas follow requests in flight, down to zero.

    Source: knative/serving, pkg/autoscaler/scaling/autoscaler.go, and the defaults of
    config/core/configmaps/autoscaler.yaml.
    """

    target: float = 100.0  # requests in flight that one replica can hold
    utilisation: float = 0.7  # of them, how many it should
    minimum: int = 0
    maximum: int = 10
    stable_s: float = 60.0
    panic_s: float = 6.0
    panic_at: float = 2.0  # times the replicas there are
    max_up: float = 1000.0  # times what there is, in one tick
    max_down: float = 2.0
    tick_s: float = 2.0
    delay_s: float = 0.0  # what was wanted so long ago still counts
    grace_s: float = 30.0  # idle before the last replica goes

    def __post_init__(self) -> None:
        self.reset()
        check_bounds("KPA", self.target, self.minimum, self.maximum)
        check_least(self, 0.01, "utilisation")
        check_least(self, 0.1, "tick_s", "stable_s", "panic_s")
        check_least(self, 1, "panic_at", "max_up", "max_down")
        check_least(self, 0, "delay_s", "grace_s")

    def decide(self, now: float, ready: int, stable: float, panic: float) -> int:
        """The replicas for requests in flight of the long and of the short look."""
        aim, there = self.target * self.utilisation, max(1, ready)
        high, low = math.ceil(self.max_up * there), math.floor(there / self.max_down)
        for_stable = math.ceil(stable / aim - ROUNDING)
        for_panic = math.ceil(panic / aim - ROUNDING)
        wanted = min(max(for_stable, low), high)
        if for_panic / there >= self.panic_at:
            self._panic_since = now
        elif self._panic_since is not None and now - self._panic_since > self.stable_s:
            self._panic_since, self._panic_most = None, 0
        if self._panic_since is not None:  # up, but never down
            urgent = min(max(for_panic, low), high)
            self._panic_most = wanted = max(wanted, urgent, self._panic_most)
        self._wanted = [*within(self._wanted, now - self.delay_s), (now, wanted)]
        return max(n for _, n in self._wanted)

    def desired(self, load: Load) -> int:
        now = load.time_s
        if not math.isfinite(load.concurrency):  # a broken reading moves nothing
            return load.replicas
        if not self._looks.seen and load.ready > 1:  # no past: keep what there is
            self._panic_since, self._panic_most = now, load.ready
        self._looks.note(now, load.concurrency, self.stable_s)
        means = [self._looks.mean(now - s) for s in (self.stable_s, self.panic_s)]
        wanted = self.decide(now, load.ready, *means)
        wanted = max(self.minimum, min(wanted, self.maximum))
        return self._grace.step(now, load.replicas, wanted, self.grace_s)

    def reset(self) -> None:
        self._looks, self._grace = Looks(), Grace()
        self._wanted: list[tuple[float, int]] = []
        self._panic_since: float | None = None
        self._panic_most = 0


# QueueLength does not look at replicas at all but at the work that waits for them. It
# wakes the first replica itself, leaves everything from one to many to an HPA, and lets
# the last one go when the queue has been empty for as long as `cooldown_s`. It is made
# for work that may wait: an empty queue says nothing of how busy the replicas are, so
# that a service whose callers wait for the answer swings between all and one.


@dataclass
class QueueLength:
    """KEDA's ScaledObject: replicas follow the length of a queue.

    Source: KEDA's documentation 2.21, Scaling Deployments and ScaledObject spec.
    """

    per_replica: float = 5.0  # jobs waiting for each replica
    activation: int = 0  # more than so many jobs wake the first one
    minimum: int = 0
    maximum: int = 10
    polling_s: int = 30
    cooldown_s: int = 300
    hpa: HPA = field(init=False)
    _busy_at: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        check_bounds("QueueLength", self.per_replica, self.minimum, self.maximum)
        check_least(self, 0, "activation", "polling_s", "cooldown_s")
        least = max(1, self.minimum)
        self.hpa = HPA(self.per_replica, least, self.maximum, metric="queue")

    def desired(self, load: Load) -> int:
        busy, current = load.queue > self.activation, load.replicas
        if busy:
            self._busy_at = load.time_s
        if current == 0:
            return self.hpa.minimum if busy or self.minimum else 0
        if self.minimum == 0 and load.time_s - self._busy_at >= self.cooldown_s:
            self.hpa.reset()
            return 0
        mean = load.queue / current
        return self.hpa.desired(Load(load.time_s, current, metric=mean))

    def reset(self) -> None:
        self.hpa.reset()
        self._busy_at = -math.inf


# What it costs is decided here too. A fleet is right when it is the cheapest that keeps
# its promise, and p95 against replicas is a cliff. So the promise is simulated first;
# then an HPA with shorter times scales real processes.

SEED = 1  # of all that is drawn by chance: the same run twice is the same
SERVICE_S = 0.5  # a short answer
DAY_S, START_S, MOST = 4 * 3600.0, 20.0, 40  # a day as short as it can be told
PEAK, OFFICE = 24, 8  # replicas of two fleets that never change
FOR_MEAN, FOR_PEAK = "fixed, for the mean", "fixed, for the peak"
HYBRID = "hybrid: mean, rest to a cloud"
# A p95 of two seconds; dollars of a small GPU, and of a request elsewhere.
TERMS = day.Terms(promise_s=2.0, price_hour=0.5, price_overflow=0.001)
SCALERS: dict[str, tuple[int, Callable[[], Autoscaler] | None]] = {
    FOR_MEAN: (OFFICE, None),
    FOR_PEAK: (PEAK, None),
    "HPA": (2, partial(HPA, 0.7, 2, MOST, metric="requests")),
    "KPA": (2, partial(KPA, 1.0, maximum=MOST)),
    "QueueLength": (2, partial(QueueLength, 1.0, maximum=MOST)),
}
LIVE_UP = Rules(0, (Limit("Pods", 4, 1),))
LIVE_DOWN = Rules(3, (Limit("Percent", 100, 1),))


def live_through(arrivals: traffic.Floats, name: str, **options: Any) -> Trace:
    """The day as one of the `SCALERS` has it."""
    replicas, make = SCALERS[name]
    policy = make() if make else None
    tick_s = policy.tick_s if isinstance(policy, KPA) else 15.0
    fleet = Fleet(replicas, start_s=START_S, tick_s=tick_s, **options)
    services = day.services(SEED, SERVICE_S, len(arrivals))
    return simulate(arrivals, services, fleet, LeastConnections(), policy)


def demo_autoscaling(run: Run) -> None:
    """One day for six fleets, simulated; a wave of load, scaled for real."""
    run.predict("What follows the load costs less than the peak's fleet; bursts hurt.")
    arrivals = day.arrivals(SEED, DAY_S)
    fleets = {name: live_through(arrivals, name) for name in SCALERS}
    burst = Overflow(limit=2 * OFFICE, extra_s=0.05)
    fleets[HYBRID] = live_through(arrivals, FOR_MEAN, overflow=burst)
    day.show(run, fleets, ("HPA", "KPA"), TERMS)
    steady = traffic.steady(np.random.default_rng(SEED), 10, 0.9, SERVICE_S, 20_000)
    day.show_cheapest(run, LeastConnections, steady, TERMS)
    wave = trials.Wave(seconds=3.0) if run.quick else trials.Wave()
    hpa = HPA(1.0, 1, wave.most, metric="requests", up=LIVE_UP, down=LIVE_DOWN)
    trials.show_live(run, hpa, LeastConnections(), wave)
    if not run.quick:
        shapes.show(run)
    told = [fleets[name] for name in ("HPA", "KPA", FOR_PEAK)]
    taken = [trace.replica_s / told[-1].replica_s for trace in told]
    p95 = [trace.quantile(0.95) for trace in told]
    run.conclude(
        f"Of what the peak's fleet costs, HPA takes {taken[0]:.0%} and KPA "
        f"{taken[1]:.0%}, with a p95 of {p95[0]:.1f} and {p95[1]:.1f} s instead of "
        f"{p95[2]:.1f} s."
    )


# ## Load balancing techniques
#
# All techniques answer one question: who gets the next request, knowing what? Random
# knows nothing; round robin knows whose turn it is; the power of two choices looks at
# two and takes the better; least connections looks at all. Each knows more and waits
# less, and the second look is worth more than all that follow.
#
# Best of all is not to choose: one queue, and whoever is free takes the next. That is
# None below; a balancer does it by giving each replica no more than it can work on.


@dataclass
class RoundRobin:
    """Each in turn: fair in numbers, blind to how long a request takes."""

    _last: int = -1

    def pick(self, loads: Sequence[int]) -> int:
        self._last = (self._last + 1) % len(loads)
        return self._last


@dataclass
class Random:
    """Anyone: needs no memory, so that any number of balancers agree."""

    seed: int | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed).random

    def pick(self, loads: Sequence[int]) -> int:
        return int(self._random() * len(loads))


@dataclass
class PowerOfTwo:
    """The less loaded of two random members, which are never the same one twice."""

    seed: int | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed).random

    def pick(self, loads: Sequence[int]) -> int:
        count = len(loads)
        one = int(self._random() * count)
        if count == 1:
            return one
        other = (one + 1 + int(self._random() * (count - 1))) % count
        return one if loads[one] <= loads[other] else other


@dataclass
class LeastConnections:
    """The least loaded of all; among equals each in turn, or the first gets all."""

    _last: int = -1

    def pick(self, loads: Sequence[int]) -> int:
        self._last = least_from(loads, (self._last + 1) % len(loads))
        return self._last


PICKERS: dict[str, Callable[[], Picker | None]] = {
    "random": Random,
    "round robin": RoundRobin,
    "power of two": PowerOfTwo,
    "least connections": LeastConnections,
    "central queue": lambda: None,
}

# Two traps. Who measures a balancer with a few clients that each wait for their answer
# stops asking when it stalls, and never sees the stall: measure with arrivals that do
# not wait. And a balancer is where a new version meets its first users: who looks at a
# canary every minute, and stops when it looks bad, stops many a good one. The split by
# user, a verdict that may be asked as often as one likes, and `majority`, which asks
# several versions as one, are in `releases`.
#
# Past one machine the balancer must also know machines. Ray Serve does: the same model
# on two nodes, one of them killed under load, is `python -m tests.benchmarks.ray`.

FLEET = trials.SteadyFleet(1000, rho=0.9, mean_s=0.05)  # compared with theory
SMALL = replace(FLEET, replicas=100)  # settles in as many requests each, of fewer
DISTANCE_S = 0.05  # there and back between two regions


def demo_balancing(run: Run) -> None:
    """A thousand replicas: theory beside simulation; a stall, a canary, a region."""
    fleet, requests = (SMALL, 150_000) if run.quick else (FLEET, 1_000_000)
    run.predict("Each further look saves less than the one before.")
    means = trials.balance(run, PICKERS, fleet, requests)
    run.table(trials.stall_table(trials.one_stall(0.6 if run.quick else 2.0)))
    releases.show(run, SEED)
    if not run.quick:
        trials.fail_over(run, DISTANCE_S)
    saved = means["random"] - means["power of two"]
    more = means["power of two"] - means["least connections"]
    run.conclude(
        f"Looking at two replicas instead of one saves {saved:.0f} ms; looking at all "
        f"{fleet.replicas} saves {more:.0f} more."
    )


# ## Queue-based architectures for peak handling
#
# A peak above what the fleet can do leaves two choices: refuse, or let wait. Who waits
# with an open connection gives up, asks again, and doubles the load. A queue takes the
# request at once (202, and in Location where to ask), keeps it on disk, and hands it to
# whoever is free. It helps where the answer may come later, and only for a peak: if
# more arrives than can be done for good, a queue merely hides it for a while.
#
# A worker gets a job on lease. If it dies the lease runs out, and another gets the job:
# at least once, so what it does must bear repeating. A job that fails every time would
# go round for ever; after `MAX_TRIES` it is a dead letter, kept for a person.

# Pitfall: the queue grows and grows. Cure: bound it, and answer 429 with Retry-After.

PROMPTS = ("Name a colour.", "Name a fruit.", "Name a river.", "Name a planet.")


def demo_queues(run: Run) -> None:
    """A peak straight at a server and through two queues; jobs for the real model."""
    from models import Sampling

    peak = peaks.Peak(seconds=0.3) if run.quick else peaks.Peak()
    found = peaks.show(run, LeastConnections(), peak)
    model, few = shared_model(run), Sampling(max_tokens=12)
    reuse.show_jobs(run, lambda it: model.generate(it, few).text, PROMPTS)
    last = list(found.queues.values())[-1]
    run.conclude(
        f"Of {found.sent} requests the server alone answered {found.served}; through a "
        f"queue {last.done} of {last.accepted} were done, {last.lost} lost. The killed "
        f"worker's job was with another after {last.redelivered_s:.1f} s; the poisoned "
        f"one is {last.poison_state} after {last.poison_tries} tries."
    )


def shared_model(run: Run) -> Model:
    """The real model, loaded once for the sections that ask it."""
    import models

    load = partial(models.load, run.device, rows=16, context=1024)
    return run.keep("model", load)


# ## Caching strategies for repeated requests
#
# The cheapest request is the one that nobody computes. Three ways, from safe to not:
#
# 1. The whole answer, for a request equal to the letter, of the same caller, to the
#    same weights, and only where asking again must bring the same. A crowd that asks at
#    once shares one computation (single flight); what is a little old is given out
#    while it is renewed (stale while revalidate), so that nobody waits for the renewal.
# 2. The beginning of the prompt: the engine keeps what it has read, but each replica
#    only what it has read itself. Routed by a hash of the beginning, they add up.
# 3. The answer to what *seems* the same. It is off by default, and the table says why.

NAMES = ("one", "two", "three")  # replicas
BEGINNINGS, WARM, COUNTED = 12, 24, 36  # conversations that fill the caches, and count
SHELF = 8  # prompts that a replica keeps


def demo_caching(run: Run) -> None:
    """One answer for a hundred; one beginning on one replica; one false friend."""
    import models
    from model_api import create_app
    from serving.settings import Settings

    callers = 100
    run.predict(f"{callers} equal requests at once cost one answer, not {callers}.")
    model = shared_model(run)
    patient = Settings(ttft_target_ms=600_000)  # or it would shed most of the crowd
    app, tokens = create_app(patient, model=model), 3 if run.quick else 8
    asked = reuse.show_asked(run, app, model, callers, tokens)
    load = partial(models.load, run.device, rows=2, context=512, shelf=SHELF)
    counted = COUNTED // 3 if run.quick else COUNTED
    prompts = reuse.conversations(model, BEGINNINGS, WARM + counted, SEED)
    added = reuse.show_routing(run, NAMES, load, prompts, WARM)
    best = reuse.show_semantic(run, model)
    run.conclude(
        f"With a cache the model answered {asked[1].computed} of {callers} equal "
        f"requests; routing by prefix added {added:.0f} points of hits. The "
        f"semantic cache that finds {best.right:.0%} of the paraphrases takes "
        f"{best.false:.0%} of the opposites for them: leave it off."
    )


# What is deployed follows from the policies above, not from a second set of numbers.
# These files were validated, not applied: no cluster is part of the course.

# Answers under way and waiting; `adapter.yaml` makes it of two of the server's own
# metrics, as the first alone would end at the 16 rows of a replica.
API_HPA = HPA(12, minimum=2, maximum=8, metric="requests_in_flight")
API_QUEUE = QueueLength(per_replica=16, maximum=8)  # as many jobs as a replica has rows
CANARY_PERCENT = 10


def manifests() -> dict[str, list[Manifest]]:
    """All files of deploy/kubernetes: name to documents."""
    return deployment.manifests(API_HPA, API_QUEUE, CANARY_PERCENT)


SECTIONS = [
    lesson.Section("Auto-scaling configurations", demo_autoscaling),
    lesson.Section("Load balancing techniques", demo_balancing),
    lesson.Section("Queue-based architectures for peak handling", demo_queues),
    lesson.Section("Caching strategies for repeated requests", demo_caching),
]


def main(argv: list[str] | None = None) -> int:
    """Run the lesson, or write what is deployed."""
    return lesson.run(
        doc=__doc__,
        sections=SECTIONS,
        argv=argv,
        number=5,
        after="simulate your own traffic, then read deploy/kubernetes",
        add_arguments=deployment.add_arguments,
        instead=deployment.command(manifests, API_HPA.maximum),
    )


if __name__ == "__main__":
    raise SystemExit(main())
