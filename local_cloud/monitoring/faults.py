"""An ingress that can break on command: what users see, measured where they come in.

    with Edge("http://127.0.0.1:8000") as edge:
        edge.inject(errors=0.5)      # every second request, exactly
        edge.clear()

A service that is stopped, or gone, counts no errors: only whoever stands in front of it
sees them. So the edge has metrics of its own at `/metrics`, under the names the API
uses; Prometheus' label `job` tells them apart. Nothing is injected unless ordered, and
what is injected says so: a header `x-fault-injected` and a counter by kind.

It reads status lines, no answers, as any ingress does: a stream that the API ends with
an error, for want of a better place, is good to it. The API's own counts know better.
"""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from course.process import wait_until
from local_cloud import passing
from local_cloud.passing import HOP, MOST_BYTES

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 2.0  # of silence from the API until the edge gives up: 504
REQUEST_S = [0.01 * 2**i for i in range(14)]  # 10 ms to 82 s, as the API has them
FIRST_S = [0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/classify")
CODES = (200, 429, 499, 500, 502, 503, 504)
KINDS = ("error", "hang", "delay")  # of what is injected
CLIENT_LEFT = 499  # nginx's number: nobody is there to be told


@dataclass(frozen=True)
class Faults:
    """What is injected now. Shares are of all requests, from 0 to 1."""

    errors: float = 0.0  # answered 500 by the edge
    hangs: float = 0.0  # not answered until the edge gives up
    delay_s: float = 0.0  # added to every answer
    most: float = math.inf  # errors, then no more

    def __post_init__(self) -> None:
        shares = self.errors >= 0 and self.hangs >= 0 and self.errors + self.hangs <= 1
        if not (shares and 0 <= self.delay_s <= 3600):
            raise ValueError(
                f"faults: expected errors and hangs from 0 to 1 together and delay_s "
                f"from 0 to 3600, found {self}; correct it"
            )


class Share:
    """Picks a share of all requests evenly, not by lot: half is every second one."""

    def __init__(self, share: float, most: float = math.inf) -> None:
        self.share, self.left, self.owed = share, most, 0.0

    def hit(self) -> bool:
        self.owed += self.share
        if self.owed < 1 - 1e-9 or self.left < 1:
            return False
        self.owed -= 1
        self.left -= 1
        return True


class EdgeMetrics:
    """What an ingress counts. `edges_s` become bucket edges too.

    A ratio under a threshold is exact only on an edge of a bucket, so the thresholds
    of all objectives belong there. Routes and codes are known beforehand: labels stay
    few whatever strangers ask for, and no first increment is missed.
    """

    def __init__(self, edges_s: Sequence[float] = ()) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "http_server_request_duration_seconds",
            "From the first byte of a request to the last of its answer.",
            ["http_route", "http_request_method", "http_response_status_code"],
            buckets=sorted({*REQUEST_S, *edges_s}),
            registry=self.registry,
        )
        self.first = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "To the first piece of an answer's body, for answers with status 200.",
            ["http_route"],
            buckets=sorted({*FIRST_S, *edges_s}),
            registry=self.registry,
        )
        self.active = Gauge(
            "http_server_active_requests", "Not answered yet.", registry=self.registry
        )
        self.injected = Counter(
            "edge_injected_faults", "On command.", ["kind"], registry=self.registry
        )
        for kind in KINDS:
            self.injected.labels(kind)
        for route in ROUTES:
            self.first.labels(route)
            for code in CODES:
                self.requests.labels(route, "POST", str(code))

    def count(self, scope: Any, status: int, seconds: float) -> None:
        """One exchange that has ended, however it ended."""
        route, method = scope["path"], scope["method"]
        method = method if method in ("GET", "POST") else "other"
        known = route if route in ROUTES else "unmatched"
        self.requests.labels(known, method, str(status)).observe(seconds)

    def render(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class Edge:
    """A running edge in a thread of its own; it ends with its `with` block.

    Args:
        api_url: where the API listens.
        edges_s: thresholds in seconds that must be bucket edges.
        timeout_s: seconds of silence from the API until the edge answers 504.
    """

    def __init__(
        self,
        api_url: str,
        *,
        edges_s: Sequence[float] = (),
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.api_url, self.timeout_s = api_url.rstrip("/"), timeout_s
        self.metrics = EdgeMetrics(edges_s)
        self.metrics.active.set_function(lambda: self.waiting)
        self.injected = self.answered = self.waiting = 0  # requests; good answers
        self.clear()

    def inject(self, **faults: float) -> None:
        """From now on: `errors=0.5`, `hangs=0.1`, `delay_s=1.5`; replaces the last."""
        wanted = Faults(**faults)
        plan = wanted, Share(wanted.errors, wanted.most), Share(wanted.hangs)
        self._plan = plan  # at once: a request sees the old plan or the new one

    def clear(self) -> None:
        """No faults from now on."""
        self.inject()

    @property
    def faults(self) -> Faults:
        """What is injected now."""
        return self._plan[0]

    def __enter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.url = f"http://{self.address}"
        # A stream that it must cut is no news.
        self._server = passing.server(self._serve, "critical")
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(listener),))
        self._thread.start()
        try:
            wait_until(lambda: self._server.started, 10, "the edge to listen")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _run(self, listener: socket.socket) -> None:
        import httpx

        timeout = httpx.Timeout(self.timeout_s)
        with listener:
            async with passing.client(timeout) as self._client:
                await self._server.serve([listener])

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/metrics":
            await _answer(send, 200, self.metrics.render())
            return
        exchange = Exchange(self, scope, send)
        self.waiting += 1
        try:
            await exchange.run(receive)
        finally:
            self.waiting -= 1
            self.answered += exchange.status == 200
            self.metrics.count(scope, exchange.status, exchange.seconds)


