"""The worker of `rows` that runs llama.cpp, through llama-cpp-python's C interface.

It runs in an interpreter of its own, which needs llama-cpp-python and nothing of ours.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

from tests.benchmarks.prompts import VOCABULARY, random_ids
from tests.benchmarks.rows import CONTEXT, HELD, ROWS
from tests.benchmarks.turns import THREADS, answer_questions

WARM = 3  # decode calls before the clock starts
BATCH = 512  # tokens of a call, llama.cpp's own default for prompts


class Llama:
    """One context with as many sequences as there are rows at most."""

    def __init__(self, gguf: str) -> None:
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(gguf.encode(), loading)
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = max(ROWS) * CONTEXT
        wanted.n_batch = wanted.n_ubatch = BATCH
        wanted.n_seq_max = max(ROWS)
        wanted.n_threads = wanted.n_threads_batch = THREADS
        self.context = llama_cpp.llama_init_from_model(model, wanted)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        for row in range(max(ROWS)):
            self.read(random_ids(HELD, seed=row), row)

    def read(self, ids: Sequence[int], row: int) -> None:
        """A prompt into an empty row; logits of its last token only."""
        count = len(ids)
        self.call(ids, [row] * count, range(count), [False] * (count - 1) + [True])

    def call(
        self,
        tokens: Sequence[int],
        rows: Sequence[int],
        places: Sequence[int],
        wanted: Sequence[bool],
    ) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, places[i]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, rows[i]
            batch.logits[i] = wanted[i]
        if code := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"Expected llama_decode to give 0, found {code}.")
        llama_cpp.llama_synchronize(self.context)

    def forget(self, row: int, beyond: int) -> None:
        """Drop a row's tokens from a place on."""
        llama_cpp.llama_memory_seq_rm(self.memory, row, beyond, -1)

    def decode(self, rows: int, steps: int) -> float:
        """Tokens a second of llama_decode and the greedy choice."""
        everyone, every = range(rows), [True] * rows
        tokens, started = [5] * rows, 0.0
        for step in range(WARM + steps):
            if step == WARM:
                started = time.perf_counter()
            self.call(tokens, everyone, [HELD + step] * rows, every)
            logits = llama_cpp.llama_get_logits(self.context)
            table = np.ctypeslib.as_array(logits, (rows, VOCABULARY))
            tokens = table.argmax(axis=1).tolist()
        taken = time.perf_counter() - started
        for row in everyone:
            self.forget(row, HELD)
        return rows * steps / taken

    def prefill(self, tokens: int) -> float:
        """Tokens a second of reading one prompt, up to the logits of its last token."""
        ids, taken = random_ids(tokens, seed=tokens), 0.0
        for _ in range(2):  # the first warms up
            self.forget(0, 0)
            started = time.perf_counter()
            self.read(ids, 0)
            taken = time.perf_counter() - started
        self.forget(0, 0)
        self.read(random_ids(HELD, seed=0), 0)
        return tokens / taken


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """It logs every tensor it loads."""


if __name__ == "__main__":
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama = Llama(sys.argv[1])
    answer_questions({"decode": llama.decode, "prefill": llama.prefill})
