"""Continuous batching: answers join and leave the batch between any two tokens.

One thread owns onnxruntime and repeats one step:

    drop what was cancelled or is too late
    decode   one token for every answer in progress, in one call
    prefill  up to `CHUNK` tokens of waiting prompts, each in a call of its own

Decode and prefill never share a call. That keeps an answer's numbers bitwise the same
whoever shares the batch, because onnxruntime's kernels treat each row alike at sequence
length 1, and each position alike at lengths of 2 and more, but not across the two. A
chunk's attention goes by tiles of 128 positions, so this holds for its last tile too:
`chunk_size` never leaves a position alone, except in a prompt of one token.

Answers in progress hold the rows 0..n-1 of the cache. Behind the rows for answers is a
shelf: rows that keep the prompts of finished answers. A new prompt of the same tenant
that begins alike gets a copy of that beginning instead of computing it again. Only
*prefilled* tokens are shelved, never generated ones, so that an answer does not depend
on what happened to be cached.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from models.errors import EngineClosed, ModelError, PromptTooLong
from models.job import Job, Piece, Token
from models.runtime import Runtime, chunk_size, shared_tokens
from models.sampling import Draw, Sampler, Sampling, greedy
from models.text import Tokenizer

# Prompt tokens a step while answers are in progress. A step of 128 fills prompts a
# little faster (2 % more tokens a second with 16 clients), but the worst gap between
# the others' tokens grows by half.
CHUNK = 64
ALONE = 512  # prompt tokens a step while nobody waits for a token
SHORTEST_HIT = 16  # tokens; copying fewer saves nothing
SMOOTHING = 0.1  # weight of the newest measurement in a running mean


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine at one moment; counters run since its start."""

    rows: int
    active: int  # answers that hold a row
    queued: int
    queued_prompt_tokens: int
    steps: int
    stalled_s: float  # since the last finished step; 0 while there is nothing to do
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    step_s: float  # of one decode call
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finished: dict[str, int]  # answers by finish reason


@dataclass(slots=True)
class _Shelved:
    """A prompt kept in a row of the shelf."""

    row: int
    tenant: str = ""
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    used: int = -1  # the step that used it last; -1: it is empty


