"""The dashboard as a page on loopback that moves: one sampler, however many look.

The page draws with uPlot 1.6.32 (MIT, `uplot/LICENSE`; the files of its npm package,
unchanged) and gets its points as server-sent events. It asks no other address.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course.process import free_port, wait_until
from local_cloud.monitoring.panels import SHOWN_S, Watch

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

FOLDER = Path(__file__).parent
FILES = {"uPlot.iife.min.js": "text/javascript", "uPlot.min.css": "text/css"}
EVERY_S = 1.0
DEADLINE_S = 20.0


class Live:
    """What the page's server knows: the points, and who waits for the next."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.watchers = 0
        self.ending = False
        self.tick = asyncio.Event()

    async def sample(self) -> None:
        """A look a second. A slow source delays the next; looks never pile up."""
        await asyncio.to_thread(self.watch.begin)
        clock = asyncio.get_running_loop().time
        while not self.ending:
            due = clock() + EVERY_S
            await asyncio.to_thread(self.watch.look)
            self.wake()
            await asyncio.sleep(max(0.0, due - clock()))
        self.wake()  # for the last time: who waits on shall not hold the server up

    def wake(self) -> None:
        """Let all who wait go on, to the same point."""
        self.tick.set()
        self.tick = asyncio.Event()

    async def events(self) -> AsyncIterator[str]:
        """The table and the points so far, then each new one.

        A reader that is slow gets several at a time: nothing is queued for it.
        """
        self.watchers += 1
        try:
            told = 0.0
            first: dict[str, Any] = self.table()
            while not self.ending:
                seen, fault = self.watch.shown
                new = [point for point in seen if point[0] > told]
                if new:
                    told = new[-1][0]
                points = [[round(at, 2), *map(_short, row)] for at, row in new]
                body = {**first, "points": points, "fault": fault}
                yield f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
                first = {}
                await self.tick.wait()
        finally:
            self.watchers -= 1

    def table(self) -> dict[str, Any]:
        """What the page needs to know of the panels, once."""
        panels = [
            {
                "title": panel.title,
                "answers": panel.answers,
                "unit": panel.unit,
                "kind": panel.kind,
                "legends": list(panel.series),
            }
            for panel in self.watch.panels
        ]
        return {"source": self.watch.source.name, "seconds": SHOWN_S, "panels": panels}


def _short(value: float) -> float | None:
    """Four digits are more than a pixel; what is not finite is a gap."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def create_app(live: Live) -> Starlette:
    """The page, what it draws with, and its points."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse, HTMLResponse, StreamingResponse
    from starlette.routing import Route

    async def page(_: Request) -> Response:
        html = (FOLDER / "page.html").read_text("utf-8")
        return HTMLResponse(html, headers=_headers(html))

    async def file(request: Request) -> Response:
        name = request.url.path[1:]
        return FileResponse(FOLDER / "uplot" / name, media_type=FILES[name])

    async def events(_: Request) -> Response:
        headers = {"cache-control": "no-store"}
        kind = "text/event-stream"
        return StreamingResponse(live.events(), media_type=kind, headers=headers)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        sampler = asyncio.create_task(live.sample())
        yield
        sampler.cancel()
        with suppress(asyncio.CancelledError):
            await sampler

    return Starlette(
        routes=[
            Route("/", page),
            Route("/events", events),
            *(Route(f"/{name}", file) for name in FILES),
        ],
        middleware=[
            # Another site's page cannot pose as this one by a name of its own.
            Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
            Middleware(GZipMiddleware),
        ],
        lifespan=lifespan,
    )


def _headers(html: str) -> dict[str, str]:
    """The page's own two blocks and files run, and nobody else's."""
    allowed = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in re.findall(r"<(script|style)>(.*?)</\1>", html, re.DOTALL)
    }
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        f"script-src 'self' 'sha256-{allowed['script']}'; "
        f"style-src 'self' 'sha256-{allowed['style']}'"
    )
    return {"content-security-policy": policy, "cache-control": "no-cache"}


@contextmanager
def served(watch: Watch) -> Iterator[tuple[str, Live]]:
    """The page at an address on loopback for the length of the block."""
    import uvicorn

    live, port = Live(watch), free_port()
    config = uvicorn.Config(
        create_app(live), port=port, log_level="critical", timeout_graceful_shutdown=3
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="live page")
    thread.start()
    try:
        wait_until(lambda: server.started, DEADLINE_S, f"the live page on port {port}")
        yield f"http://127.0.0.1:{port}", live
    finally:
        live.ending = server.should_exit = True
        thread.join(DEADLINE_S)
