"""One account of the stand-in and everything in it, in virtual time.

`State` is also the `Plane` that the inference routes see: it knows whose key this is,
where a model's name leads, and hears what every generation took. All of it lives in
memory and in one temporary folder, and is gone with `close`.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from local_cloud.fireworks.catalogue import models_for_all
from local_cloud.fireworks.clock import Clock, moment
from local_cloud.fireworks.deployments import Boot, Call, Deployment
from local_cloud.fireworks.faults import Faults
from local_cloud.fireworks.plane import Route, Use
from local_cloud.fireworks.prices import REGION_PREMIUM, Prices
from local_cloud.fireworks.uploads import Uploads

if TYPE_CHECKING:
    from local_cloud.fireworks.batch import Job
    from models import Model

ACCOUNT = "course"
USER = "learner"
FAKE_PREFIX = "fw_fake_"
FAKE_KEY = FAKE_PREFIX + "for-the-stand-in-only"


@dataclass(frozen=True)
class Bill:
    """What the account would owe so far, in dollars, by the stand-in's price list."""

    serverless_usd: float
    batch_usd: float
    gpu_usd: float
    gpu_seconds: float

    @property
    def total_usd(self) -> float:
        return self.serverless_usd + self.batch_usd + self.gpu_usd


@dataclass
class State:
    """The account: its keys, models, deployments, datasets, jobs, and what they cost.

    Args:
        engine: the shared model, open; it stays its owner's to close. None: only the
            routes of the account work.
        clock: the time everything happens in.
        key: the API key that is there at the start; it must begin with `FAKE_PREFIX`.
    """

    engine: Model | None = None
    clock: Clock = field(default_factory=Clock)
    boot: Boot = field(default_factory=Boot)
    prices: Prices = field(default_factory=Prices)
    key: str = FAKE_KEY
    generations: int = 0  # begun so far

    def __post_init__(self) -> None:
        if not self.key.startswith(FAKE_PREFIX):
            raise ValueError(
                f"Expected a key that starts with {FAKE_PREFIX!r}, found another. A "
                "real key has no business here: use `FAKE_KEY`."
            )
        self.faults = Faults()
        self.lock = threading.RLock()
        self.folder = Path(tempfile.mkdtemp(prefix="fireworks-"))
        self.uploads = Uploads(self.folder, self.clock)
        self.models = models_for_all()
        self.users: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, dict[str, Any]] = {}  # by SHA-256 of the key
        self.deployments: dict[str, Deployment] = {}
        self.datasets: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, Job] = {}
        self.scrapes: list[float] = []  # when metrics were read lately
        self._serverless_usd = self._batch_usd = 0.0
        self._past_usd = self._past_seconds = 0.0  # of deployments that are gone
        self.account_fields = self._open_account()
        self.add_key(self.key, USER, "default")

    def _open_account(self) -> dict[str, Any]:
        opened = {"createTime": moment(self.clock.now()), "state": "READY"}
        self.users[USER] = {
            **opened,
            "name": f"accounts/{ACCOUNT}/users/{USER}",
            "role": "admin",
            "email": "learner@example.com",
            "displayName": "Learner",
        }
        return {
            **opened,
            "name": f"accounts/{ACCOUNT}",
            "displayName": "Course (emulated)",
            "email": "learner@example.com",
            "suspendState": "UNSUSPENDED",
            "status": {"code": "OK"},
        }

    def close(self) -> None:
        """Throw away what was uploaded."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # Keys.

    def add_key(
        self, key: str, user: str, label: str, expires: str | None = None
    ) -> dict[str, Any]:
        """Let this key in; only its digest is kept."""
        fields = {
            "keyId": secrets.token_hex(8),
            "displayName": label,
            "email": self.users[user].get("email"),
            "prefix": key[: len(FAKE_PREFIX) + 4],
            "secure": True,
            "createTime": moment(self.clock.now()),
        }
        if expires is not None:
            ends = datetime.fromisoformat(expires)
            fields["expireTime"] = ends if ends.tzinfo else ends.replace(tzinfo=UTC)
        self.keys[_digest(key)] = {"user": user, "fields": fields}
        return fields

    def account(self, key: str) -> str | None:
        """The account id of an API key, or None if it opens nothing."""
        known = self.keys.get(_digest(key))
        if known is None:
            return None
        expires = known["fields"].get("expireTime")
        if expires is not None and expires <= moment(self.clock.now()):
            return None
        return ACCOUNT

    # Where names lead, and what requests take.

    def route(self, name: str, account: str) -> Route | None:
        """Where a model's or a deployment's name leads, or None; wakes a sleeper."""
        model, _, deployment = name.partition("#")
        if model.startswith(f"accounts/{account}/deployments/"):
            model, deployment = "", model
        with self.lock:
            if not deployment:
                fields = self.models.get(model)
                if fields is None or fields["state"] != "READY":
                    return None
                if fields.get("supportsServerless"):
                    return Route(model)
                deployment = next(iter(self.serving(model)), "")
            found = self.deployments.get(deployment)
            if found is None or found.deleted_s is not None:
                return None
            base = found.fields["baseModel"]
            # With no replica allowed it can never serve: as good as not there.
            if model not in ("", base) or not found.fields["maxReplicaCount"]:
                return None
            return Route(base, deployment, found.serves(self.clock.now()))

    def serving(self, model: str) -> list[str]:
        """The deployments of this model; the first is its default."""
        return [
            name
            for name, d in self.deployments.items()
            if d.fields["baseModel"] == model and d.deleted_s is None
        ]

    def began(self, route: Route) -> None:
        """A generation was handed to the engine."""
        with self.lock:
            self.generations += 1
            if route.deployment in self.deployments:
                self.deployments[route.deployment].busy += 1

    def ended(self, route: Route, use: Use) -> None:
        """It ended, whole or not: bill it, and let the deployment know."""
        with self.lock:
            found = self.deployments.get(route.deployment)
            if not route.deployment:
                self._serverless_usd += self.call_usd(use)
            elif found is not None:
                found.busy -= 1
                found.note(
                    Call(
                        self.clock.now(),
                        200,
                        use.prompt_tokens,
                        use.cached_tokens,
                        use.completion_tokens,
                        use.first_token_s,
                        use.total_s,
                        self.clock.virtual(use.total_s),
                    )
                )

    def refused(self, route: Route | None, status: int) -> None:
        """A request for this route got an error of this status."""
        with self.lock:
            found = self.deployments.get(route.deployment) if route else None
            if found is not None:
                found.note(Call(self.clock.now(), status))

    def batched(self, route: Route, use: Use) -> None:
        """Bill an answer of a batch job."""
        with self.lock:
            self._batch_usd += self.call_usd(use, batch=True)

    # What it costs.

    def bill(self) -> Bill:
        """What the account would owe by now."""
        now = self.clock.now()
        with self.lock:
            usd, seconds = self._past_usd, self._past_seconds
            for deployment in self.deployments.values():
                deployment.settle(now)
                usd += self.gpu_usd(deployment)
                seconds += deployment.gpu_seconds
        return Bill(self._serverless_usd, self._batch_usd, usd, seconds)

    def forget(self, name: str) -> None:
        """Purge a deployment, but not what it cost."""
        gone = self.deployments.pop(name)
        gone.settle(self.clock.now())
        self._past_usd += self.gpu_usd(gone)
        self._past_seconds += gone.gpu_seconds

    def call_usd(self, use: Use, *, batch: bool = False) -> float:
        """Dollars for the tokens of one serverless call."""
        return self.prices.call_usd(
            use.prompt_tokens, use.cached_tokens, use.completion_tokens, batch=batch
        )

    def gpu_usd(self, deployment: Deployment) -> float:
        """Dollars for its GPUs so far; bound to one region they are dearer."""
        usd = self.prices.gpu_usd(
            deployment.fields["acceleratorType"], deployment.gpu_seconds
        )
        bound = "region" in deployment.fields["placement"]
        return usd * (REGION_PREMIUM if bound else 1.0)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
