"""One real model for all tests of the engine, and a look after each test."""

from __future__ import annotations

import os

# Both must be known before numpy and onnxruntime are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import time
from collections.abc import Iterator

import pytest

import models


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


def idle(model: models.Model, deadline_s: float = 5.0) -> list:
    """Wait until the engine has nothing to do; what is left if it never has."""
    end = time.monotonic() + deadline_s
    while (left := list(model.engine._jobs())) and time.monotonic() < end:
        time.sleep(0.005)
    return left
