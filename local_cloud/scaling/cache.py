"""An exact cache for answers: what was asked before, to the letter, by the same caller.

    cache = ResponseCache(Rules(ttl_s=300))
    app = CachedApp(create_app(), cache, revision=models.prepare())

A model's answer may be reused only if asking again would bring the same one: greedy, or
drawn with a given seed. So the key holds everything the answer depends on, and who
asked. It errs to one side: a needless miss costs a second, a wrong hit costs trust.

What HTTP says of caches is written for GET. A completion is a POST that changes
nothing, so `CachedApp` answers If-None-Match with 304 as for a GET. Streams pass
through unstored: X-Cache says `bypass`. Answering one from memory would have to invent
the pace of its tokens.

The cache stands in front of authentication and rate limits: a hit costs no budget, and
a key that was revoked still gets what it had asked before, for `ttl_s` at most.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

PATHS = ("/v1/chat/completions", "/v1/completions")
DEFAULTS: Mapping[str, Any] = {  # of both paths; null means the same as leaving out
    "temperature": 0.0,
    "top_p": 1.0,
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "stream": False,
}
DEFAULT_MAX_TOKENS = 256
# What the same request will always be refused with; 401 or 429 depend on more than it.
LASTING_ERRORS = frozenset({400, 404, 413, 422})
FORBIDDEN = frozenset({401, 403})
ENTRY_BYTES = 600  # what an entry takes beside its body
MAX_BODY_BYTES = (
    1 << 20
)  # of a request that is looked at; the application bounds it too
BODY_S = 10.0  # a request may take to arrive here; then it is the application's

State = Literal["hit", "miss", "stale", "bypass"]
Compute = Callable[[], Coroutine[Any, Any, "Answer"]]


# What is the same request, and which answer may be kept at all.


def read(body: bytes) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
        ValueError: it is none, or one that two readers may read differently.
    """

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(members := dict(pairs)) < len(pairs):
            raise ValueError("expected each field once, found one twice")
        return members

    def no_constant(name: str) -> Any:
        raise ValueError(f"expected JSON, found {name}")

    try:
        asked = json.loads(
            body.decode(), object_pairs_hook=no_twins, parse_constant=no_constant
        )
    except RecursionError:
        raise ValueError("expected a flat object, found a deep one") from None
    if not isinstance(asked, dict):
        raise ValueError(f"expected a JSON object, found {type(asked).__name__}")
    return asked


def is_deterministic(asked: Mapping[str, Any]) -> bool:
    """Whether asking again brings the same answer: greedy, or with a given seed."""
    return not asked.get("temperature") or asked.get("seed") is not None


