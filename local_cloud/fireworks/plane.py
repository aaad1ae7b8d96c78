"""The seam between the two planes: what the account tells the models, and hears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from local_cloud.fireworks.faults import Faults
    from models import Model


@dataclass(frozen=True)
class Route:
    """Where a request goes: a model, and the deployment that serves it if not shared.

    `deployment` is "accounts/<id>/deployments/<id>", or "" for serverless.
    """

    model: str
    deployment: str = ""
    serves: bool = True  # False: scaled to zero, or scaling up: 503


@dataclass(frozen=True)
class Use:
    """What one generation took, as measured. Times in seconds."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_s: float
    total_s: float
    queued_s: float = 0.0
    finish_reason: str = ""


class Plane(Protocol):
    """What the account plane offers to the inference plane."""

    engine: Model | None  # the shared model, open
    faults: Faults
    generations: int  # begun so far; `began` counts

    def account(self, key: str) -> str | None:
        """The account id of an API key (without "Bearer "), or None: 401."""
        ...

    def route(self, name: str, account: str) -> Route | None:
        """Where a model's or deployment's name leads, or None: 404.

        A name is accounts/a/models/m, accounts/a/deployments/d, or both joined by "#".
        Asking wakes a deployment that is scaled to zero, as a request does.
        """
        ...

    def began(self, route: Route) -> None:
        """A generation was handed to the engine."""
        ...

    def ended(self, route: Route, use: Use) -> None:
        """It ended, whole or not."""
        ...

    def refused(self, route: Route | None, status: int) -> None:
        """A request, for this route if it has one, was answered with an error."""
        ...
