"""Replicas: child processes that come when asked for, and leave without a loose end.

    with HAProxy() as balancer, ReplicaSet(command, balancer=balancer) as replicas:
        replicas.scale(4)
        replicas.wait(4)

A replica is any program that serves `/health/ready` on the port it is given. Each place
in the set has a thread that tells its whole life: start, wait until it is ready, enter
the balancer, watch, leave the balancer, end. A replica that ends by itself, hangs, or
never becomes ready is replaced; one that fails again and again is, ever more slowly.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, Self

from course.process import Child, answers, child, free_port, wait_until
from local_cloud.scaling.balancer import READY, Balancer, checked

State = Literal["starting", "ready", "draining", "failed"]
Command = Callable[[int], Sequence[str]]  # the program and its arguments, for a port

LOOK_S = 0.05  # between two looks at whether the process lives
DRAIN_LOOK_S = 0.02  # between two looks at whether one that leaves is done
PROBE_S = 0.5  # between two questions whether it is ready, once it serves
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before a failed start is tried again
PROVEN_S = 5.0  # a replica that served for so long did not fail at its start


@dataclass(frozen=True)
class Replica:
    """One process of a set."""

    id: str
    url: str
    pid: int | None  # None until it runs
    state: State


@dataclass(frozen=True)
class Event:
    """What happened to a replica, in seconds since the set began."""

    time_s: float
    replica: str
    what: str
    detail: str = ""


class Place:
    """A place in the set; its replicas come one after the other."""

    def __init__(self) -> None:
        self.leaving = threading.Event()
        self.replica: Replica | None = None
        self.thread: threading.Thread | None = None


class ReplicaSet:
    """So many replicas as were asked for last, behind a balancer if there is one.

    Args:
        command: gives a replica's program and arguments for a port.
        balancer: where replicas that are ready are entered.
        least, most: bounds of the size; `least` are started at once.
        env: variables set for the replicas.
        ready_s: a replica may take to become ready; then it has failed.
        hang_s: a replica may be silent when asked if it is ready; then it is ended.
        drain_s: a replica that leaves has for what it has begun.
        stop_s: between SIGTERM and SIGKILL.
        on_change: called with each event, in a thread of the set; what it raises
            becomes an event, "untold".
    """

    def __init__(
        self,
        command: Command,
        *,
        balancer: Balancer | None = None,
        least: int = 1,
        most: int = 8,
        env: Mapping[str, str] | None = None,
        ready_s: float = 60.0,
        hang_s: float = 5.0,
        drain_s: float = 30.0,
        stop_s: float = 5.0,
        on_change: Callable[[Event], None] | None = None,
    ):
        checked("most", most, 1, 1000)
        checked("least", least, 0, most)
        for name, value in {"ready_s": ready_s, "hang_s": hang_s}.items():
            checked(name, value, 0.01, 86_400)
        for name, value in {"drain_s": drain_s, "stop_s": stop_s}.items():
            checked(name, value, 0, 86_400)
        self.command, self.balancer, self.env = command, balancer, dict(env or {})
        self.least, self.most = least, most
        self.ready_s, self.hang_s = ready_s, hang_s
        self.drain_s, self.stop_s = drain_s, stop_s
        self.on_change = on_change
        self.events: list[Event] = []
        self._places: list[Place] = []
        self._gone: list[Place] = []
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._began = time.monotonic()
        self._ending = threading.Event()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self.scale(self.least)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends all at once: nobody is served any more."""
        self._ending.set()
        with self._lock:
            places = [*self._places, *self._gone]
            self._places.clear()
        for place in places:
            place.leaving.set()
        for place in places:
            assert place.thread
            place.thread.join()

    @property
    def members(self) -> list[Replica]:
        """The replicas there are now, those that leave included."""
        with self._lock:
            places = [*self._places, *self._gone]
        return [replica for place in places if (replica := place.replica)]

    @property
    def size(self) -> int:
        """How many were asked for."""
        return len(self._places)

    def ready(self) -> list[Replica]:
        """The replicas that serve."""
        return [replica for replica in self.members if replica.state == "ready"]

    def scale(self, wanted: int) -> int:
        """Ask for so many; gives the size within the bounds, and does not wait.

        Those that leave: first who is not ready yet, then who came last.
        """
        checked("the replicas wanted", wanted, 0, float("inf"))
        with self._lock:
            if self._ending.is_set():
                return 0
            size = min(max(int(wanted), self.least), self.most)
            while len(self._places) < size:
                self._places.append(self._place())
            self._places.sort(key=lambda place: not _serves(place))
            while len(self._places) > size:
                self._dismiss(self._places[-1])
            return size

    def wait(self, count: int, deadline_s: float = 60.0) -> list[Replica]:
        """Wait until so many serve and none is leaving; gives them."""

        def settled() -> list[Replica]:
            good = len(self.ready()) == len(self.members) == count
            return self.ready() if good else []

        if count == 0:
            wait_until(lambda: not self.members, deadline_s, "no replicas")
            return []
        try:
            return wait_until(settled, deadline_s, f"{count} ready replicas")
        except TimeoutError as late:
            told = "\n".join(f"{e.replica} {e.what} {e.detail}" for e in self.events)
            raise TimeoutError(f"{late} What happened:\n{told}") from None

    def drain(self, replica_id: str) -> None:
        """Let this one leave when it is done; the set is smaller by one."""
        with self._lock:
            self._dismiss(self._find(replica_id))

    def kill(self, replica_id: str, number: int = signal.SIGKILL) -> None:
        """Send it a signal, as an accident would; the set replaces what it breaks."""
        with self._lock:
            replica = self._find(replica_id).replica
        if replica and replica.pid:
            with suppress(ProcessLookupError):  # it was quicker
                os.killpg(replica.pid, number)

    def _find(self, replica_id: str) -> Place:
        for place in self._places:
            if place.replica and place.replica.id == replica_id:
                return place
        known = [place.replica.id for place in self._places if place.replica]
        raise KeyError(
            f"Expected a replica's id, found {replica_id!r}; there are "
            f"{', '.join(known) or 'none'}."
        )

    def _place(self) -> Place:
        place = Place()
        place.thread = threading.Thread(target=self._occupy, args=(place,))
        place.thread.start()
        return place

    def _dismiss(self, place: Place) -> None:
        self._places.remove(place)
        self._gone.append(place)
        place.leaving.set()

    def _occupy(self, place: Place) -> None:
        """A place's thread: one replica after the other, until it is to go."""
        pause_s = FIRST_PAUSE_S
        try:
            while not place.leaving.is_set():
                began = time.monotonic()
                served = self._live(place)
                if served and time.monotonic() - began > PROVEN_S:
                    pause_s = 0.0
                place.leaving.wait(pause_s)
                pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        finally:
            place.replica = None
            with self._lock:
                if place in self._gone:
                    self._gone.remove(place)

    def _live(self, place: Place) -> bool:
        """One replica, from start to end; whether it ever served."""
        name = f"replica-{next(self._ids)}"
        place.replica = Replica(name, "", None, "starting")
        self._tell(name, "started")
        try:
            why = self._run(place, free_port())
        except Exception as error:  # `command` may raise anything: the place lives on
            self._become(place, "failed")
            self._tell(name, "failed", str(error) or repr(error))
            return False
        self._tell(name, why)
        return True

    def _run(self, place: Place, port: int) -> str:
        """Its process, from start to end; how it ended."""
        assert place.replica
        url = f"http://127.0.0.1:{port}"
        place.replica = replace(place.replica, url=url)

        def settled() -> bool:
            return place.leaving.is_set() or answers(url + READY)

        start = child(
            self.command(port),
            env=self.env,
            ready=settled,
            deadline_s=self.ready_s,
            stop_s=self.stop_s,
        )
        with start as running:
            return self._serve(place, port, running)

    def _serve(self, place: Place, port: int, running: Child) -> str:
        """Through the balancer, until it leaves or fails; says which."""
        assert place.replica
        name, url = place.replica.id, place.replica.url + READY
        if place.leaving.is_set():
            return "left"
        if self.balancer:
            self.balancer.add(name, "127.0.0.1", port)
        try:
            self._enter(place, running)
            why = self._watch(place, running, url)
            self._become(place, "draining" if why == "left" else "failed")
            if why == "left":
                self._tell(name, "draining")
            else:
                running.stop(0)  # what it had begun is sent elsewhere now, not later
        finally:
            if self.balancer:
                self._leave(self.balancer, name, running)
        return why

    def _leave(self, balancer: Balancer, name: str, running: Child) -> None:
        """Out of the balancer when it is done; at once if it died or the set ends."""
        balancer.drain(name)
        end = time.monotonic() + self.drain_s
        while (member := balancer.stats().member(name)) and member.in_flight:
            if not running.alive or time.monotonic() >= end:
                break
            if self._ending.wait(DRAIN_LOOK_S):
                break
        balancer.remove(name, deadline_s=0)

    def _enter(self, place: Place, running: Child) -> None:
        """Ready counts from when requests can come: once the balancer has seen it."""
        assert place.replica
        name = place.replica.id

        def inside() -> bool:
            if not self.balancer or place.leaving.is_set() or not running.alive:
                return True
            member = self.balancer.stats().member(name)
            return member is not None and member.state == "up"

        wait_until(inside, self.ready_s, f"the balancer to accept {name}", every_s=0.02)
        self._become(place, "ready", running.pid)
        self._tell(name, "ready")

    def _watch(self, place: Place, running: Child, url: str) -> str:
        """Wait for its end: it "left" as it should, "crashed", "hung" or is "ill"."""
        good = probed = time.monotonic()
        while running.alive:
            if place.leaving.wait(LOOK_S):
                return "left"
            if time.monotonic() - probed < PROBE_S:
                continue
            probed = time.monotonic()
            if answers(url, timeout_s=self.hang_s):
                good = probed
            elif time.monotonic() - probed >= 0.9 * self.hang_s:
                return "hung"
            elif time.monotonic() - good > self.ready_s:
                return "ill"  # it answers, but for too long not "ready"
        return "crashed"

    def _become(self, place: Place, state: State, pid: int | None = None) -> None:
        assert place.replica
        pid = pid or place.replica.pid
        place.replica = replace(place.replica, state=state, pid=pid)

    def _tell(self, name: str, what: str, detail: str = "") -> None:
        event = Event(time.monotonic() - self._began, name, what, detail)
        self.events.append(event)
        if self.on_change:
            try:
                self.on_change(event)
            except Exception as error:  # who only watches ends no replica
                self.events.append(replace(event, what="untold", detail=repr(error)))


def _serves(place: Place) -> bool:
    return place.replica is not None and place.replica.state == "ready"
