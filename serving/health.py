"""What the server says of itself: to orchestrators, to Prometheus, to clients."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import Response

from serving import answers
from serving.service import service_of


async def list_models(request: Request) -> Response:
    """Name the one model there is."""
    return as_json(answers.model_list(service_of(request).served()))


async def startup(request: Request) -> Response:
    """Has the model loaded? Until then an orchestrator asks nothing else."""
    service = service_of(request)
    return healthy(service.model is not None, service.failure or service.state)


async def live(request: Request) -> Response:
    """Does the event loop turn? If not, only a restart helps."""
    return healthy(True, "live")


async def ready(request: Request) -> Response:
    """Should a balancer send requests here? Not while loading or going away."""
    service = service_of(request)
    status = 200 if service.state == "ready" else 503
    return as_json(answers.ready(service.state, service.snapshot()), status)


async def progress(request: Request) -> Response:
    """Does the engine get on? A stuck one looks alive to every other question."""
    service = service_of(request)
    now = service.snapshot()
    stalled_s = now.stalled_s if now else 0.0
    good = stalled_s <= service.settings.stall_seconds
    return healthy(good, f"last step {stalled_s:.1f} s ago" if stalled_s else "idle")


async def scrape(request: Request) -> Response:
    """Show Prometheus the metrics."""
    accept = request.headers.get("accept", "")
    text, kind = service_of(request).metrics.render(accept)
    return Response(text, media_type=kind)


def healthy(good: bool, status: str) -> Response:
    """Answer an orchestrator: it reads the code, people read the words."""
    return as_json({"status": status}, 200 if good else 503)


def as_json(value: Any, status: int = 200) -> Response:
    return Response(answers.compact(value), status, media_type="application/json")