class Exchange:
    """One request through the edge. `status` is what it is counted as."""

    def __init__(self, edge: Edge, scope: Any, send: Any) -> None:
        self.edge, self.scope, self._send = edge, scope, send
        self.started = time.perf_counter()
        self.status = CLIENT_LEFT
        self.begun = False  # the client has seen the beginning of an answer
        self.headers: list[tuple[bytes, bytes]] = []  # that say what was injected

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    async def run(self, receive: Any) -> None:
        """Answer, unless the client leaves before: then the API is told, too."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > MOST_BYTES:
                await self.refuse(413, f"Expected at most {MOST_BYTES:,} bytes.")
                return
            more = message.get("more_body", False)
        await passing.unless_left(self.answer(bytes(body)), receive)

    async def answer(self, body: bytes) -> None:
        """The fault that is due, or what the API says."""
        if await self.fault():
            return
        import httpx

        try:
            async with self.edge._client.stream(**self.request(body)) as response:
                await self.pass_on(response)
        except httpx.TimeoutException:
            await self.give_up(504, f"No answer within {self.edge.timeout_s:g} s.")
        except httpx.TransportError as error:
            await self.give_up(502, f"The API does not answer: {type(error).__name__}.")

    async def fault(self) -> bool:
        """Do what is injected; True if that was the answer."""
        faults, errors, hangs = self.edge._plan
        if errors.hit():
            self.injected("error")
            await self.refuse(500, "Injected error.")
            return True
        if hangs.hit():
            self.injected("hang")
            await asyncio.sleep(self.edge.timeout_s)
            await self.refuse(504, "Injected: no answer.")
            return True
        if faults.delay_s:
            self.injected("delay")
            await asyncio.sleep(faults.delay_s)
        return False

    def injected(self, kind: str) -> None:
        self.edge.injected += 1
        self.edge.metrics.injected.labels(kind).inc()
        self.headers.append((b"x-fault-injected", kind.encode()))

    def request(self, body: bytes) -> dict[str, Any]:
        """The client's request, for the API."""
        query = self.scope["query_string"].decode()
        path = self.scope["raw_path"].decode() + (f"?{query}" if query else "")
        headers = [header for header in self.scope["headers"] if header[0] not in HOP]
        url = self.edge.api_url + path
        return {
            "method": self.scope["method"],
            "url": url,
            "headers": headers,
            "content": body,
        }

    async def pass_on(self, response: httpx.Response) -> None:
        """The answer as it comes, piece by piece, nothing decoded."""
        headers = [(k, v) for k, v in response.headers.raw if k.lower() not in HOP]
        await self.start(response.status_code, headers)
        first = self.edge.metrics.first if response.status_code == 200 else None
        async for chunk in response.aiter_raw():
            if first and self.scope["path"] in ROUTES:
                first.labels(self.scope["path"]).observe(self.seconds)
                first = None
            await self._send(
                {"type": "http.response.body", "body": chunk, "more_body": True}
            )
        await self._send({"type": "http.response.body", "body": b""})
        self.status = response.status_code

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.begun = True
        message = {"type": "http.response.start", "status": status}
        await self._send({**message, "headers": headers + self.headers})

    async def give_up(self, status: int, words: str) -> None:
        """Say so; or cut what has begun, which counts the same: it is no answer."""
        self.status = status
        if self.begun:
            raise ConnectionError(words)  # the server cuts the connection
        await self.refuse(status, words)

    async def refuse(self, status: int, words: str) -> None:
        self.status = status
        self.begun = True
        await _answer(self._send, status, words.encode(), self.headers)


async def _answer(
    send: Any, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    kind = b"text/plain; version=0.0.4; charset=utf-8"
    length = str(len(body)).encode()
    told = [(b"content-type", kind), (b"content-length", length), *headers]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": body})
