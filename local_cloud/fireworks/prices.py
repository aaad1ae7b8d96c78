"""What Fireworks charges, in US dollars: a table to edit when it is out of date.

Each row says where and when it was read. READ is what Fireworks' own pages said; TOLD
is what others wrote down of them: look those up first. Prices move: the GPU-hour of an
H100 went from 4 to 8 dollars within a year.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOKENS_PAGE = "https://docs.fireworks.ai/serverless/pricing"
GPUS_PAGE = "https://fireworks.ai/pricing"


@dataclass(frozen=True)
class Source:
    """Where a price is from: the page, the month, and who read it."""

    page: str
    as_of: str
    first_hand: bool = True  # False: somebody else's transcription of the page


READ = Source(TOKENS_PAGE, "2026-05")
TOLD = Source(TOKENS_PAGE, "2026-10", first_hand=False)
# Fireworks' own calculator (docs, fine-tuning/multi-turn-cost-comparison) still said 7,
# 7 and 10 in the middle of 2026.
TOLD_GPUS = Source(GPUS_PAGE, "2026-10", first_hand=False)

BATCH = 0.5  # of the serverless price, for input and output (READ)
REGION_PREMIUM = 1.5  # times the price, for a deployment bound to one region (TOLD)
# Of FP8, https://docs.fireworks.ai/models/quantization says (2026): 30 to 50 % less
# cost. Emulated nowhere: it needs a GPU, and one replica costs the same, less busy.
FP8_SAVES = (0.3, 0.5)


@dataclass(frozen=True)
class PerToken:
    """A serverless price: dollars a million tokens."""

    input: float
    cached: float  # input found in the prompt cache
    output: float
    source: Source = READ

    def dollars(
        self, prompt: int, cached: int, completion: int, *, batch: bool = False
    ) -> float:
        """What these tokens cost; `cached` of the prompt's were in the cache."""
        whole = (
            (prompt - cached) * self.input
            + cached * self.cached
            + completion * self.output
        )
        return whole / 1e6 * (BATCH if batch else 1.0)


@dataclass(frozen=True)
class Tokens:
    """What a call reads and writes."""

    prompt: int
    cached: int  # of the prompt
    completion: int

    @classmethod
    def of(cls, call: Any) -> Tokens:
        """As a call's log line tells them (`calls.Call`); what is unknown is 0."""
        told = (call.prompt_tokens, call.cached_tokens, call.completion_tokens)
        return cls(*(number or 0 for number in told))

    def dollars(
        self, price: PerToken, *, known: bool = True, batch: bool = False
    ) -> float:
        """What such a call costs; `known` if its beginning is in the prompt cache."""
        cached = self.cached if known else 0
        return price.dollars(self.prompt, cached, self.completion, batch=batch)


# By size, for models without a price of their own: the same for input and output, and
# no rate of its own for cached input.
UP_TO_4B = PerToken(0.10, 0.10, 0.10)
UP_TO_16B = PerToken(0.20, 0.20, 0.20)
ABOVE_16B = PerToken(0.90, 0.90, 0.90)
MOE_UP_TO_56B = PerToken(0.50, 0.50, 0.50)
MOE_UP_TO_176B = PerToken(1.20, 1.20, 1.20)
SERVERLESS = {
    "gpt-oss-120b": PerToken(0.15, 0.015, 0.60),
    "glm-5p3-flash": PerToken(0.15, 0.03, 0.50, TOLD),
    "deepseek-v4p1-flash": PerToken(0.30, 0.006, 1.20, TOLD),
    "kimi-k3": PerToken(3.00, 0.30, 15.00, TOLD),
}

# An on-demand GPU: dollars an hour, billed by the second while a replica is up, from
# the moment it can serve, whether or not anyone asks it something (TOLD_GPUS).
GPU_HOUR = {
    "NVIDIA_H100_80GB": 8.00,
    "NVIDIA_H200_141GB": 8.00,
    "NVIDIA_B200_180GB": 13.00,
}


@dataclass(frozen=True)
class Prices:
    """The price list of an account: what its calls and its GPUs cost."""

    token: PerToken = UP_TO_4B  # the shared model is small
    gpu_hour: Mapping[str, float] = field(default_factory=lambda: dict(GPU_HOUR))

    def call_usd(
        self, prompt: int, cached: int, completion: int, *, batch: bool = False
    ) -> float:
        """Dollars for the tokens of one serverless call."""
        return self.token.dollars(prompt, cached, completion, batch=batch)

    def gpu_usd(self, kind: str, gpu_seconds: float) -> float:
        """Dollars for GPUs that replicas held for so many seconds in all.

        Raises:
            ValueError: the list has no price for this kind.
        """
        if kind not in self.gpu_hour:
            raise ValueError(
                f"GPU: expected one of {', '.join(self.gpu_hour)}, found {kind!r}; "
                "add its price to the table"
            )
        return self.gpu_hour[kind] / 3600 * gpu_seconds


def serverless(model: str, billions: float) -> PerToken:
    """The price of a model: its own if it has one, else that of a dense one's size."""
    name = model.partition("#")[0].rpartition("/")[2]
    if name in SERVERLESS:
        return SERVERLESS[name]
    return UP_TO_4B if billions < 4 else UP_TO_16B if billions <= 16 else ABOVE_16B
