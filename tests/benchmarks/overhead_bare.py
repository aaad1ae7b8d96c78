"""The worker of `overhead`: the engine as a server uses it, without the server."""

from __future__ import annotations

import asyncio
import sys
import time

import models
from models.sampling import Sampling
from tests.benchmarks.overhead import WARM
from tests.benchmarks.prompts import END_IDS, conversation
from tests.benchmarks.turns import answer_questions


class Bare:
    """The model, and one prompt that its prefix cache holds."""

    def __init__(self, device: str) -> None:
        self.model = models.load(device)
        self.ids = self.model.prompt(conversation(1))

    def answer(self, tokens: int, requests: int) -> dict[str, float]:
        """Median wall time and mean CPU time of an answer, in seconds."""
        return asyncio.run(self.answers(tokens, requests))

    async def answers(self, tokens: int, requests: int) -> dict[str, float]:
        bias = tuple((id, -100.0) for id in END_IDS)
        sampling = Sampling(max_tokens=tokens, logit_bias=bias)
        times: list[float] = []
        cpu = 0.0
        for number in range(WARM + requests):
            if number == WARM:
                cpu = time.thread_time()
            started = time.perf_counter()
            async for _ in self.model.submit(self.ids, sampling):
                pass
            times.append(time.perf_counter() - started)
        cpu = time.thread_time() - cpu
        return {"wall_s": sorted(times[WARM:])[requests // 2], "cpu_s": cpu / requests}


if __name__ == "__main__":
    answer_questions({"answer": Bare(sys.argv[1]).answer})