def filled(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The request with its defaults written out: two spellings of one become equal."""
    full = dict(asked)
    for name, default in DEFAULTS.items():
        value = full.get(name)
        value = default if value is None else value
        # 1 and 1.0 are the same temperature; True is a mistake that must stay one.
        if isinstance(default, float) and type(value) is int and abs(value) <= 2:
            value = float(value)
        full[name] = value
    if full.get("max_tokens") is None and full.get("max_completion_tokens") is None:
        full["max_tokens"] = DEFAULT_MAX_TOKENS
    return full


def key(asked: Mapping[str, Any], *, revision: str, tenant: str, path: str = "") -> str:
    """The name of an answer: a digest of all it depends on.

    Only the outermost fields are sorted. Within tools and schemas the order counts: it
    is the order in which the model reads them, and writes their fields.
    """
    whole = [revision, tenant, path, sorted(filled(asked).items())]
    text = json.dumps(whole, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def tenant_of(scope: Any) -> str:
    """Who asks: a digest of the credentials, or of the address of who shows none."""
    shown = dict(scope["headers"]).get(b"authorization")
    if shown is None:
        shown = b"anonymous " + str((scope.get("client") or [""])[0]).encode()
    return hashlib.sha256(shown).hexdigest()  # the credentials are kept nowhere


# The store.


@dataclass(frozen=True)
class Rules:
    """How long answers are kept, and how many."""

    ttl_s: float = 300.0  # fresh
    jitter: float = 0.1  # of it, up or down: what came together must not end together
    stale_s: float = 60.0  # still given out after that, while a new one is computed
    negative_s: float = 5.0  # refusals that last
    max_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        times = (self.ttl_s, self.stale_s, self.negative_s)
        if min(times) < 0 or not 0 <= self.jitter < 1 or self.max_bytes < 0:
            raise ValueError(
                f"Rules: expected no negative number and a jitter below 1, found {self}"
            )


@dataclass(frozen=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'


@dataclass(frozen=True)
class Found:
    """An answer, where it came from, and how old it is."""

    answer: Answer
    state: State
    age_s: float = 0.0


@dataclass(frozen=True)
class Entry:
    """A stored answer; times on the cache's clock."""

    answer: Answer
    stored: float
    fresh_until: float
    usable_until: float
    bytes: int


@dataclass(eq=False)
class Flight:
    """One computation that all who ask the same wait for."""

    task: asyncio.Task[Answer]
    waiting: int = 0


class ResponseCache:
    """Answers by key, for one event loop.

    Counts in `counts`: hit, miss, stale; `computed` (calls of the model), `shared`
    (misses that joined another's call), `evicted`, `failed` (calls that raised).
    """

    def __init__(
        self,
        rules: Rules | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self.rules, self.clock = rules or Rules(), clock
        self.counts: Counter[str] = Counter()
        self.bytes = 0
        self._chance = random.Random(seed)
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # the last used is last
        self._flights: dict[str, Flight] = {}

    async def get(self, key: str, compute: Compute) -> Found:
        """The stored answer, or the one that `compute` brings.

        Callers with the same key share one computation. It goes on while anyone waits
        for it, whoever started it; with the last one it ends.
        """
        now, entry = self.clock(), self._usable(key)
        if entry is None:
            self.counts["miss"] += 1
            return Found(await self._join(key, compute), "miss")
        state: State = "hit"
        if now >= entry.fresh_until:
            state = "stale"
            if key not in self._flights:
                self._start(key, compute)
        self.counts[state] += 1
        return Found(entry.answer, state, now - entry.stored)

    async def close(self) -> None:
        """End what is being computed; the stored answers stay."""
        tasks = [flight.task for flight in self._flights.values()]
        self._flights.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _usable(self, key: str) -> Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self.clock() >= entry.usable_until:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    async def _join(self, key: str, compute: Compute) -> Answer:
        flight = self._flights.get(key)
        if flight is None:
            flight = self._start(key, compute)
        else:
            self.counts["shared"] += 1
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._flights.pop(key, None)  # nobody may join what is ending
                flight.task.cancel()

    def _start(self, key: str, compute: Compute) -> Flight:
        self.counts["computed"] += 1
        task = asyncio.create_task(self._compute(key, compute))
        flight = self._flights[key] = Flight(task)

        def landed(task: asyncio.Task[Answer]) -> None:
            if self._flights.get(key) is flight:
                del self._flights[key]
            # Looked at here, because nobody waits for the renewal of a stale answer.
            if not task.cancelled() and task.exception() is not None:
                self.counts["failed"] += 1

        task.add_done_callback(landed)
        return flight

    async def _compute(self, key: str, compute: Compute) -> Answer:
        answer = await compute()
        if answer.status == 200:
            spread = self.rules.jitter * self._chance.uniform(-1, 1)
            self._put(key, answer, self.rules.ttl_s * (1 + spread), self.rules.stale_s)
        elif answer.status in LASTING_ERRORS:
            self._put(key, answer, self.rules.negative_s, 0)
        elif answer.status in FORBIDDEN:  # the caller lost the right to it
            self._drop(key)
        return answer  # and a stale one outlives a server's failure

    def _put(self, key: str, answer: Answer, fresh_s: float, stale_s: float) -> None:
        self._drop(key)
        kept = tuple(pair for pair in answer.headers if pair[0] == b"content-type")
        size = len(answer.body) + ENTRY_BYTES
        if fresh_s <= 0 or size > self.rules.max_bytes:
            return
        now = self.clock()
        until = now + fresh_s
        kept_answer = replace(answer, headers=kept)
        self._entries[key] = Entry(kept_answer, now, until, until + stale_s, size)
        self.bytes += size
        while self.bytes > self.rules.max_bytes:
            self._drop(next(iter(self._entries)))
            self.counts["evicted"] += 1

    def _drop(self, key: str) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self.bytes -= entry.bytes


# In front of an application.


@dataclass
class Request:
    """A request as far as it was read, and how to hand it on unread."""

    scope: Any
    receive: Any
    headers: dict[str, str]
    seen: list[Any] = field(default_factory=list)
    body: bytes | None = None  # None: too long, too slow, or given up

    @classmethod
    async def arrived(cls, scope: Any, receive: Any) -> Request:
        headers = {
            k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]
        }
        request = cls(scope, receive, headers)
        try:
            async with asyncio.timeout(BODY_S):
                await request.read()
        except TimeoutError:
            pass  # the application has limits of its own
        return request

    async def read(self) -> None:
        parts, size, more = [], 0, True
        while more:
            self.seen.append(message := await self.receive())
            if message["type"] != "http.request":
                return
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > MAX_BODY_BYTES:
                return
        self.body = b"".join(parts)

    async def again(self) -> Any:
        """`receive` for the application, from the beginning."""
        return self.seen.pop(0) if self.seen else await self.receive()

    def asked(self) -> dict[str, Any] | None:
        """What is asked, if its answer may be stored; None if it may not."""
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        control = self.headers.get("cache-control", "").lower()
        special = {"idempotency-key", "content-encoding"} & self.headers.keys()
        if self.body is None or kind != "application/json" or special:
            return None
        if "no-store" in control or "no-cache" in control:
            return None
        try:
            asked = read(self.body)
        except ValueError:
            return None
        streams = asked.get("stream") not in (None, False)
        return asked if is_deterministic(asked) and not streams else None


class CachedApp:
    """An ASGI application behind a cache.

    Args:
        app: answers `PATHS`; all else passes it untouched.
        revision: of the weights: another one, and everything is new.
        tenant: tells callers apart, by the ASGI scope of a request.
    """

    def __init__(
        self,
        app: Any,
        cache: ResponseCache,
        *,
        revision: str,
        tenant: Callable[[Any], str] = tenant_of,
    ) -> None:
        self.app, self.cache = app, cache
        self.revision, self.tenant = revision, tenant

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            try:
                await self.app(scope, receive, send)
            finally:
                await self.cache.close()
        elif scope["type"] == "http" and self.concerns(scope):
            await self.answer(await Request.arrived(scope, receive), send)
        else:
            await self.app(scope, receive, send)

    def concerns(self, scope: Any) -> bool:
        plain = scope["path"] in PATHS and not scope.get("query_string")
        return scope["method"] == "POST" and plain

    async def answer(self, request: Request, send: Any) -> None:
        """From the cache, or past it."""
        name = self.name(request)
        if name is None:
            await self.app(request.scope, request.again, marked(send))
            return
        compute = partial(ask, self.app, request.scope, request.body or b"")
        found = await unless_gone(request.receive, self.cache.get(name, compute))
        if found is not None:
            known = request.headers.get("if-none-match", "")
            await deliver(send, found, known, self.cache.rules)

    def name(self, request: Request) -> str | None:
        """The answer's key; None if it may not be stored."""
        asked, path = request.asked(), request.scope["path"]
        if asked is None:
            return None
        tenant = self.tenant(request.scope)
        try:
            return key(asked, revision=self.revision, tenant=tenant, path=path)
        except ValueError:  # a number that does not fit a float
            return None


async def ask(app: Any, scope: Any, body: bytes) -> Answer:
    """Let the application answer, for whoever waits by then."""
    bodies = [{"type": "http.request", "body": body}]
    starts: list[Any] = []
    parts: list[bytes] = []

    async def receive() -> Any:
        if not bodies:
            await asyncio.Event().wait()  # who hangs up is the cache's business
        return bodies.pop()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            starts.append(message)
        else:
            parts.append(message.get("body", b""))

    await app({**scope, "state": dict(scope.get("state") or {})}, receive, send)
    if not starts:
        raise RuntimeError("cache: expected an answer of the application, found none")
    headers = (pair for pair in starts[0].get("headers", ()))
    kept = tuple((k.lower(), v) for k, v in headers if k.lower() != b"content-length")
    return Answer(starts[0]["status"], b"".join(parts), kept)


async def unless_gone(receive: Any, work: Coroutine[Any, Any, Found]) -> Found | None:
    """What the work brings; None if the client hangs up first."""

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(hang_up())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def deliver(send: Any, found: Found, known: str, rules: Rules) -> None:
    """Send an answer; without its body to who has it already."""
    answer, tag = found.answer, found.answer.etag
    headers = [*answer.headers, (b"x-cache", found.state.encode())]
    if found.state != "miss":
        headers.append((b"age", str(int(found.age_s)).encode()))
    status, body = answer.status, answer.body
    if status == 200:
        lives = f"private, max-age={rules.ttl_s:.0f}"
        lives += f", stale-while-revalidate={rules.stale_s:.0f}"
        headers += [(b"etag", tag.encode()), (b"cache-control", lives.encode())]
        tags = {one.strip().removeprefix("W/") for one in known.split(",")}
        if tag in tags or "*" in tags:
            status, body = 304, b""
            headers = [pair for pair in headers if pair[0] != b"content-type"]
    if status != 304:
        headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def marked(send: Any) -> Callable[[Any], Awaitable[None]]:
    """`send` for what passes the cache by."""

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"x-cache", b"bypass")]
            message = {**message, "headers": headers}
        await send(message)

    return sending
