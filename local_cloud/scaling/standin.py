"""A stand-in for a GPU replica: a real server that waits where a GPU would work.

Two cores hold two busy replicas. To watch ten, these take no core: each request waits
for one of the slots, then for a service time drawn from a distribution, or given in the
request as {"service_ms": 40}. Nothing is computed, and every answer says so. Queues,
balancers and health checks cannot tell the difference; throughput of a model can, so
none is ever claimed from this.

Run it:  python -m local_cloud.scaling.standin --port 8001 --service-ms 50 --slots 2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

NOTICE = "waits instead of computing: stands in for a GPU replica"  # on screen, too
SHAPES: dict[str, Callable[[random.Random, float], float]] = {
    "exponential": lambda draw, mean: draw.expovariate(1 / mean),
    "constant": lambda draw, mean: mean,
    "long-tailed": lambda draw, mean: mean * draw.lognormvariate(-0.5, 1),
}
JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"


def command(port: int, *options: str) -> list[str]:
    """The program and its arguments that serve on this port."""
    return [sys.executable, os.path.abspath(__file__), "--port", str(port), *options]


class StandIn:
    """The application, in ASGI."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.draw = random.Random(options.seed)
        self.slots = asyncio.Semaphore(options.slots)
        self.inside = self.served = 0
        self.ready_at = 0.0  # on the loop's clock, once it turns

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        if path == "/health/ready":
            await asyncio.sleep(self.options.health_ms / 1000)
            good = self.is_ready()
            await answer(send, 200 if good else 503, JSON, f'{{"ready":{good:d}}}')
        elif path == "/metrics":
            await answer(send, 200, TEXT, self.metrics())
        else:
            await self.work(await read(receive), send)

    def is_ready(self) -> bool:
        now = asyncio.get_running_loop().time()
        self.ready_at = self.ready_at or now + self.options.start_s
        return now >= self.ready_at and not self.options.broken

    def metrics(self) -> str:
        busy = min(self.inside, self.options.slots)
        return (
            f"standin_in_flight {self.inside}\n"
            f"standin_busy {busy / self.options.slots}\n"
            f"standin_served_total {self.served}\n"
        )

    async def work(self, asked: dict[str, Any], send: Any) -> None:
        """Wait for a slot, then for the service time; `pieces` make it a stream."""
        self.inside += 1
        try:
            async with self.slots:
                chance = self.draw.random
                if self.options.broken or chance() < self.options.failing:
                    await answer(send, 500, JSON, '{"error":"broken on purpose"}')
                    return
                await self.serve(asked, send)
                self.served += 1
        finally:
            self.inside -= 1

    async def serve(self, asked: dict[str, Any], send: Any) -> None:
        drawn = SHAPES[self.options.shape](self.draw, self.options.service_ms)
        service_s = float(asked.get("service_ms", drawn)) / 1000
        pieces = int(asked.get("pieces", 0))
        if not pieces:
            await asyncio.sleep(service_s)
            body = json.dumps({"pid": os.getpid(), "service_ms": service_s * 1000})
            await answer(send, 200, JSON, body)
            return
        await start(send, 200, EVENTS)
        for number in range(pieces):
            await asyncio.sleep(service_s / pieces)
            await piece(send, f"data: {number}\n\n", more=True)
        await piece(send, "data: [DONE]\n\n", more=False)


async def read(receive: Any) -> dict[str, Any]:
    """The request's JSON object; an empty one if it is none."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    try:
        asked = json.loads(body)
    except ValueError:
        return {}
    return asked if isinstance(asked, dict) else {}


async def answer(send: Any, status: int, kind: str, body: str) -> None:
    """A whole answer."""
    await start(send, status, kind)
    await piece(send, body, more=False)


async def start(send: Any, status: int, kind: str) -> None:
    headers = {"content-type": kind, "x-stand-in": NOTICE, "x-replica": os.getpid()}
    encoded = [(key.encode(), str(value).encode()) for key, value in headers.items()]
    message = {"type": "http.response.start", "status": status, "headers": encoded}
    await send(message)


async def piece(send: Any, text: str, *, more: bool) -> None:
    body = text.encode()
    await send({"type": "http.response.body", "body": body, "more_body": more})


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"A server that {NOTICE}.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--service-ms", type=positive, default=50.0)
    parser.add_argument("--shape", choices=SHAPES, default="exponential")
    parser.add_argument("--slots", type=int, default=1, help="requests at a time")
    parser.add_argument("--start-s", type=float, default=0.0, help="until it is ready")
    parser.add_argument("--health-ms", type=float, default=0.0, help="to say so")
    parser.add_argument("--broken", action="store_true", help="never ready, only 500")
    parser.add_argument("--failing", type=float, default=0.0, help="a share: 500")
    parser.add_argument("--seed", type=int)
    options = parser.parse_args(argv)
    if options.slots < 1:
        parser.error(f"expected at least 1 slot, found {options.slots}")
    if not 0 <= options.failing <= 1:
        parser.error(f"expected a share from 0 to 1, found {options.failing}")
    return options


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"expected a time above 0, found {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes."""
    import uvicorn

    options = parsed(argv)
    config = uvicorn.Config(
        StandIn(options),
        port=options.port,
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=65,  # balancers hang up first, not we
        timeout_graceful_shutdown=30,
    )
    uvicorn.Server(config).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
