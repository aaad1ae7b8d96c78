"""One onnxruntime session and the key/value cache it works on in place.

The cache is one buffer a layer for keys and one for values, [rows, 3, context, 64].
The graph's "past" and "present" tensors are bound to the same memory, so attention
appends to the cache without a copy, and a call may use any contiguous range of rows.
A row holds one answer's tokens: 46 KB each in float32. The operating system gives the
memory out when it is first written, not before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# onnxruntime 1.29 and later reports usage by default: it must be told before it loads.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime

from models.errors import ModelError
from models.graph import HEAD_SIZE, KV_HEADS, LAYERS, MAX_CONTEXT, VOCABULARY


@dataclass(frozen=True)
class _Call:
    """A bound call of one shape: write the inputs, run, read the logits."""

    binding: onnxruntime.IOBinding
    ids: np.ndarray  # [rows, tokens] int64
    lengths: np.ndarray  # [rows] int32
    longest: np.ndarray  # [] int32
    picked: np.ndarray  # [n] int64
    logits: np.ndarray  # [n, vocabulary] float32


class Runtime:
    """The network and its cache on the CPU. Not safe to share between threads."""

    device = "cpu"

    def __init__(self, graph: Path, *, rows: int, context: int, threads: int) -> None:
        if not 1 <= context <= MAX_CONTEXT:
            raise ModelError(
                f"context: expected 1 to {MAX_CONTEXT} tokens, found {context}; "
                "choose a length within the model's training"
            )
        self.rows, self.context = rows, context
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )
        shape = (rows, KV_HEADS, context, HEAD_SIZE)
        self._cache = {
            f"{kind}_{layer}": np.zeros(shape, np.float32)
            for layer in range(LAYERS)
            for kind in ("key", "value")
        }
        self._calls: dict[tuple[int, int, int, int], _Call] = {}

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        """One token more for each of the rows 0, 1, …; returns logits [rows, 49152].

        `lengths` are the tokens each row holds before. The logits' memory is reused by
        the next call of as many rows.
        """
        rows = len(tokens)
        call = self._call(0, rows, 1, rows)
        call.ids[:, 0] = tokens
        call.lengths[:] = lengths
        call.longest[...] = max(lengths) + 1
        self._session.run_with_iobinding(call.binding)
        return call.logits

    def prefill(
        self, row: int, tokens: Sequence[int], start: int, last: bool
    ) -> np.ndarray | None:
        """Append a chunk of a prompt to `row`, which holds `start` tokens.

        Returns the logits [49152] after the chunk if it is the `last`. The head, a
        fifth of the work of a short chunk, runs only then.
        """
        count = len(tokens)
        call = self._call(row, 1, count, int(last))
        call.ids[0] = tokens
        call.lengths[:] = start + count - 1
        call.longest[...] = start + count
        call.picked[:] = count - 1
        self._session.run_with_iobinding(call.binding)
        return call.logits[0] if last else None

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of one row over another row's."""
        for cache in self._cache.values():
            cache[target, :, :tokens] = cache[source, :, :tokens]

    def every_logit(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits [tokens, 49152] after each token of a text (in row 0)."""
        count = len(tokens)
        call = self._bind(0, 1, count, count)
        call.ids[0] = tokens
        call.lengths[:] = count - 1
        call.longest[...] = count
        call.picked[:] = range(count)
        self._session.run_with_iobinding(call.binding)
        return call.logits

    def _call(self, row: int, rows: int, tokens: int, picked: int) -> _Call:
        key = (row, rows, tokens, picked)
        if tokens > 1 and key not in self._calls:
            # Prefill comes in many shapes: keep few, or they would pile up.
            for old in [key for key in self._calls if key[2] > 1][:-64]:
                del self._calls[old]
        if key not in self._calls:
            self._calls[key] = self._bind(*key)
        return self._calls[key]

    def _bind(self, row: int, rows: int, tokens: int, picked: int) -> _Call:
        """Bind buffers by address: nothing is copied or allocated when it runs."""
        call = _Call(
            self._session.io_binding(),
            np.zeros((rows, tokens), np.int64),
            np.zeros(rows, np.int32),
            np.zeros((), np.int32),
            np.arange(picked, dtype=np.int64),
            np.zeros((picked, VOCABULARY), np.float32),
        )
        for name in ("ids", "lengths", "longest", "picked"):
            _bind_to(call.binding.bind_input, name, getattr(call, name))
        _bind_to(call.binding.bind_output, "logits", call.logits)
        for name, cache in self._cache.items():
            part = cache[row : row + rows]
            _bind_to(call.binding.bind_input, f"past_{name}", part)
            _bind_to(call.binding.bind_output, name, part)
        return call


def _bind_to(bind, name: str, array: np.ndarray) -> None:
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
