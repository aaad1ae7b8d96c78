"""Budgets of requests and tokens for each caller, reserved before work, settled after.

The counting is `limits`' sliding window: the last minute is the current window plus the
fading share of the one before. Nothing jumps back to full at the turn of a minute, and
two numbers a key are all that is stored (in this process, or in Redis for a fleet).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, cast

from limits import RateLimitItemPerMinute
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import ConfigurationError as UnusableStorage
from limits.storage import storage_from_string

from serving.settings import ConfigurationError

WINDOW_S = 60.0


class OverBudget(Exception):
    """A minute's budget is spent; `retry_after_s` is None if waiting is no cure."""

    def __init__(self, kind: str, limit: int, cost: int, retry_after_s: float | None):
        super().__init__(f"{kind} budget of {limit} a minute is spent")
        self.kind, self.limit, self.cost = kind, limit, cost
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Reservation:
    """What one request holds until it is settled."""

    tenant: str
    tokens: int  # the most it may use
    made_at: float
    used: int = 0  # what it did use, known at the end


@dataclass(frozen=True, slots=True)
class Window:
    """Two counters and their clocks, as the sliding window sees them."""

    previous: int
    previous_left_s: float
    current: int
    current_left_s: float  # until the current counter has faded: up to two windows

    @property
    def used(self) -> int:
        return (
            math.floor(self.previous * self.previous_left_s / WINDOW_S) + self.current
        )

    @property
    def started_ago_s(self) -> float:
        return 2 * WINDOW_S - self.current_left_s if self.current_left_s else 0.0

    @property
    def full_again_s(self) -> float:
        if self.current > 0:
            return self.current_left_s
        return self.previous_left_s if self.previous > 0 else 0.0

    def wait_s(self, cost: int, limit: int) -> float:
        """How long until `cost` fits, if nobody spends anything meanwhile."""
        room = limit - cost - self.current
        if self.previous > 0 and room >= 0:
            return max(0.0, self.previous_left_s - room * WINDOW_S / self.previous)
        fading_s = (limit - cost) * WINDOW_S / max(self.current, 1)
        return max(0.0, self.current_left_s - fading_s)


class Budget:
    """One kind of budget (requests or tokens) for all callers."""

    def __init__(self, kind: str, limit: int, storage: Any):
        self.kind, self.limit = kind, limit
        self.item = RateLimitItemPerMinute(max(limit, 1), namespace=kind)
        self.limiter = SlidingWindowCounterRateLimiter(storage)

    async def window(self, tenant: str) -> Window:
        storage = cast(Any, self.limiter.storage)
        key = self.item.key_for(tenant)
        return Window(*await storage.get_sliding_window(key, int(WINDOW_S)))

    async def take(self, tenant: str, cost: int) -> None:
        """Spend, or raise OverBudget and leave everything as it was."""
        if not self.limit or await self.limiter.hit(self.item, tenant, cost=cost):
            return
        window = await self.window(tenant)
        wait_s = None if cost > self.limit else window.wait_s(cost, self.limit)
        raise OverBudget(self.kind, self.limit, cost, wait_s)

    async def give_back(self, tenant: str, unused: int, taken_at: float) -> None:
        """Refund what was taken too much.

        Only while the window it was taken in is the current one: an older reservation
        fades by itself, and a refund in the new window would outlive it as a credit.
        """
        if not self.limit or unused <= 0:
            return
        window = await self.window(tenant)
        if taken_at >= time.time() - window.started_ago_s:
            await self.limiter.hit(self.item, tenant, cost=-unused)

    async def headers(self, tenant: str) -> dict[str, str]:
        """The three headers OpenAI's clients know, e.g. reset: 59.2s."""
        if not self.limit:
            return {}
        window = await self.window(tenant)
        return {
            f"x-ratelimit-limit-{self.kind}": str(self.limit),
            f"x-ratelimit-remaining-{self.kind}": str(max(0, self.limit - window.used)),
            f"x-ratelimit-reset-{self.kind}": f"{window.full_again_s:.3f}s",
        }


class Budgets:
    """Requests and tokens together: both are taken, or neither."""

    def __init__(self, requests: int, tokens: int, storage: str):
        shared = _storage(storage)
        self.requests = Budget("requests", requests, shared)
        self.tokens = Budget("tokens", tokens, shared)

    async def reserve(self, tenant: str, tokens: int) -> Reservation:
        """Take one request and its worst case of tokens; raise OverBudget if not."""
        reservation = Reservation(tenant, tokens, time.time())
        await self.requests.take(tenant, 1)
        try:
            await self.tokens.take(tenant, tokens)
        except OverBudget:
            await self.requests.give_back(tenant, 1, reservation.made_at)
            raise
        return reservation

    async def settle(self, reservation: Reservation) -> None:
        """Give back what was reserved and not used."""
        unused = reservation.tokens - reservation.used
        await self.tokens.give_back(reservation.tenant, unused, reservation.made_at)

    async def headers(self, tenant: str) -> dict[str, str]:
        """Rate-limit headers for an answer to this caller."""
        return {
            **await self.requests.headers(tenant),
            **await self.tokens.headers(tenant),
        }


def _storage(uri: str) -> Any:
    try:
        if not uri.startswith("async+"):
            raise UnusableStorage("it would block the event loop")
        return storage_from_string(uri)
    except UnusableStorage as error:
        raise ConfigurationError(
            "LIMITS_STORAGE: expected async+memory:// or async+redis://host:port (with "
            f"pip install coredis), found {uri!r}: {error}."
        ) from error
