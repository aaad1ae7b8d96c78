"""The worker of `rows` that runs this project's engine."""

from __future__ import annotations

import sys
import threading
import time

import models
from models.engine import Engine, Job
from models.sampling import Sampling, greedy
from tests.benchmarks.prompts import conversation, random_ids
from tests.benchmarks.rows import CONTEXT, HELD, ROWS
from tests.benchmarks.turns import THREADS, answer_questions

WARM = 3  # decode calls before the clock starts
RAMP = 24  # tokens the first answer gets while the last prompt still waits, or more


class Ours:
    """One runtime, used directly and through the engine that owns it."""

    def __init__(self, device: str) -> None:
        # Without a shelf nothing is computed once and used twice.
        self.model = models.load(
            device, rows=max(ROWS), context=CONTEXT, threads=THREADS, shelf=0
        )
        self.engine: Engine = self.model.engine
        # The engine's thread sleeps while it has no answers: the runtime is free then.
        self.runtime = self.engine._runtime
        for row in range(max(ROWS)):
            self.runtime.prefill(row, random_ids(HELD, seed=row), 0, last=True)

    def revision(self) -> str:
        return self.model.revision

    def decode(self, rows: int, steps: int) -> float:
        """Tokens a second of the graph and the greedy choice alone."""
        tokens, started = [5] * rows, 0.0
        for step in range(WARM + steps):
            if step == WARM:
                started = time.perf_counter()
            tokens = greedy(self.runtime.decode(tokens, [HELD + step] * rows))
        return rows * steps / (time.perf_counter() - started)

    def prefill(self, tokens: int) -> float:
        """Tokens a second of reading one prompt, up to the logits of its last token."""
        ids = random_ids(tokens, seed=tokens)
        self.runtime.prefill(0, ids, 0, last=True)
        started = time.perf_counter()
        self.runtime.prefill(0, ids, 0, last=True)
        taken = time.perf_counter() - started
        return tokens / taken

    def engine_decode(self, rows: int, steps: int) -> float:
        """Tokens a second of answers that share steps, all `rows` of them."""
        marks: list[tuple[float, int]] = []  # while every row decodes
        jobs: list[Job] = []
        done = threading.Event()

        def notice(_: list[Job]) -> None:
            if len(jobs) == rows and all(job.generated for job in jobs):
                if not any(job.finish_reason for job in jobs):
                    written = sum(job.generated for job in jobs)
                    marks.append((time.perf_counter(), written))
                elif all(job.finish_reason for job in jobs):
                    done.set()

        sampling = Sampling(max_tokens=steps + RAMP)
        for number in range(rows):
            ids = self.model.prompt(conversation(number))
            jobs.append(self.engine.submit(ids, sampling, notify=notice))
        if not done.wait(120):
            raise TimeoutError(f"Expected {rows} answers within 120 s, found fewer.")
        ends = {job.finish_reason for job in jobs}
        if ends != {"length"}:
            raise ValueError(f"Expected answers of full length, found ends {ends}.")
        (begun, first), *_, (ended, last) = marks[WARM:]
        return (last - first) / (ended - begun)

    def engine_prefill(self, tokens: int) -> float:
        """Prompt tokens a second until the first token of the answer is there."""
        for seed in (1, 2):  # the first warms up
            done = threading.Event()
            job = self.engine.submit(
                random_ids(tokens, seed),
                Sampling(max_tokens=1),
                notify=lambda _, done=done: done.set(),
            )
            if not done.wait(120):
                raise TimeoutError("Expected a token within 120 s, found none.")
        return tokens / job.first_token_s


if __name__ == "__main__":
    ours = Ours(sys.argv[1])
    answer_questions(
        {
            "revision": ours.revision,
            "decode": ours.decode,
            "prefill": ours.prefill,
            "engine_decode": ours.engine_decode,
            "engine_prefill": ours.engine_prefill,
        }
    )
