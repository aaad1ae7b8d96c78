"""Prompts of a known size that no prefix cache has seen."""

from __future__ import annotations

import random

NAME = "smollm2-135m-instruct"
# The tokens that end an answer. Without them it has exactly max_tokens tokens.
END_IDS = (0, 2)
VOCABULARY = 49_152

PLACES = ("lighthouse", "harbour", "mountain", "garden", "market", "library", "bridge")
PEOPLE = ("sailor", "baker", "doctor", "painter", "farmer")


def conversation(number: int) -> list[dict[str, str]]:
    """About 38 tokens that ask for a long answer; no two numbers begin alike.

    The number comes first because prompts that share their beginning would share its
    computation too, on servers that can.
    """
    place, person = PLACES[number % len(PLACES)], PEOPLE[number % len(PEOPLE)]
    return [
        {
            "role": "system",
            "content": f"{number:05d}. You tell long and vivid stories.",
        },
        {"role": "user", "content": f"Tell a long story of a {person} in a {place}."},
    ]


def request(number: int, tokens: int) -> dict:
    """A chat request of this conversation whose answer has exactly `tokens` tokens."""
    return {
        "model": NAME,
        "messages": conversation(number),
        "max_tokens": tokens,
        "temperature": 0,
        "logit_bias": {str(id): -100 for id in END_IDS},
    }


def random_ids(count: int, seed: int) -> list[int]:
    """Token ids without meaning: what they are does not change what they cost."""
    return random.Random(seed).choices(range(100, VOCABULARY), k=count)
