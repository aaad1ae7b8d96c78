"""The quality gate: a model that does not hold this is not shipped.

A digest tells that a file is the file that was built. It cannot tell that the build was
good: a wrong zero point, two layers swapped or a kernel that overflows on a new CPU
give a file that loads, answers fluently, and is worse. Three things are measured here,
and compared with `quality.json`, which is recorded once beside the float32 graph:

    perplexity   how likely the graph finds 5,000 tokens of mixed text
    KL           how far its next-token probabilities are from float32's: far sharper,
                 because better here cannot make up for worse there
    canaries     questions whose answers are no near-ties: the same on every CPU

KL is over float32's eight likeliest tokens and "any other", at each fourth position:
`quality.npz` holds those, so that the gate needs no float32 graph. Merging tokens can
only make KL smaller; about half of it remains.

    python -m models.quality                     the model in MODEL_DIR; about 10 s
    python -m models.quality --graph some.onnx   another, with tokenizer.json beside it
    python -m models.quality --record            a new baseline, after a meant change

Exit status: 0 it holds, 1 it does not, 2 it cannot be measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from onnxruntime.capi import onnxruntime_pybind11_state as refused  # type: ignore

from models import build
from models.engine import Engine
from models.errors import BuildError, ModelError
from models.grammar import json_schema
from models.model import Model
from models.runtime import Runtime, usable_cores
from models.sampling import Sampling
from models.text import Tokenizer

TEXTS = Path(__file__).parents[1] / "tests" / "texts"
BASELINE = Path(__file__).with_suffix(".json")
REFERENCE = "float32"
WINDOW = 384  # tokens read at once; each window starts without a past
ROWS = 4
KEPT = 8  # of float32's likeliest tokens
STEP = 4  # positions from one kept distribution to the next: 58 KB in all
MOST_KL, MOST_PERPLEXITY_OFF = 0.01, 0.015  # what int4 may lose to float32, at most
# What a gate must forgive: another CPU's kernels round elsewhere, which may move
# perplexity by tenths of a percent. Damage shows in KL long before: of 22 matrices (of
# 120) whose zero points were moved by one, the least sensitive adds half to KL, and
# 0.1 % to perplexity.
PERPLEXITY_TOLERANCE, KL_TOLERANCE = 0.01, 0.25
REBUILD = "build it again: python -m models --rebuild"
RECORD = "python -m models.quality --record"
DO = f"{REBUILD}; after a meant change: {RECORD}"


@dataclass(frozen=True)
class Canary:
    """A question whose answer is sure: no token of it has a near rival."""

    kind: str  # complete, chat, extract or classify
    prompt: str
    labels: tuple[str, ...] = ()  # classify: what to choose from


FRANCE, ITALY = "Country: France\nCapital: Paris", "Country: Italy\nCapital: Rome"
FEELINGS = ("positive", "negative")
TOPICS = ("sports", "politics", "cooking")
ORDER = {
    "type": "object",
    "properties": {
        "item": {"enum": ["pizza", "salad", "soup"]},
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["item", "size", "count"],
    "additionalProperties": False,
}
CANARIES = (
    Canary("chat", "Repeat this sentence exactly: The ship sails at dawn."),
    Canary("chat", "What is the plural of child?"),
    Canary("complete", f"{FRANCE}\n\n{ITALY}\n\nCountry: Japan\nCapital:"),
    Canary("complete", "2, 4, 6, 8, 10,"),
    Canary("complete", "def is_even(number):\n    return"),
    Canary(
        "extract",
        'Order: 2 small soup\nJSON: {"item": "soup", "size": "small", "count": 2}\n\n'
        'Order: 1 large salad\nJSON: {"item": "salad", "size": "large", "count": 1}\n\n'
        "Order: 3 large pizza\nJSON:",
    ),
    Canary("classify", "The food was cold and the waiter was rude.", FEELINGS),
    Canary("classify", "The best holiday we ever had.", FEELINGS),
    Canary("classify", "The striker scored twice in the second half.", TOPICS),
    Canary("classify", "Parliament votes on the new tax law today.", TOPICS),
    Canary("classify", "Simmer the onions in butter for ten minutes.", TOPICS),
)


@dataclass(frozen=True)
class Kept:
    """What remains of a graph's distributions: the likeliest tokens at some places."""

    ids: np.ndarray  # [places, KEPT]
    log_probabilities: np.ndarray  # [places, KEPT + 1]; the last: any other token


