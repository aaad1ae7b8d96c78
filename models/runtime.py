"""One onnxruntime session and the key/value cache it works on in place.

The cache is one buffer a layer for keys and one for values, [rows, 3, context, 64].
The graph's "past" and "present" tensors are bound to the same memory, so attention
appends to the cache without a copy, and a call may use any contiguous range of rows.
A row holds one answer's tokens: 46 KB each in float32. The operating system gives the
memory out when it is first written, not before.

`Runtime` does this on the CPU; `models.cuda` overrides where the cache lies.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from models.errors import ModelError
from models.graph import HEAD_SIZE, KV_HEADS, LAYERS, MAX_CONTEXT, VOCABULARY

TILE = 128  # positions that onnxruntime's attention computes together


@dataclass(frozen=True)
class _Call:
    """A bound call of one shape: write the inputs, run, read the logits."""

    binding: onnxruntime.IOBinding
    ids: np.ndarray  # [rows, tokens] int64
    lengths: np.ndarray  # [rows] int32
    longest: np.ndarray  # [] int32
    picked: np.ndarray  # [n] int64
    logits: np.ndarray  # [n, vocabulary] float32 or float16


class Runtime:
    """The network and its cache on the CPU. Not safe to share between threads."""

    device = "cpu"
    provider = "CPUExecutionProvider"
    precision = "int4"  # the graph it runs unless told otherwise

    def __init__(self, graph: Path, *, rows: int, context: int, threads: int) -> None:
        if not 1 <= context <= MAX_CONTEXT:
            raise ModelError(
                f"context: expected 1 to {MAX_CONTEXT} tokens, found {context}; "
                "choose a length within the model's training"
            )
        self.rows, self.context = rows, context
        self._session = onnxruntime.InferenceSession(
            str(graph), self._options(threads), providers=[self.provider]
        )
        types = {value.name: value.type for value in self._session.get_inputs()}
        half = types["past_key_0"] == "tensor(float16)"
        self._float = np.dtype(np.float16 if half else np.float32)
        self._names = [
            f"{kind}_{layer}" for layer in range(LAYERS) for kind in ("key", "value")
        ]
        self._row_shape = (KV_HEADS, context, HEAD_SIZE)
        self._cache = [self._allocate((rows, *self._row_shape)) for _ in self._names]
        self._calls: dict[tuple[int, int, int, int], _Call] = {}

    # What another device does differently, or another kind of file.

    def _options(self, threads: int) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that wait for the next operator spin, which is worth it within a call.
        # Between calls they would only take the core from whoever serves the answers.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def _allocate(self, shape: tuple[int, ...]) -> Any:
        size = math.prod(shape) * self._float.itemsize
        # Private: the default is shared, and forked processes would write over each
        # other's cache. Windows has neither.
        private = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, size, **private)
        # numpy would ask for huge pages. A new row's first token would then take 2 MB
        # of each of the 60 buffers, and 32 short answers 4.5 GB instead of 0.4 GB.
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(memory, self._float).reshape(shape)

    def _address(self, buffer: Any, row: int) -> int:
        return buffer[row:].ctypes.data

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of one row over another row's."""
        for cache in self._cache:
            cache[target, :, :tokens] = cache[source, :, :tokens]

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
        return self._numbers(call.logits)

    def prefill(
        self, row: int, tokens: Sequence[int] | np.ndarray, start: int, last: bool
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
        return self._numbers(call.logits)[0] if last else None

    def every_logit(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits [tokens, 49152] after each token of a text (in row 0)."""
        count = len(tokens)
        call = self._bind(0, 1, count, count)
        call.ids[0] = tokens
        call.lengths[:] = count - 1
        call.longest[...] = count
        call.picked[:] = range(count)
        self._session.run_with_iobinding(call.binding)
        return self._numbers(call.logits)

    def _numbers(self, logits: np.ndarray) -> np.ndarray:
        return logits.astype(np.float32, copy=False)

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
        binding = self._session.io_binding()
        arrays = {
            "ids": np.zeros((rows, tokens), np.int64),
            "lengths": np.zeros(rows, np.int32),
            "longest": np.zeros((), np.int32),
            "picked": np.arange(picked, dtype=np.int64),
            "logits": np.zeros((picked, VOCABULARY), self._float),
        }
        for name, array in arrays.items():
            bind = binding.bind_output if name == "logits" else binding.bind_input
            bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name, buffer in zip(self._names, self._cache, strict=True):
            place = (self.device, 0, self._float, (rows, *self._row_shape))
            address = self._address(buffer, row)
            binding.bind_input(f"past_{name}", *place, address)
            binding.bind_output(name, *place, address)
        return _Call(binding, **arrays)


def chunk_size(left: int, budget: int) -> int:
    """How many of the `left` prompt tokens to prefill with `budget` tokens to spend.

    No position may be computed alone: a chunk never takes a single token or leaves
    one, and its last tile never holds one. 0 means: wait for a larger budget.
    """
    if left == 1:
        return 1  # a prompt of one token is always computed alone
    for count in range(min(left, budget), 1, -1):
        if count % TILE != 1 and left - count != 1:
            return count
    return 0


def shared_tokens(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two prompts have in common from the beginning."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    place = int(differ.argmax()) if size else 0
    return place if size and differ[place] else size


def usable_cores(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole cores this process may use, at least one.

    In a container with half a core `os.cpu_count()` still counts the machine's. Two
    threads on that half core are throttled together and take twice as long as one.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for quota_file, period_file in (
        ("cpu.max", "cpu.max"),  # cgroup v2: "quota period" in one file
        ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),  # cgroup v1
    ):
        try:
            quota = (root / quota_file).read_text().split()[0]
            period = (root / period_file).read_text().split()[-1]
        except OSError:  # not this kind of cgroup, or not Linux
            continue
        if quota.isdigit():  # "max" and -1 mean no limit
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)
