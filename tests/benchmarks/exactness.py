"""Exactness: how close each graph comes to the weights' own numbers in float32.

The float32 graph holds every weight as the GGUF file means it. Beside it, the others
are read over the mixed text in `tests/texts`: prose, dialogue, seven languages, code,
mathematics, tables and chats. KL divergence says how far the whole distribution of the
next token moved; perplexity, whether the text became less likely; top-1, how often
both would choose the same token.

Run it:     python -m tests.benchmarks.exactness                  about two minutes
            python -m tests.benchmarks.exactness --quick          a tenth of the text
Needs:      1 GB of disk in MODEL_DIR for the float32 graph, built on the first run
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from course import lesson
from course.show import Table
from models import build
from models.quality import (
    MOST_KL,
    MOST_PERPLEXITY_OFF,
    REFERENCE,
    WINDOW,
    divergence,
    log_softmax,
    losses,
    open_graph,
    perplexity,
    windows,
)
from models.text import Tokenizer
from tests.benchmarks import AFTER_LESSONS

COMPARED = ("int4", "float16")
QUICK_TOKENS = 500
BARS = f"int4 aims at a mean KL of {MOST_KL} and a perplexity within 1.5 %, at most."


@dataclass(frozen=True)
class Exactness:
    """One graph beside the float32 graph on the same tokens."""

    precision: str
    tokens: int
    file_mb: float
    perplexity: float
    reference_perplexity: float
    kl_mean: float  # nats a token, of float32 from this graph
    kl_p99: float
    same_top: float  # share of positions at which both prefer the same token
    gap_shift_p999: float  # logits; the gap between float32's two likeliest tokens

    @property
    def perplexity_off(self) -> float:
        """How much larger the perplexity is than float32's, as a share."""
        return self.perplexity / self.reference_perplexity - 1


def measure(precision: str, most_tokens: int | None = None) -> Exactness:
    """Read the texts with one graph and with float32; builds what is missing."""
    files, reference_files = build.ensure(precision), build.ensure(REFERENCE)
    graph, reference = open_graph(files), open_graph(reference_files)
    tokenizer = Tokenizer.load(files.tokenizer)
    divergences, read, reference_read, same, shifts = [], [], [], [], []
    for window in windows(tokenizer, most_tokens=most_tokens):
        ours = log_softmax(graph.every_logit(window))
        theirs = log_softmax(reference.every_logit(window))
        divergences.append(divergence(theirs, ours))
        read.append(losses(ours, window))
        reference_read.append(losses(theirs, window))
        same.append(ours.argmax(axis=1) == theirs.argmax(axis=1))
        shifts.append(_gap_shift(ours, theirs))
    nats = np.concatenate(divergences)
    return Exactness(
        precision=precision,
        tokens=len(nats),
        file_mb=files.graph.stat().st_size / 1e6,
        perplexity=perplexity(read),
        reference_perplexity=perplexity(reference_read),
        kl_mean=float(nats.mean()),
        kl_p99=float(np.percentile(nats, 99)),
        same_top=float(np.concatenate(same).mean()),
        gap_shift_p999=float(np.percentile(np.concatenate(shifts), 99.9)),
    )


def _gap_shift(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """How far the gap between the two likeliest tokens moved, at each position."""
    two = np.argpartition(theirs, -2, axis=1)[:, -2:]
    gaps = (np.diff(np.take_along_axis(one, two, axis=1)) for one in (ours, theirs))
    return np.abs(np.subtract(*gaps))[:, 0]


def compare_graphs(run: lesson.Run) -> None:
    """Print one row for each graph, float32 first."""
    run.predict(BARS)
    results = [measure(one, QUICK_TOKENS if run.quick else None) for one in COMPARED]
    reference_mb = build.ensure(REFERENCE).graph.stat().st_size / 1e6
    rows = [(REFERENCE, reference_mb, results[0].reference_perplexity, 0, 0, 0, 100)]
    rows += [
        (
            one.precision,
            one.file_mb,
            one.perplexity,
            100 * one.perplexity_off,
            one.kl_mean,
            one.kl_p99,
            100 * one.same_top,
        )
        for one in results
    ]
    columns = (
        ("graph", ""),
        ("file", "MB"),
        ("perplexity", ""),
        ("more", "%"),
        ("mean KL", "nats"),
        ("p99 KL", "nats"),
        ("same top-1", "%"),
    )
    note = f"{results[0].tokens} tokens of tests/texts, windows of up to {WINDOW}"
    run.table(Table("Each graph beside float32", columns, rows, note))
    int4 = results[0]
    kept = int4.kl_mean <= MOST_KL and abs(int4.perplexity_off) <= MOST_PERPLEXITY_OFF
    run.conclude(
        f"int4 {'keeps' if kept else 'misses'} the aim in {int4.file_mb:.0f} MB, "
        f"{reference_mb / int4.file_mb:.1f} times less than float32."
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    sections = [lesson.Section("Exactness", compare_graphs)]
    return lesson.run(doc=__doc__, sections=sections, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
