"""The shared model: SmolLM2-135M-Instruct on onnxruntime, one engine for every lesson.

    import models

    with models.load() as model:                      # builds its files on first use
        print(model.generate("Explain gravity in one sentence.").text)
        for piece in model.stream([{"role": "user", "content": "Tell me a story."}]):
            print(piece.text, end="", flush=True)

Servers use the same model from asyncio, many answers at a time:

    stream = model.submit(model.prompt("Hi"), models.Sampling(max_tokens=32))
    async for piece in stream:
        ...                                           # stream.cancel() at any time
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

# Before numpy and onnxruntime load. The first would start threads of its own, which
# takes half of its import and serves nothing here; the second would report usage.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from models.errors import (
    BuildError,
    EngineClosed,
    GrammarError,
    ModelError,
    PromptTooLong,
    TooLate,
)
from models.sampling import Sampling

if TYPE_CHECKING:
    from models.engine import Snapshot
    from models.job import Piece, Token
    from models.model import AsyncStream, Completion, Model

__all__ = [
    "AsyncStream",
    "BuildError",
    "Completion",
    "EngineClosed",
    "GrammarError",
    "Model",
    "ModelError",
    "Piece",
    "PromptTooLong",
    "Sampling",
    "Snapshot",
    "Token",
    "TooLate",
    "load",
    "prepare",
]

ROWS = 32  # answers decoded at once
CONTEXT = 2048  # tokens of prompt and answer together
SHELF = 16  # prompts kept for the prefix cache


def load(
    device: str = "cpu",
    *,
    rows: int = ROWS,
    context: int = CONTEXT,
    threads: int | None = None,
    shelf: int = SHELF,
    graph: str | None = None,
) -> Model:
    """Open the model, building its files first if need be; use it as `with`.

    Args:
        device: "cpu", or "cuda" with onnxruntime-gpu installed.
        rows: answers decoded at once. Each needs 46 KB of memory a token it holds.
        context: tokens a prompt and its answer may have together, at most 8192.
        threads: of onnxruntime; default: the CPUs this process may use.
        shelf: prompts kept for reuse, of the same tenant only; 0 turns that off.
        graph: the precision to build and run; default: int4 on cpu, float16 on cuda.

    Raises:
        BuildError: the files cannot be fetched, built or read; the message says why.
        ModelError: the device or a number is wrong.
    """
    from models import model

    return model.load(device, rows, context, threads, shelf, graph)


def prepare(device: str = "cpu") -> str:
    """Build the model's files if they are missing; returns their revision.

    The revision is the first 12 digits of the graph's SHA-256.

    Raises:
        BuildError, ModelError: as `load` does.
    """
    from models import model

    return model.prepare(device)


def __getattr__(name: str):
    # onnxruntime takes 0.1 s to import: only who uses it pays.
    if name in _ROOMS:
        return getattr(importlib.import_module(f"models.{_ROOMS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_ROOMS = {
    "AsyncStream": "model",
    "Completion": "model",
    "Model": "model",
    "Piece": "job",
    "Snapshot": "engine",
    "Token": "job",
}
