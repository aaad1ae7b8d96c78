"""What every balancer can do, whatever it is made of: the face that the rest knows."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from course.process import wait_until

READY = "/health/ready"  # the one path that says "send me requests"
CHECK_S = 0.25  # from one look at a member's health to the next
FALL, RISE = 2, 1  # looks in a row that take a member out, or back in
RETRIES = 3  # on another member where there is one
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")

State = Literal["up", "down", "draining"]


class BalancerError(RuntimeError):
    """A balancer that cannot do what it was asked."""


@dataclass(frozen=True)
class Member:
    """Where requests can go, and what became of those that went."""

    name: str
    state: State
    in_flight: int
    taken: int  # requests sent to it so far
    failed: int  # of them: no answer, or one with a status of 500 or more


@dataclass(frozen=True)
class Traffic:
    """A balancer at one moment."""

    members: tuple[Member, ...]
    queue: int  # requests that no member has taken yet
    answered: int  # requests that left the balancer so far, whatever the status
    retried: int  # attempts beyond the first

    @property
    def in_flight(self) -> int:
        """Requests at the members."""
        return sum(member.in_flight for member in self.members)

    def member(self, name: str) -> Member | None:
        """The member of this name, None if there is none."""
        return next((one for one in self.members if one.name == name), None)


class Balancer(Protocol):
    """One address for many members that come and go. Ends with its `with` block."""

    url: str

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def add(self, name: str, host: str, port: int) -> None:
        """A new member; it gets requests once it has been found ready."""
        ...

    def drain(self, name: str) -> None:
        """No new requests for it; what it has begun goes on."""
        ...

    def remove(self, name: str, *, deadline_s: float = 30.0) -> None:
        """Drain it, wait for what it has begun, forget it."""
        ...

    def stats(self) -> Traffic:
        """What goes on now."""
        ...


def wait_up(balancer: Balancer, names: Iterable[str], deadline_s: float = 10.0) -> None:
    """Wait until these members get requests."""
    for name in names:

        def up(name: str = name) -> bool:
            member = balancer.stats().member(name)
            return member is not None and member.state == "up"

        wait_until(up, deadline_s, f"{name} to be up", every_s=0.01)


def checked_address(name: str, host: str, port: int) -> str:
    """`host:port`; ValueError unless the three can be a member's."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"Expected a member's name of letters, digits, '_', '.' and '-', found "
            f"{name!r}."
        )
    checked(f"the port of {name}", port, 1, 65_535)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(
            f"Expected an IP address for {name}, found {host!r}. Resolve it first."
        ) from None
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def checked(what: str, value: float, low: float, high: float) -> None:
    """ValueError unless the number lies between the two; NaN never does."""
    if not low <= value <= high:
        raise ValueError(
            f"Expected {what} between {low:g} and {high:g}, found {value!r}."
        )
