"""A fleet in virtual time: requests arrive, wait, are served; replicas come and go.

    rng = numpy.random.default_rng(1)
    arrivals = traffic.poisson(rng, rate=18_000, requests=500_000)
    services = traffic.exponential(rng, mean_s=0.05, requests=500_000)
    trace = simulate(arrivals, services, Fleet(replicas=1000), PowerOfTwo(seed=1))
    print(trace.mean_s, trace.quantile(0.95), trace.utilisation)

Load is made first, as arrays, and can be played to any number of fleets: what differs
then is the policy and not the luck. Nothing here reads a clock, so that the same seed
gives the same trace everywhere.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from local_cloud.scaling.policies import Autoscaler, Load, Picker
from local_cloud.scaling.traffic import Floats

GIVE_UP_S = 24 * 3600.0  # after the last arrival, with requests still unserved


# The fleet and what became of the requests.


@dataclass(frozen=True)
class Overflow:
    """Somewhere else to send a request once so many are here: a cloud, paid by use."""

    limit: int  # requests in the fleet, waiting ones included
    extra_s: float = 0.0  # way there and back


@dataclass(frozen=True)
class Fleet:
    """Replicas and how they come and go."""

    replicas: int  # at the beginning
    slots: int = 1  # requests that one replica works on at once
    start_s: float = 0.0  # from being asked for to serving
    tick_s: float = 15.0  # between two looks of the autoscaler
    metric: Literal["in flight", "utilisation"] = "in flight"
    overflow: Overflow | None = None

    def __post_init__(self) -> None:
        good = self.replicas >= 0 and self.slots >= 1 and self.start_s >= 0
        if not (good and self.tick_s > 0):
            raise ValueError(
                "Fleet: expected replicas and start_s of at least 0, slots of at least "
                f"1 and tick_s above 0, found {self}"
            )


@dataclass(frozen=True)
class Tick:
    """One look of the autoscaler, and what it asked for."""

    load: Load
    desired: int


@dataclass(frozen=True)
class Trace:
    """What became of each request, in the order of arrival; all in seconds."""

    arrivals: Floats
    starts: Floats
    ends: Floats
    overflowed: NDArray[np.bool_]  # served elsewhere
    replica_s: float  # replicas times seconds, from being asked for to being gone
    busy_s: float  # slots times seconds in use
    ticks: list[Tick] = field(default_factory=list)
    slots: int = 1

    @property
    def waits(self) -> Floats:
        return self.starts - self.arrivals

    @property
    def sojourns(self) -> Floats:
        """From arrival to the end."""
        return self.ends - self.arrivals

    @property
    def mean_s(self) -> float:
        return float(self.sojourns.mean())

    @property
    def utilisation(self) -> float:
        return self.busy_s / (self.replica_s * self.slots) if self.replica_s else 0.0

    def quantile(self, share: float) -> float:
        """The sojourn that this share of requests does not exceed."""
        return float(np.quantile(self.sojourns, share))

    def after(self, warm_up: int) -> Trace:
        """Without the first requests, which found an empty fleet.

        The costs stay those of the whole run.
        """
        cut = slice(warm_up, None)
        columns = ("arrivals", "starts", "ends", "overflowed")
        return replace(self, **{name: getattr(self, name)[cut] for name in columns})


def simulate(
    arrivals: Floats,
    services: Floats,
    fleet: Fleet,
    picker: Picker | None = None,
    autoscaler: Autoscaler | None = None,
) -> Trace:
    """Play the load to a fleet until all is served.

    Args:
        arrivals, services: as `traffic` makes them, of one length.
        picker: chooses a replica on arrival; None: one queue, and who is free takes.
        autoscaler: asked every `tick_s`; None: the fleet stays as it is.

    Raises:
        ValueError: arrays that do not fit, or a fleet that never serves what it took.
    """
    if arrivals.shape != services.shape or not arrivals.size:
        raise ValueError(
            "simulate: expected as many services as arrivals and at least one, found "
            f"{arrivals.shape} and {services.shape}"
        )
    if (np.diff(arrivals) < 0).any() or services.min() < 0:
        raise ValueError("simulate: expected ascending arrivals and no service below 0")
    if fleet.replicas == 0 and autoscaler is None:
        raise ValueError("simulate: expected a replica or an autoscaler, found neither")
    run = _Run(arrivals.tolist(), services.tolist(), fleet, picker, autoscaler)
    run.play()
    return run.trace(arrivals, services)


class _Replica:
    """A replica: requests that wait for it, free slots, its place in the fleet."""

    __slots__ = ("born", "free", "place", "queue")

    def __init__(self, born: float, slots: int):
        self.born = born
        self.free = slots
        self.place = -1  # not in the fleet: starting, draining or gone
        self.queue: deque[int] = deque()


class _Run:
    """One simulation under way. Events are (time, request, replica) in a heap.

    An event is the end of a request; a request below 0 says that a replica is ready.
    """

    def __init__(
        self,
        arrivals: list[float],
        services: list[float],
        fleet: Fleet,
        picker: Picker | None,
        autoscaler: Autoscaler | None,
    ):
        self.arrivals, self.services, self.fleet = arrivals, services, fleet
        self.pick = picker.pick if picker else None
        self.autoscaler = autoscaler
        self.events: list[tuple[float, int, _Replica]] = []
        self.members: list[_Replica] = []
        self.loads: list[int] = []  # requests in flight at each member
        self.starting: list[_Replica] = []
        self.draining: set[_Replica] = set()
        self.waiting: deque[int] = deque()  # for anyone
        self.idle: list[_Replica] = []  # without a picker: once for each free slot
        self.starts = [0.0] * len(arrivals)
        self.ends = [0.0] * len(arrivals)
        self.overflowed: list[int] = []
        self.asked = 0  # replicas, ever
        self.inside = 0  # requests, waiting or in work
        self.replica_s = 0.0
        self.area = _Area()
        self.ticks: list[Tick] = []
        for _ in range(fleet.replicas):
            self._join(_Replica(0.0, fleet.slots), 0.0)

    def play(self) -> None:
        arrivals, events = self.arrivals, self.events
        tick = self.fleet.tick_s if self.autoscaler else math.inf
        limit = self.fleet.overflow.limit if self.fleet.overflow else math.inf
        for request, now in enumerate(arrivals):
            while tick <= now:
                self._until(tick)
                self._tick(tick)
                tick += self.fleet.tick_s
            if events and events[0][0] <= now:
                self._until(now)
            if self.inside >= limit:
                self._elsewhere(request, now)
            else:
                self.inside += 1
                self.area.entered(now)
                self._arrive(request, now)
        give_up = arrivals[-1] + sum(self.services) + GIVE_UP_S
        while self.inside and tick < give_up:
            self._until(tick)
            self._tick(tick)
            tick += self.fleet.tick_s
        self._until(math.inf)
        if self.inside:
            raise ValueError(
                f"simulate: expected every request to be served, found {self.inside} "
                "without a replica; the autoscaler must ask for at least one"
            )

    def _until(self, now: float) -> None:
        """Everything that ends or becomes ready until now."""
        events, pop = self.events, heapq.heappop
        while events and events[0][0] <= now:
            time, request, replica = pop(events)
            if request >= 0:
                self._end(time, replica)
            elif replica in self.starting:  # or it was given up before it was ready
                self.starting.remove(replica)
                self._join(replica, time)

    def _arrive(self, request: int, now: float) -> None:
        if self.pick is None:
            if self.idle:
                self._start(request, self.idle.pop(), now)
            else:
                self.waiting.append(request)
        elif self.members:
            place = self.pick(self.loads)
            replica = self.members[place]
            self.loads[place] += 1
            if replica.free:
                self._start(request, replica, now)
            else:
                replica.queue.append(request)
        else:
            self.waiting.append(request)

    def _start(self, request: int, replica: _Replica, now: float) -> None:
        replica.free -= 1
        self.starts[request] = now
        self.ends[request] = end = now + self.services[request]
        self.area.started(now)
        heapq.heappush(self.events, (end, request, replica))

    def _end(self, now: float, replica: _Replica) -> None:
        self.inside -= 1
        self.area.ended(now)
        replica.free += 1
        if replica.place >= 0:
            self.loads[replica.place] -= 1
        if replica.queue:
            self._start(replica.queue.popleft(), replica, now)
        elif replica.place < 0:
            if replica.free == self.fleet.slots:
                self._gone(replica, now)
        elif self.pick is None:
            if self.waiting:
                self._start(self.waiting.popleft(), replica, now)
            else:
                self.idle.append(replica)

    def _elsewhere(self, request: int, now: float) -> None:
        assert self.fleet.overflow
        self.starts[request] = now
        self.ends[request] = now + self.fleet.overflow.extra_s + self.services[request]
        self.overflowed.append(request)

    # Replicas come and go.

    def _tick(self, now: float) -> None:
        assert self.autoscaler
        load = self._look(now)
        desired = self.autoscaler.desired(load)
        self.ticks.append(Tick(load, desired))
        for _ in range(desired - load.replicas):
            self._ask(now)
        for _ in range(load.replicas - desired):
            self._remove(now)

    def _look(self, now: float) -> Load:
        ready, slots = len(self.members), self.fleet.slots
        in_flight, in_work = self.area.means(now, self.inside)
        mean = in_flight if self.fleet.metric == "in flight" else in_work / slots
        return Load(
            now,
            ready,
            len(self.starting),
            metric=mean / ready if ready else None,
            queue=len(self.waiting) + sum(len(r.queue) for r in self.members),
            concurrency=in_flight,
        )

    def _ask(self, now: float) -> None:
        self.asked += 1
        replica = _Replica(now, self.fleet.slots)
        self.starting.append(replica)
        heapq.heappush(self.events, (now + self.fleet.start_s, -self.asked, replica))

    def _join(self, replica: _Replica, now: float) -> None:
        replica.place = len(self.members)
        self.members.append(replica)
        self.loads.append(0)
        if self.pick is None:
            self.idle += [replica] * replica.free
        waiting, self.waiting = self.waiting, deque()
        for request in waiting:
            self._arrive(request, now)

    def _remove(self, now: float) -> None:
        """The youngest: one that only starts, or one that ends its work and leaves."""
        if self.starting:
            self._gone(self.starting.pop(), now)
            return
        replica = self.members.pop()
        self.loads.pop()
        replica.place = -1
        self.draining.add(replica)
        self.idle = [other for other in self.idle if other is not replica]
        if replica.free == self.fleet.slots:
            self._gone(replica, now)

    def _gone(self, replica: _Replica, now: float) -> None:
        self.draining.discard(replica)
        self.replica_s += now - replica.born

    def trace(self, arrivals: Floats, services: Floats) -> Trace:
        """The result; replicas that are still there are paid until the last end."""
        overflowed = np.zeros(len(arrivals), dtype=np.bool_)
        overflowed[self.overflowed] = True
        ends = np.array(self.ends)
        left = [*self.members, *self.starting, *self.draining]
        end = float(ends.max())
        return Trace(
            arrivals=arrivals,
            starts=np.array(self.starts),
            ends=ends,
            overflowed=overflowed,
            replica_s=self.replica_s + sum(max(0.0, end - r.born) for r in left),
            busy_s=float(services[~overflowed].sum()),
            ticks=self.ticks,
            slots=self.fleet.slots,
        )


class _Area:
    """Means of requests in flight and in work since the last look.

    The integral of a count is the sum of the times of its falls less those of its
    rises: three additions a request, instead of one multiplication at every event.
    """

    def __init__(self) -> None:
        self.came = self.began = self.left = 0.0  # sums of times
        self.in_work = 0
        self.last = (0.0, 0.0, 0.0)

    def entered(self, now: float) -> None:
        self.came += now

    def started(self, now: float) -> None:
        self.began += now
        self.in_work += 1

    def ended(self, now: float) -> None:
        self.left += now
        self.in_work -= 1

    def means(self, now: float, in_flight: int) -> tuple[float, float]:
        """Since the last call, of requests in flight and of those in work."""
        whole = now * in_flight + self.left - self.came
        work = now * self.in_work + self.left - self.began
        before, *areas = self.last
        self.last = (now, whole, work)
        width = now - before
        return (whole - areas[0]) / width, (work - areas[1]) / width
