"""The model for a function: opens fast, answers one caller, and survives a fork.

    model = lean.load()                       # 0.2 s; `models.load` takes 0.5 s
    for piece in model.stream(model.prompt("Hi"), Sampling(max_tokens=32)):
        print(piece.text if piece else "", end="", flush=True)

A function's sandbox gets one request at a time. So there is no engine, no batch and no
thread here: whoever iterates over an answer computes it, in the same thread, and may
stop between any two steps. A forked process loses all threads but one, so that a model
with none can be forked whole. The numbers, and so the texts, are the engine's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnxruntime

from models import packed
from models.errors import BuildError, PromptTooLong
from models.job import Piece
from models.runtime import Runtime, chunk_size, shared_tokens
from models.sampling import Sampler, Sampling
from models.text import Detokenizer, Tokenizer

CHUNK = 64  # prompt tokens a step: each is a place to stop, and costs 2 ms more
CONTEXT = 2048  # tokens of prompt and answer together
GREEDY = Sampling()


class PackedRuntime(Runtime):
    """`Runtime` on a graph that has been optimized before it was saved."""

    def _options(self, threads: int) -> onnxruntime.SessionOptions:
        options = super()._options(threads)
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
        return options


def load(
    *, context: int = CONTEXT, threads: int = 1, to_be_forked: bool = False
) -> Lean:
    """Open the model, packing its files first if need be.

    A process that will be forked reads the weights instead of mapping them: a clone
    finds the heap in its page tables, and would have to fault a mapped file in again
    (4 ms of its first answer). More than one thread is for one that never will be.

    Raises:
        BuildError: the files cannot be fetched, built or read; the message says why.
    """
    if to_be_forked:
        return _read(context, threads)
    try:
        files = packed.ensure()
    except BuildError as refused:
        # Where no file can be written, as a rule.
        log = logging.getLogger(__name__)
        log.warning("opening the model unpacked: %s", refused)
        return _read(context, threads)
    runtime = PackedRuntime(files.graph, rows=1, context=context, threads=threads)
    return Lean(runtime, Tokenizer.load(files.tokenizer), files.revision)


def _read(context: int, threads: int) -> Lean:
    """The same model from the graph that is not packed."""
    from models import build

    files = build.ensure("int4")
    runtime = Runtime(files.graph, rows=1, context=context, threads=threads)
    return Lean(runtime, Tokenizer.load(files.tokenizer), files.revision)


class Lean:
    """A loaded model for one caller at a time."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, revision: str) -> None:
        self.tokenizer, self.revision = tokenizer, revision
        self.context = runtime.context
        self._runtime = runtime
        self._known = np.zeros(0, np.int64)  # the tokens that the cache begins with

    def prompt(self, prompt: str | Sequence[Mapping]) -> list[int]:
        """Token ids of a user's words or of a conversation."""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return self.tokenizer.chat(prompt)

    def warm_up(self) -> None:
        """Do now what a first answer would do, and read what all prompts begin with.

        Only the beginning that is the same for everyone is kept: by what a prompt
        costs, a caller must not learn what another one has sent.
        """
        one, other = self.prompt("A"), self.prompt("9")
        for _ in self.stream(one, Sampling(max_tokens=2)):
            pass
        ids = np.asarray(one, np.int64)
        self._known = ids[: shared_tokens(ids, np.asarray(other, np.int64))]

    def stream(
        self, ids: Sequence[int], sampling: Sampling = GREEDY
    ) -> Iterator[Piece | None]:
        """Generate step by step.

        A step reads `CHUNK` tokens of the prompt (None), or adds a token to the answer:
        a piece, whose text is empty where nothing can be shown yet. The last piece has
        a finish reason: "stop" or "length". There are no log-probabilities.

        Raises:
            PromptTooLong: the prompt leaves no room for a token of answer.
        """
        if not 1 <= len(ids) < self.context:
            raise PromptTooLong(
                f"prompt: expected 1 to {self.context - 1} tokens, found {len(ids)}; "
                "shorten it"
            )
        return self._steps(np.asarray(ids, np.int64), sampling)

    def _steps(self, ids: np.ndarray, sampling: Sampling) -> Iterator[Piece | None]:
        filled, logits = self._reuse(ids), None
        while logits is None:
            count = chunk_size(len(ids) - filled, CHUNK)
            last = filled + count == len(ids)
            chunk = ids[filled : filled + count]
            logits = self._runtime.prefill(0, chunk, filled, last)
            filled += count
            if not last:
                yield None
        answer = _Answer(sampling, self.tokenizer, self.context - len(ids))
        piece = answer.add(logits)
        while piece.finish_reason is None:
            yield piece
            length = len(ids) + answer.generated - 1
            piece = answer.add(self._runtime.decode([answer.last], [length])[0])
        yield piece

    def _reuse(self, ids: np.ndarray) -> int:
        """How many tokens of the prompt the cache holds already."""
        # At least two tokens stay to be computed: see the engine's first lines.
        known = max(0, min(shared_tokens(self._known, ids), len(ids) - 2))
        self._known = self._known[:known]  # what follows is overwritten now
        return known


class _Answer:
    """One answer as it grows."""

    def __init__(self, sampling: Sampling, tokenizer: Tokenizer, room: int) -> None:
        matcher = None
        if sampling.grammar is not None:
            matcher = sampling.grammar.compile(tokenizer).matcher()
        self._sampler = Sampler(sampling, tokenizer.vocabulary, matcher)
        self._detokenizer = Detokenizer(tokenizer, sampling.stop)
        self._end_ids = () if sampling.forced else tokenizer.end_ids
        self._most = min(sampling.max_tokens, room)
        self.generated = self.last = 0

    def add(self, logits: np.ndarray) -> Piece:
        """Draw the next token; what can be shown now, and whether the answer ends."""
        self.last = self._sampler.draw(logits).id
        self.generated += 1
        if self.last in self._end_ids:
            return Piece(self._detokenizer.flush(), finish_reason="stop")
        text = self._detokenizer.push(self.last)
        if self._detokenizer.stopped or self._sampler.finished:
            return Piece(text + self._detokenizer.flush(), finish_reason="stop")
        if self.generated < self._most:
            return Piece(text)
        text += self._detokenizer.flush()
        ended = "stop" if self._detokenizer.stopped else "length"
        return Piece(text, finish_reason=ended)