@dataclass(frozen=True)
class Baseline:
    """What a graph must come up to: `quality.json`."""

    texts: str  # SHA-256 of the texts
    tokens: str  # SHA-256 of their token ids
    perplexity: float
    perplexity_tolerance: float  # as a share, either way
    kl: float  # nats a token
    most_kl: float
    answers: dict[str, str]  # by the canary's prompt


@dataclass(frozen=True)
class Measured:
    """What one graph shows."""

    revision: str
    tokens: int
    perplexity: float
    kl: float
    answers: dict[str, str]


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    name: str
    expected: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Verdict:
    """What the gate says."""

    measured: Measured
    checks: list[Check]
    took_s: float

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    def table(self) -> str:
        """A line for each check that failed, or one line for all that held."""
        failed = [check for check in self.checks if not check.holds]
        measured = self.measured
        summary = (
            f"model {measured.revision}: perplexity {measured.perplexity:.3f}, KL "
            f"{measured.kl:.5f} nats over {measured.tokens:,} tokens, "
            f"{len(CANARIES)} canaries, in {self.took_s:.0f} s: "
        )
        if not failed:
            return summary + "the gate holds"
        rows = [("check", "expected", "found"), *map(_cells, failed)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        noun = "check" if len(failed) == 1 else "checks"
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join(
            [f"{summary}{len(failed)} {noun} failed", "", *lines, "", f"do: {DO}"]
        )


def _cells(check: Check) -> tuple[str, str, str]:
    """One line each, whatever a damaged model has answered."""
    cells = check.name, check.expected, check.found
    name, expected, found = (" ".join(cell.split())[:60] for cell in cells)
    return name, expected, found


# What reads a text; the benchmark of exactness and the tests use it too.


def open_graph(files: build.Files, rows: int = 1) -> Runtime:
    """A graph alone, without the engine.

    Raises:
        BuildError: onnxruntime cannot open it, or it is another network.
    """
    with _opening(files.graph):
        return Runtime(files.graph, rows=rows, context=WINDOW, threads=usable_cores())


def windows(
    tokenizer: Tokenizer, texts: Path = TEXTS, most_tokens: int | None = None
) -> Iterator[list[int]]:
    """The texts of a folder in pieces of at most `WINDOW` tokens."""
    left = math.inf if most_tokens is None else most_tokens
    for path in _paths(texts):
        ids = tokenizer.encode(path.read_text(encoding="utf-8"))
        count = -(-len(ids) // WINDOW)
        for part in np.array_split(ids, count):  # of about equal lengths
            if left < 2:
                return
            window = part.tolist()[: int(min(left, WINDOW))]
            left -= len(window)
            yield window


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities of each row of logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    sums = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    return shifted - np.log(sums).astype(np.float32)


def divergence(theirs: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """KL in nats at each position, from the log-probabilities of both."""
    return (np.exp(theirs) * (theirs - ours)).sum(axis=1)


def losses(log_probabilities: np.ndarray, window: Sequence[int]) -> np.ndarray:
    """How unlikely each next token of a window was, in nats."""
    return -log_probabilities[np.arange(len(window) - 1), window[1:]]


def perplexity(losses: Sequence[np.ndarray]) -> float:
    """The exponential of the mean loss."""
    return float(np.exp(np.concatenate(losses).mean(dtype=np.float64)))


def _paths(texts: Path) -> list[Path]:
    if not (paths := sorted(texts.glob("*.txt"))):
        raise ModelError(
            f"{texts}: expected a folder with .txt files, found none; name the folder "
            "of the baseline's texts: --texts tests/texts"
        )
    return paths


@contextmanager
def _opening(graph: Path):
    """Turns onnxruntime's refusals into a message."""
    try:
        yield
    except (
        *(refused.Fail, refused.InvalidProtobuf, refused.InvalidGraph),
        *(refused.InvalidArgument, refused.NoSuchFile, refused.NotImplemented),
        *(refused.RuntimeException, KeyError),  # the last: without the inputs we bind
    ) as error:
        reason = str(error).splitlines()[0][:200]
        raise BuildError(
            f"{graph}: expected the model's graph, found one that cannot run "
            f"({reason}); {REBUILD}"
        ) from error


# The three measurements.


def measure(
    files: build.Files, texts: Path, reference: Kept | None
) -> tuple[Measured, Kept]:
    """Read the texts and ask the canaries. Without a reference, KL is zero."""
    tokenizer = Tokenizer.load(files.tokenizer)
    runtime = open_graph(files, ROWS)
    read, kept, divergences, place = [], [], [np.zeros(1)], 0
    with np.errstate(invalid="ignore", over="ignore"):  # damage makes such numbers
        for window in windows(tokenizer, texts):
            with _opening(files.graph):
                ours = log_softmax(runtime.every_logit(window))
            read.append(losses(ours, window))
            ours = ours[::STEP]
            ids = _likeliest(ours)
            if reference is not None:
                rows = slice(place, place := place + len(ours))
                ids = reference.ids[rows]
                theirs = reference.log_probabilities[rows]
                divergences.append(divergence(theirs, _merged(ours, ids)))
            kept.append(Kept(ids, _merged(ours, ids)))
        found = perplexity(read)
    # Without numbers there is nothing to draw an answer from.
    answers = _answers(files, runtime, tokenizer) if math.isfinite(found) else {}
    kl = float(np.concatenate(divergences[1:] or divergences).mean())
    tokens = sum(len(one) + 1 for one in read)
    return Measured(files.revision, tokens, found, kl, answers), Kept(
        np.concatenate([one.ids for one in kept]),
        np.concatenate([one.log_probabilities for one in kept]),
    )


def _likeliest(log_probabilities: np.ndarray) -> np.ndarray:
    ids = np.argpartition(log_probabilities, -KEPT, axis=1)[:, -KEPT:]
    return ids.astype(np.uint16)  # the vocabulary has 49,152


def _merged(log_probabilities: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The log-probabilities of `ids`, and of any other token."""
    kept = np.take_along_axis(log_probabilities, ids.astype(np.int64), axis=1)
    rest = 1 - np.exp(kept).sum(axis=1, keepdims=True, dtype=np.float64)
    rest = np.log(np.maximum(rest, 1e-6)).astype(np.float32)  # rounding may leave none
    return np.concatenate([kept, rest], axis=1)


def _answers(
    files: build.Files, runtime: Runtime, tokenizer: Tokenizer
) -> dict[str, str]:
    with Model(files, runtime.device, Engine(runtime, tokenizer, shelf=0)) as model:
        return {canary.prompt: answer(model, canary) for canary in CANARIES}


def answer(model: Model, canary: Canary) -> str:
    """What a model says to a canary; what went wrong if it cannot answer."""
    try:
        if canary.kind == "classify":
            (scores,) = model.classify(canary.prompt, canary.labels)
            return max(scores, key=lambda label: scores[label])
        return model.generate(*asked(model, canary)).text.strip()
    except ModelError as error:
        return f"no answer: {error}"


def asked(model: Model, canary: Canary) -> tuple[list[int], Sampling]:
    """The prompt's tokens and the sampling of a canary that is no classification."""
    if canary.kind == "chat":
        return model.prompt(canary.prompt), Sampling(max_tokens=24)
    ids = model.tokenizer.encode(canary.prompt)
    if canary.kind == "extract":
        return ids, Sampling(max_tokens=48, grammar=json_schema(ORDER))
    return ids, Sampling(max_tokens=12, stop=("\n",))


# The baseline, and what is compared with it.


def load_baseline(path: Path = BASELINE) -> tuple[Baseline, Kept]:
    """What `record` wrote.

    Raises:
        ModelError: there is none, or it is of other canaries.
    """
    try:
        baseline = Baseline(**json.loads(path.read_text(encoding="utf-8")))
        with np.load(path.with_suffix(".npz")) as arrays:
            kept = Kept(arrays["ids"], arrays["log_probabilities"])
    except (OSError, ValueError, TypeError, KeyError, BadZipFile) as error:
        raise ModelError(
            f"{path}: expected a recorded baseline, found {error!r}; check it out "
            f"again, or record one: {RECORD}"
        ) from error
    if set(baseline.answers) != {canary.prompt for canary in CANARIES}:
        raise ModelError(
            f"{path}: expected the answers of {len(CANARIES)} canaries, found others'; "
            f"record them: {RECORD}"
        )
    return baseline, kept


def save_baseline(baseline: Baseline, kept: Kept, path: Path = BASELINE) -> None:
    """Write both files."""
    path.write_text(json.dumps(asdict(baseline), indent=2) + "\n", encoding="utf-8")
    np.savez_compressed(path.with_suffix(".npz"), **vars(kept))


def record(files: build.Files, texts: Path) -> tuple[Baseline, Kept]:
    """The baseline of a graph that is as good as float32.

    Raises:
        ModelError: it is not, or a canary's answer differs.
    """
    reference, kept = measure(build.ensure(REFERENCE), texts, None)
    found, _ = measure(files, texts, kept)
    aim = Baseline(
        *digests(files, texts),
        perplexity=reference.perplexity,
        perplexity_tolerance=MOST_PERPLEXITY_OFF,
        kl=0.0,
        most_kl=MOST_KL,
        answers=reference.answers,
    )
    if failed := [one for one in judge(found, aim) if not one.holds]:
        raise ModelError(
            f"{files.graph}: expected a graph as good as {REFERENCE} to record, found "
            f"{failed[0].name}: {failed[0].found} instead of {failed[0].expected}; "
            f"{REBUILD}"
        )
    return replace(
        aim,
        perplexity=found.perplexity,
        perplexity_tolerance=PERPLEXITY_TOLERANCE,
        kl=found.kl,
        most_kl=found.kl * (1 + KL_TOLERANCE),
    ), kept


def digests(files: build.Files, texts: Path) -> tuple[str, str]:
    """SHA-256 of the texts, and of the tokens that the tokenizer makes of them."""
    tokenizer = Tokenizer.load(files.tokenizer)
    words = b"".join(path.read_bytes() for path in _paths(texts))
    tokens = [id for window in windows(tokenizer, texts) for id in window]
    return (
        hashlib.sha256(words).hexdigest(),
        hashlib.sha256(np.array(tokens, np.uint16).tobytes()).hexdigest(),
    )


def check(files: build.Files, texts: Path, path: Path = BASELINE) -> Verdict:
    """Measure a model and compare it with the baseline.

    Raises:
        ModelError: it cannot be measured, or not be compared.
    """
    started = time.monotonic()
    baseline, kept = load_baseline(path)
    words, tokens = digests(files, texts)
    if words != baseline.texts:
        raise ModelError(
            f"{texts}: expected the texts of the baseline, SHA-256 "
            f"{baseline.texts[:12]}…, found {words[:12]}…; check them out again, or "
            f"record: {RECORD}"
        )
    if tokens != baseline.tokens:
        raise ModelError(
            f"{files.tokenizer}: expected the tokenizer of the baseline, found one "
            f"that splits the texts into other tokens; {REBUILD}"
        )
    measured, _ = measure(files, texts, kept)
    return Verdict(measured, judge(measured, baseline), time.monotonic() - started)


def judge(measured: Measured, baseline: Baseline) -> list[Check]:
    """Every comparison. What is no number never holds."""
    off = measured.perplexity / baseline.perplexity - 1
    tolerance = baseline.perplexity_tolerance
    checks = [
        Check(
            "perplexity",
            f"{baseline.perplexity:.3f} ± {tolerance:.1%}",
            f"{measured.perplexity:.3f} ({off:+.2%})",
            abs(off) <= tolerance,
        ),
        Check(
            "KL, nats",
            f"at most {baseline.most_kl:.5f}",
            f"{measured.kl:.5f}",
            measured.kl <= baseline.most_kl,
        ),
    ]
    for canary in CANARIES:
        expected = baseline.answers[canary.prompt]
        found = measured.answers.get(canary.prompt, "not asked: no perplexity")
        question = f"{canary.kind}: …{canary.prompt[-28:]}"
        checks.append(Check(question, expected, found, found == expected))
    return checks


# The command.


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        files = _files(options.graph)
        if options.record:
            save_baseline(*record(files, options.texts))
            print(f"recorded: {BASELINE}")
            return 0
        verdict = check(files, options.texts)
        if options.json:
            options.json.write_text(json.dumps(asdict(verdict), indent=2) + "\n")
    except (ModelError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(verdict.table())
    return 0 if verdict.holds else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--graph", type=Path, help="an ONNX file; default: MODEL_DIR's")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="a folder of .txt")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--record", action="store_true", help="write a new baseline")
    return parser


def _files(graph: Path | None) -> build.Files:
    """The files to measure. A gate builds nothing: it would measure its own build."""
    if graph is not None:
        if not graph.is_file():
            raise ModelError(
                f"{graph}: expected an ONNX file, found none; correct the path, or "
                "leave --graph out to measure the built model"
            )
        revision = build.digest(graph)[:12]
        return build.Files(graph, graph.with_name("tokenizer.json"), "int4", revision)
    folder = build.model_folder()
    if (files := build.find(folder, Runtime.precision)) is None:
        raise ModelError(
            f"{folder}: expected a built model, found none; build it: python -m models,"
            " or name its folder with MODEL_DIR"
        )
    return files


if __name__ == "__main__":
    raise SystemExit(main())
