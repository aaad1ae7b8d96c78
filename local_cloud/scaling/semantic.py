"""A semantic cache, and why it is off: it takes opposites for repetitions.

It reuses an answer whose question *means nearly the same*, by the cosine of two
sentence vectors. But a vector says what a text is about, not what it says of it: "Is it
safe" and "Is it unsafe" share all words but one. So a threshold that finds paraphrases
also hands out opposite answers. `trial` measures how many. Nothing of the course uses
this cache: `SemanticCache` finds nothing until it is built with `enabled=True`.

The vectors are the mean of the shared model's token embeddings, less what all sentences
have in common. A model trained for sentence vectors does better with paraphrases; that
opposites come close to each other is known of those too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

Vector = np.ndarray  # [576] float32, of length 1
Embed = Callable[[str], Vector]


@dataclass(frozen=True)
class Pair:
    """Two questions, and whether one answer is right for both."""

    first: str
    second: str
    same: bool


PARAPHRASES = (
    ("How do I reset my password?", "How can I reset my password?"),
    ("What is the capital of France?", "Which city is the capital of France?"),
    ("How tall is Mount Everest?", "What is the height of Mount Everest?"),
    ("When does the store open?", "At what time does the store open?"),
    ("How do I cancel my order?", "What must I do to cancel my order?"),
    ("Can dogs eat chocolate?", "Is chocolate okay for dogs to eat?"),
    ("Why is the sky blue?", "What makes the sky blue?"),
    ("How long does delivery take?", "How many days will the delivery need?"),
    ("Who wrote Hamlet?", "Who is the author of Hamlet?"),
    ("How can I lower my rent?", "What can I do to lower my rent?"),
    ("Is the museum open today?", "Is the museum open to visitors today?"),
    ("What does this error mean?", "What is the meaning of this error?"),
)
OPPOSITES = (
    ("Is it safe to mix these cleaners?", "Is it unsafe to mix these cleaners?"),
    ("How do I increase the limit?", "How do I decrease the limit?"),
    ("How do I enable the firewall?", "How do I disable the firewall?"),
    ("Which foods may a diabetic eat?", "Which foods may a diabetic not eat?"),
    ("What are the pros of nuclear power?", "What are the cons of nuclear power?"),
    ("How do I add a user to the group?", "How do I remove a user from the group?"),
    ("How do I convert miles to kilometres?", "How do I convert kilometres to miles?"),
    ("Did Brazil beat Italy?", "Did Italy beat Brazil?"),
    ("Should I take it before meals?", "Should I take it after meals?"),
    ("Is the payment due in 7 days?", "Is the payment due in 70 days?"),
    ("What is the minimum dose for a child?", "What is the maximum dose for a child?"),
    ("Who can see my private posts?", "Who can see my public posts?"),
)
PAIRS = (
    *(Pair(first, second, True) for first, second in PARAPHRASES),
    *(Pair(first, second, False) for first, second in OPPOSITES),
)


@cache
def embeddings() -> tuple[np.ndarray, np.ndarray]:
    """The model's embedding matrix: codes uint8 [49152, …] and scales, of its graph."""
    import onnx

    from models import build

    graph = onnx.load(str(build.ensure("int4").graph)).graph
    found = {
        one.name: onnx.numpy_helper.to_array(one)
        for one in graph.initializer
        if one.name in ("embedding", "embedding_scale")
    }
    return found["embedding"], found["embedding_scale"]


def embedder(tokenizer: Any) -> Embed:
    """Sentence vectors from the model's token embeddings.

    Without centring, any two sentences have a cosine near 1: most of a mean is what
    all text shares. It is estimated from the pairs themselves.
    """
    codes, scales = embeddings()

    def mean(text: str) -> Vector:
        ids = tokenizer.encode(text)
        rows = codes[ids].astype(np.float32) - 128
        return (rows * scales[ids][..., None]).reshape(len(ids), -1).mean(0)

    common = np.mean([mean(text) for p in PAIRS for text in (p.first, p.second)], 0)

    def embed(text: str) -> Vector:
        vector = mean(text) - common
        return vector / max(float(np.linalg.norm(vector)), 1e-9)

    return embed


class SemanticCache:
    """Answers by meaning: the nearest question above a threshold. Off by default."""

    def __init__(
        self, embed: Embed, threshold: float = 0.95, *, enabled: bool = False
    ) -> None:
        if not -1 <= threshold <= 1:
            raise ValueError(
                f"threshold: expected a cosine, -1 to 1, found {threshold}; try 0.95"
            )
        self.embed, self.threshold, self.enabled = embed, threshold, enabled
        self._known: list[tuple[Vector, str]] = []

    def put(self, question: str, answer: str) -> None:
        """Keep an answer."""
        if self.enabled:
            self._known.append((self.embed(question), answer))

    def get(self, question: str) -> str | None:
        """The answer to what seems the same question; None if nothing comes near."""
        if not self._known:
            return None
        vector = self.embed(question)
        likeness = [float(known @ vector) for known, _ in self._known]
        best = int(np.argmax(likeness))
        return self._known[best][1] if likeness[best] >= self.threshold else None


@dataclass(frozen=True)
class Rates:
    """What a threshold lets through, as shares of 0 to 1."""

    threshold: float
    right: float  # of the paraphrases that were found
    false: float  # of the opposites that got each other's answer


def trial(
    embed: Embed,
    thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99),
    pairs: Sequence[Pair] = PAIRS,
) -> list[Rates]:
    """Ask the second of each pair of a cache that knows the first; count by threshold.

    Pairs are asked one by one: no other question can be nearer, which is the cache's
    best case.
    """
    rates = []
    for threshold in thresholds:
        hits: dict[bool, list[bool]] = {True: [], False: []}
        for pair in pairs:
            store = SemanticCache(embed, threshold, enabled=True)
            store.put(pair.first, "known")
            hits[pair.same].append(store.get(pair.second) is not None)
        shares = {same: float(np.mean(found)) for same, found in hits.items()}
        rates.append(Rates(threshold, shares[True], shares[False]))
    return rates
