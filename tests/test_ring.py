"""The ring: few move, none has too much, and prefixes find their replica again."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_cloud.scaling.ring import BALANCE, Ring, prefix

KEYS = [f"key {number}".encode() for number in range(2000)]
NAMES = [f"replica-{number}" for number in range(5)]


def test_a_member_that_comes_or_goes_moves_only_its_own_share() -> None:
    ring = Ring(NAMES[:4])
    before = [ring.pick(key) for key in KEYS]
    ring.add(NAMES[4])
    after = [ring.pick(key) for key in KEYS]
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert {new for _, new in moved} == {NAMES[4]}
    assert 0.1 < len(moved) / len(KEYS) < 0.3  # a fifth, give or take
    ring.remove(NAMES[4])
    assert [ring.pick(key) for key in KEYS] == before


def test_all_rings_agree_whatever_the_order_of_arrival() -> None:
    one, other = Ring(NAMES), Ring(reversed(NAMES))
    assert [one.pick(key) for key in KEYS] == [other.pick(key) for key in KEYS]


def test_shares_are_even_enough() -> None:
    ring = Ring(NAMES, balance=None)
    shares = Counter(ring.pick(key) for key in KEYS)
    assert max(shares.values()) < 1.4 * len(KEYS) / len(NAMES)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=200),
    st.integers(1, 5),
    st.sampled_from([1.1, BALANCE, 2.0]),
)
def test_nobody_has_more_than_the_bound(
    keys: list[int], members: int, balance: float
) -> None:
    ring, loads = Ring(NAMES[:members], balance=balance), Counter()
    for total, key in enumerate(keys, 1):
        member = ring.pick(b"%d" % key, loads)
        loads[member] += 1
        assert loads[member] <= math.ceil(balance * total / members)


def test_one_hot_prefix_spreads_only_when_bounded() -> None:
    for balance, most in ((None, 100), (BALANCE, 25)):
        ring, loads = Ring(NAMES, balance=balance), Counter()
        for _ in range(100):
            loads[ring.pick(b"hot", loads)] += 1
        assert max(loads.values()) == most


def test_a_key_is_whole_blocks_of_the_beginning() -> None:
    ids = list(range(100))
    assert prefix(ids) == prefix([*ids[:64], *range(500, 600)])
    assert prefix(ids) != prefix([9, *ids[1:]])
    assert prefix(ids[:70], blocks=9) == prefix(ids[:64], blocks=9)
    assert prefix([1, 2, 3]) == prefix([1, 2, 3]) != prefix([1, 2])
    assert prefix([12, 3]) != prefix([1, 23])


def test_impossible_rings_are_refused() -> None:
    with pytest.raises(LookupError, match="add one first"):
        Ring().pick(b"key")
    for wrong in ({"balance": 1.0}, {"balance": math.nan}, {"points": 0}):
        with pytest.raises(ValueError, match="Ring: expected"):
            Ring(NAMES, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefix: expected"):
        prefix([1], blocks=0)


class Shelf:
    """A replica's prefix cache, simulated: the last few prompts, by their prefix."""

    def __init__(self, size: int) -> None:
        self.size, self.known = size, OrderedDict[bytes, None]()

    def read(self, key: bytes) -> bool:
        """Whether the prefix was known; now it is."""
        hit = key in self.known
        self.known[key] = None
        self.known.move_to_end(key)
        if len(self.known) > self.size:
            self.known.popitem(last=False)
        return hit


def hit_rate(pick: Callable[[bytes], str], prompts: Sequence[Sequence[int]]) -> float:
    shelves = {name: Shelf(8) for name in NAMES[:3]}
    hits = [shelves[pick(prefix(ids))].read(prefix(ids)) for ids in prompts]
    return sum(hits) / len(hits)


def test_prefix_routing_hits_25_points_more_often_than_turns() -> None:
    draw = random.Random(1)
    systems = [[draw.randrange(49_152) for _ in range(64)] for _ in range(18)]
    prompts = [
        [*draw.choice(systems), *(draw.randrange(49_152) for _ in range(9))]
        for _ in range(2000)
    ]
    turns, ring = itertools.cycle(NAMES[:3]), Ring(NAMES[:3])
    by_turns = hit_rate(lambda _: next(turns), prompts)
    by_prefix = hit_rate(ring.pick, prompts)
    assert by_prefix >= by_turns + 0.25