class Engine:
    """The scheduler. Everything public may be called from any thread."""

    def __init__(self, runtime: Runtime, tokenizer: Tokenizer, shelf: int) -> None:
        """The last `shelf` rows of `runtime` keep prompts, the others hold answers."""
        self._runtime, self.tokenizer = runtime, tokenizer
        self.rows = runtime.rows - shelf
        self.context = runtime.context
        self._shelf = [_Shelved(self.rows + place) for place in range(shelf)]
        self._queue: deque[Job] = deque()
        self._active: list[Job] = []  # decoding: the job at place i holds row i
        self._filling: Job | None = None  # the one prompt being prefilled
        self._filling_row = 0
        self._work = threading.Condition()
        self._closing = False
        self._broken: str | None = None
        self._touched: dict[Callable, dict[Job, None]] = {}
        self._finished: Counter[str] = Counter()
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated = 0
        self._step_ended = time.monotonic()
        # First guesses, replaced by measurements from the first steps on.
        self._prefill_token_s, self._decode_s = 1 / 500, 0.02
        self._answer_tokens = 64.0
        self._decode_rate = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        tenant: str = "",
        deadline_s: float | None = None,
        notify: Callable[[list[Job]], None],
    ) -> Job:
        """Queue one answer. `notify` hears of jobs with new pieces, in our thread.

        Jobs with the same `notify` are told of in one call a step.

        Raises:
            PromptTooLong: the prompt leaves no room for a token of answer.
            ValueError: a token id is not in the vocabulary.
            GrammarError: the grammar cannot be compiled.
            EngineClosed: the engine is closed or broken.
        """
        if not 1 <= len(ids) < self.context:
            raise PromptTooLong(
                f"prompt: expected 1 to {self.context - 1} tokens, found {len(ids)}; "
                "shorten it"
            )
        # One wrong id would fail the whole step, and with it every other answer.
        if not 0 <= min(ids) <= max(ids) < self.tokenizer.vocabulary:
            raise ValueError(
                f"prompt: expected token ids 0 to {self.tokenizer.vocabulary - 1}, "
                f"found {min(ids)} to {max(ids)}; use ids that the tokenizer made"
            )
        matcher = None
        if sampling.grammar is not None:
            matcher = sampling.grammar.compile(self.tokenizer).matcher()
        sampler = Sampler(sampling, self.tokenizer.vocabulary, matcher)
        job = Job(ids, sampling, sampler, self.tokenizer, tenant, deadline_s, notify)
        with self._work:
            if self._closing:
                raise EngineClosed(
                    self._broken
                    or "engine: expected an open engine, found a closed one; "
                    "load the model again"
                )
            if not any(True for _ in self._jobs()):
                self._step_ended = time.monotonic()  # idle until now, not stalled
            self._queue.append(job)
            self._work.notify()
        return job

    def cancel(self, job: Job) -> None:
        """End an answer at the next step, wherever it is. Harmless when repeated."""
        with self._work:
            job.cancelled = True
            self._work.notify()

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more work; wait up to `drain_s` for answers, then cancel the rest."""
        with self._work:
            self._closing = True
            self._work.notify()
        self._thread.join(drain_s)
        with self._work:
            for job in self._jobs():
                job.cancelled = True
            self._work.notify()
        self._thread.join()

    def snapshot(self) -> Snapshot:
        """The engine's state now."""
        with self._work:
            queue = list(self._queue)
            active = len(self._active) + (self._filling is not None)
        busy = bool(queue or active)
        stalled = time.monotonic() - self._step_ended if busy else 0.0
        return Snapshot(
            rows=self.rows,
            active=active,
            queued=len(queue),
            queued_prompt_tokens=sum(len(job.ids) for job in queue),
            steps=self._steps,
            stalled_s=stalled,
            prefill_tokens_per_s=1 / self._prefill_token_s,
            decode_tokens_per_s=self._decode_rate if busy else 0.0,
            step_s=self._decode_s,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated,
            finished=dict(self._finished),
        )

    def estimate_first_token_s(self, prompt_tokens: int) -> float:
        """Seconds until a prompt submitted now would get its first token.

        Two waits add up: for a row, which needs as many answers to end as there are
        jobs too many, and for the prefill of all prompts ahead.
        """
        with self._work:
            jobs = list(self._jobs())
            ahead = sum(len(job.ids) - job.filled for job in jobs if not job.generated)
        left = sorted(
            min(
                job.sampling.max_tokens - job.generated,
                max(1.0, self._answer_tokens - job.generated),
            )
            for job in jobs
        )
        too_many = len(jobs) + 1 - self.rows
        row_s = left[too_many - 1] * self._decode_s if too_many > 0 else 0.0
        # Each chunk of prompts shares its step with one decode call.
        chunks = -(-(ahead + prompt_tokens) // CHUNK)
        steps_s = chunks * self._decode_s if self._active else 0.0
        return row_s + steps_s + (ahead + prompt_tokens) * self._prefill_token_s

    def _jobs(self):
        yield from self._active
        if self._filling is not None:
            yield self._filling
        yield from self._queue

    # The engine's thread: the loop, and the step it repeats.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except Exception as error:  # the thread's last words must reach the callers
            self._break(error)
            raise

    def _wait_for_work(self) -> bool:
        with self._work:
            while not any(True for _ in self._jobs()):
                if self._closing:
                    return False
                self._work.wait()
        return True

    def _step(self) -> None:
        self._drop()
        if self._active:
            self._decode()
            self._tell()  # before the prefill: these tokens are ready now
        self._prefill()
        self._tell()
        self._steps += 1
        self._step_ended = time.monotonic()

    def _drop(self) -> None:
        """End what its client gave up, or what is too late."""
        now = time.monotonic()
        with self._work:  # others append to the queue meanwhile
            jobs = list(self._jobs())
        for job in jobs:
            if job.cancelled:
                self._end(job, "cancelled")
            elif job.deadline is not None and now >= job.deadline:
                self._end(job, "deadline")

    def _decode(self) -> None:
        started = time.monotonic()
        jobs = list(self._active)
        logits = self._runtime.decode(
            [job.last for job in jobs], [job.length for job in jobs]
        )
        if all(job.sampler.plain for job in jobs):
            draws = [Draw(id) for id in greedy(logits)]
        else:
            draws = [
                self._draw(job, row) for job, row in zip(jobs, logits, strict=True)
            ]
        for job, draw in zip(jobs, draws, strict=True):
            if draw is not None:
                self._accept(job, draw)
        taken = time.monotonic() - started
        self._decode_s = _smooth(self._decode_s, taken)
        self._decode_rate = _smooth(self._decode_rate, len(jobs) / taken)

    def _prefill(self) -> None:
        budget = CHUNK if self._active else ALONE
        while budget > 1 and (job := self._filling or self._admit()):
            count = chunk_size(len(job.ids) - job.filled, budget)
            if not count:
                return
            budget -= count
            started = time.monotonic()
            end = job.filled + count
            last = end == len(job.ids)
            logits = self._runtime.prefill(
                self._filling_row, job.ids[job.filled : end], job.filled, last
            )
            job.filled = end
            self._prompt_tokens += count
            taken = time.monotonic() - started
            if count >= SHORTEST_HIT:  # shorter ones cost as much, and tell little
                self._prefill_token_s = _smooth(self._prefill_token_s, taken / count)
            if last:
                assert logits is not None
                self._start(job, logits)
                self._tell()  # the first token must not wait for the other prompts
                budget = min(budget, CHUNK)  # and its answer now waits for the second

    def _admit(self) -> Job | None:
        """Give the oldest waiting prompt a row, and what is known of it."""
        if not self._queue or len(self._active) == self.rows:
            return None
        with self._work:
            job = self._filling = self._queue.popleft()
        job.queued_s = time.monotonic() - job.submitted
        self._filling_row = len(self._active)
        source, tokens = self._longest_prefix(job)
        if tokens:
            self._runtime.copy(source, self._filling_row, tokens)
            job.filled = job.cached = tokens
            self._cached_tokens += tokens
        return job

    def _longest_prefix(self, job: Job) -> tuple[int, int]:
        """The row that shares most of the prompt's beginning, and how many tokens."""
        best, shelved = (0, 0), None
        candidates = [(row, other, None) for row, other in enumerate(self._active)]
        candidates += [(entry.row, entry, entry) for entry in self._shelf]
        for row, known, entry in candidates:
            if known.tenant != job.tenant:
                continue
            # At least two tokens stay to be computed: see the module's first lines.
            shared = min(shared_tokens(known.ids, job.ids), len(job.ids) - 2)
            if shared >= SHORTEST_HIT and shared > best[1]:
                best, shelved = (row, shared), entry
        if shelved is not None:
            shelved.used = self._steps
        return best

    def _start(self, job: Job, logits: np.ndarray) -> None:
        """The prompt is complete: its answer joins the batch with a first token."""
        row = len(self._active)
        if self._filling_row != row:  # an answer left while this prompt was filling
            self._runtime.copy(self._filling_row, row, len(job.ids))
        with self._work:
            self._filling = None
            self._active.append(job)
        job.first_token_s = time.monotonic() - job.submitted
        if (draw := self._draw(job, logits)) is not None:
            self._accept(job, draw)

    def _draw(self, job: Job, logits: np.ndarray) -> Draw | None:
        try:
            return job.sampler.draw(logits)
        except ModelError as error:  # this answer's grammar or numbers; not the others'
            job.error = str(error)
            self._end(job, "error")
            return None

    def _accept(self, job: Job, draw: Draw) -> None:
        """Add a drawn token to the answer, and end the answer if it is the last."""
        job.last = draw.id
        job.generated += 1
        self._generated += 1
        sampling, detokenizer = job.sampling, job.detokenizer
        tokens = ()
        if draw.logprob is not None:
            tokens = (self._token(draw.id, draw.logprob, draw.top),)
        if draw.id in self.tokenizer.end_ids and not sampling.forced:
            # The end token is not part of the text, but its probability was asked for.
            self._end(job, "stop", tokens)
            return
        text = detokenizer.push(draw.id)
        if detokenizer.stopped or job.sampler.finished:
            self._end(job, "stop", tokens, text)
        elif (
            job.generated >= sampling.max_tokens
            or len(job.ids) + job.generated >= self.context
        ):
            self._end(job, "length", tokens, text)
        elif text or tokens:
            self._put(job, Piece(text, tokens))

    def _token(self, id: int, logprob: float, top: tuple) -> Token:
        def spelled(id: int) -> tuple[str, bytes]:
            return self.tokenizer.decode([id], special=True), (
                self.tokenizer.token_bytes(id)
            )

        text, data = spelled(id)
        return Token(
            id, text, data, logprob, tuple((i, *spelled(i), p) for i, p in top)
        )

    def _end(
        self, job: Job, reason: str, tokens: tuple[Token, ...] = (), text: str = ""
    ) -> None:
        """Take an answer out of the batch; the last row moves into its place."""
        text += job.detokenizer.flush()
        if job.detokenizer.stopped and reason == "length":
            reason = "stop"  # the flush found a stop string
        self._finished[reason] += 1  # first: who sees the row free sees it counted
        if job in self._active:
            self._leave(job)
        with self._work:
            if job is self._filling:
                self._filling = None
            elif job in self._queue:
                self._queue.remove(job)
        job.finish_reason = reason
        job.total_s = time.monotonic() - job.submitted
        if job.generated:
            self._answer_tokens = _smooth(self._answer_tokens, job.generated)
        self._put(job, Piece(text, tokens, reason))

    def _leave(self, job: Job) -> None:
        row, last = self._active.index(job), len(self._active) - 1
        self._keep(job, row)
        mover = self._active[last]
        if mover is not job:
            # Amid a decode, the cache holds one token more than the mover knows of.
            self._runtime.copy(last, row, mover.length + 1)
        with self._work:
            self._active[row] = mover
            self._active.pop()

    def _keep(self, job: Job, row: int) -> None:
        """Shelve a finished answer's prompt, unless the shelf has it already.

        It replaces a prompt that it continues. On a full shelf also one that it repeats
        but for a short end, as two questions after the same instructions do: or one
        beginning, asked for often, would push out all others. Else the oldest goes.
        """
        if not self._shelf or len(job.ids) < SHORTEST_HIT:
            return
        oldest = min(self._shelf, key=lambda entry: entry.used)
        alike: list[tuple[int, _Shelved]] = []  # and how many tokens would be lost
        for entry in self._shelf:
            if entry.tenant != job.tenant or not len(entry.ids):
                continue
            shared = shared_tokens(entry.ids, job.ids)
            if shared == len(job.ids):
                entry.used = self._steps
                return
            spared = min(CHUNK, shared // 4) if len(oldest.ids) else 0
            if (lost := len(entry.ids) - shared) <= spared:
                alike.append((lost, entry))
        least = min(alike, key=lambda one: (one[0], one[1].used), default=(0, oldest))
        place = least[1]
        self._runtime.copy(row, place.row, len(job.ids))
        place.tenant, place.ids, place.used = job.tenant, job.ids, self._steps

    def _put(self, job: Job, piece: Piece) -> None:
        job.pending.append(piece)
        job.complete = piece.finish_reason is not None
        self._touched.setdefault(job.notify, {})[job] = None

    def _tell(self) -> None:
        """Let the receivers know, each once."""
        touched, self._touched = self._touched, {}
        for notify, jobs in touched.items():
            notify(list(jobs))

    def _break(self, error: Exception) -> None:
        """The step itself failed: end every answer with the reason."""
        with self._work:
            self._closing = True
            self._broken = (
                f"engine: expected onnxruntime to compute a step, found {error!r}; "
                "load the model again"
            )
            jobs = list(self._jobs())
            self._queue.clear()
            self._active, self._filling = [], None
        for job in jobs:
            job.error, job.finish_reason = self._broken, "error"
            self._put(job, Piece("", (), "error"))
        self._tell()


def _smooth(mean: float, new: float) -> float:
    return mean + SMOOTHING * (new - mean)
