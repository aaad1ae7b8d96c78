"""What the routes of one app share, and how the model comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request

import models
from serving.errors import ApiError
from serving.idempotency import Ledger
from serving.limits import Budgets
from serving.metrics import Metrics
from serving.settings import Settings

if TYPE_CHECKING:
    from models import Model
    from models.engine import Snapshot

MODEL_NAME = "smollm2-135m-instruct"


class Service:
    """One app's settings, model, budgets, ledger and metrics."""

    def __init__(self, settings: Settings, model: Model | None = None):
        self.settings, self.model = settings, model
        self.keys = settings.keys()
        self.budgets = Budgets(
            settings.requests_per_minute,
            settings.tokens_per_minute,
            settings.limits_storage,
        )
        self.ledger = Ledger(settings.idempotency_ttl_s, settings.idempotency_bytes)
        self.metrics = Metrics(MODEL_NAME, self.snapshot)
        self.loading: asyncio.Task[None] | None = None
        self.failure: str | None = None  # why there will never be a model
        self.draining = False

    def snapshot(self) -> Snapshot | None:
        """What the engine is doing, once there is one."""
        return self.model.engine.snapshot() if self.model else None

    @property
    def state(self) -> str:
        """ready, loading, draining or failed."""
        if self.failure:
            return "failed"
        if self.draining:
            return "draining"
        return "ready" if self.model else "loading"

    def served(self, name: str | None = None) -> Model:
        """The loaded model, if it is the one asked for."""
        if self.model is None:
            text = self.failure or "The model is loading. Retry in a moment."
            raise ApiError(503, text, self.state, headers={"retry-after": "2"})
        if name not in (None, self.model.name):
            text = f"Expected model {self.model.name!r}, found {name[:80]!r}."
            raise ApiError(404, text, "model_not_found", param="model")
        return self.model

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Load in the background: health endpoints answer from the first moment."""
        app.openapi()  # takes 0.1 s once: not in the middle of someone's stream
        owned = self.model is None
        if owned:
            self.loading = asyncio.create_task(self._load())
        yield
        self.draining = True
        if self.loading:
            with contextlib.suppress(Exception):  # told already: see `failure`
                await self.loading
        if owned and self.model:
            await asyncio.to_thread(self.model.close)

    async def _load(self) -> None:
        wanted = self.settings
        try:
            self.model = await asyncio.to_thread(
                models.load, wanted.device, rows=wanted.rows, context=wanted.context
            )
        except Exception as error:
            self.failure = str(error) or type(error).__name__
            raise


def service_of(request: Request) -> Service:
    """What the routes of this app share."""
    return request.app.state.service
