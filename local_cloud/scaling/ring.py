"""Prefix routing: requests that begin alike go to the replica that knows the beginning.

A replica keeps the prompts it has read (its prefix cache), but only its own. Balanced
by turns, every replica reads every beginning, and each cache holds a little of all. A
hash of the prompt's first blocks sends them to one replica, and the caches add up.

The hash is *consistent*: replicas and prompts lie on one ring, and a prompt belongs to
the next replica clockwise. One that comes or goes moves only its own share. And the
load is *bounded*: who has more than `balance` times the mean is passed over, or the
one popular beginning would queue at one replica while the others are idle. It is what
HAProxy calls hash-balance-factor, in percent.

Sources: D. Karger and others, Consistent Hashing and Random Trees, 1997; V. Mirrokni,
M. Thorup, M. Zadimoghaddam, Consistent Hashing with Bounded Loads, 2018.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect, insort
from collections.abc import Iterable, Mapping, Sequence

BALANCE = 1.25  # HAProxy's hash-balance-factor 125
POINTS = 128  # of each member on the ring; the shares differ by about 1 / sqrt(POINTS)
BLOCK = 16  # tokens; the engine reuses no shorter beginning
BLOCKS = 4


def prefix(ids: Sequence[int], *, block: int = BLOCK, blocks: int = BLOCKS) -> bytes:
    """The key of a prompt: its first whole blocks of tokens, or all of a short one.

    Too few, and prompts with the same polite opening share a replica for nothing; too
    many, and the question itself becomes part of the key: each prompt is then alone.
    """
    if block < 1 or blocks < 1:
        raise ValueError(
            f"prefix: expected at least one block of one token, found {blocks} of "
            f"{block}"
        )
    whole = min(len(ids) // block, blocks) * block
    return b",".join(b"%d" % id for id in ids[: whole or len(ids)])


class Ring:
    """Members on a ring.

    Args:
        members: their names.
        balance: the most that one may have, in units of the mean; None: no bound.
        points: places of each member on the ring.
    """

    def __init__(
        self,
        members: Iterable[str] = (),
        *,
        balance: float | None = BALANCE,
        points: int = POINTS,
    ) -> None:
        if (balance is not None and not balance > 1) or points < 1:
            raise ValueError(
                "Ring: expected a balance above 1 (or None) and at least one point, "
                f"found {balance} and {points}; 1.25 and {POINTS} are good values"
            )
        self.balance, self.points = balance, points
        self._places: list[tuple[int, str]] = []
        self.members: set[str] = set()
        for member in members:
            self.add(member)

    def add(self, member: str) -> None:
        """A member comes; harmless when repeated."""
        if member not in self.members:
            self.members.add(member)
            for point in range(self.points):
                insort(self._places, (_place(f"{member}#{point}".encode()), member))

    def remove(self, member: str) -> None:
        """A member goes; harmless when repeated."""
        self.members.discard(member)
        self._places = [place for place in self._places if place[1] != member]

    def pick(self, key: bytes, loads: Mapping[str, int] | None = None) -> str:
        """The member that gets a request.

        Args:
            key: the beginning of its prompt, from `prefix`.
            loads: requests in flight by member; who is not named has none.

        Raises:
            LookupError: the ring is empty.
        """
        if not self.members:
            raise LookupError("ring: expected a member, found none; add one first")
        loads = loads or {}
        most = self._most(loads)
        start = bisect(self._places, (_place(key), ""))
        for step in range(len(self._places)):
            member = self._places[(start + step) % len(self._places)][1]
            if loads.get(member, 0) < most:
                return member
        raise AssertionError("all are above their mean")

    def _most(self, loads: Mapping[str, int]) -> float:
        """What one may have after this request, too: `balance` times the new mean."""
        if self.balance is None:
            return math.inf
        total = 1 + sum(loads.get(member, 0) for member in self.members)
        return math.ceil(self.balance * total / len(self.members))


def _place(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
