"""Decode and prefill by batch size: this engine beside llama.cpp on the same weights.

Both run in processes of their own, with the same number of threads, and take turns;
the one whose turn it is not is stopped. A turn warms up, then measures. The ratio is
the median of the turns' ratios, with the interval of the sign test.

Three columns: the graph and a greedy choice alone, the same through the continuous
batching engine (scheduler, sampler, detokeniser), and llama.cpp's `llama_decode` with
the same greedy choice.

Run it:     python -m tests.benchmarks.rows                      about three minutes
            python -m tests.benchmarks.rows --quick              under one
Needs:      python -m venv ~/llama && ~/llama/bin/pip install llama-cpp-python
            then --llama-python ~/llama/bin/python; without it, ours alone
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from course import lesson
from course.measure import Paired, Percentile, Series
from course.show import Cell, Table
from tests.benchmarks import AFTER_LESSONS
from tests.benchmarks.turns import (
    THREADS,
    Bystanders,
    Turn,
    Worker,
    in_turns,
    worker,
)

ROWS = (1, 2, 4, 8, 16, 32)
PROMPTS = (38, 128, 512)  # tokens
HELD = 40  # tokens each row holds before decoding
CONTEXT = 640  # tokens a row may hold, on both sides
STEPS = {1: 64, 2: 48, 4: 40, 8: 24, 16: 16, 32: 12}  # about a second or less
ROUNDS, QUICK_ROUNDS = 7, 2  # an interval at 95 % takes 6
AHEAD_AT_16 = 1.6  # times llama.cpp: the bar

INSTALL = "python -m venv ~/llama && ~/llama/bin/pip install llama-cpp-python"


def llama_version(python: str) -> str | None:
    """The version of llama-cpp-python that an interpreter has."""
    code = "import llama_cpp; print(llama_cpp.__version__)"
    try:
        found = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=60
        )
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None


@contextmanager
def workers(run: lesson.Run) -> Iterator[list[Worker]]:
    """Ours, and llama.cpp's where it can run."""
    python = run.arguments.llama_python
    version = llama_version(python)
    ours = [sys.executable, "-m", "tests.benchmarks.rows_ours", run.device]
    with worker(ours) as first:
        first.ask("revision")  # it is up, and built
        if version is None or run.device != "cpu":
            why = "llama.cpp runs beside the CPU only"
            if version is None:
                why = f"{python} has no llama-cpp-python"
            run.skip(f"{why}: the columns of llama.cpp are left out", _commands())
            yield [first]
            return
        with gguf_file(run.arguments.gguf) as gguf:
            theirs = [python, "-m", "tests.benchmarks.rows_llama", str(gguf)]
            with worker(theirs) as second:
                second.ask("prefill", tokens=PROMPTS[0])
                run.say(f"llama-cpp-python {version}, {THREADS} threads on each side.")
                yield [first, second]


def _commands() -> str:
    again = "python -m tests.benchmarks.rows --llama-python ~/llama/bin/python"
    return f"{INSTALL} && {again}"


@contextmanager
def gguf_file(given: Path | None) -> Iterator[Path]:
    """The weights as llama.cpp reads them: a given file, or fetched for the block."""
    if given:
        yield given.resolve()
        return
    from models.weights import fetch_gguf

    with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
        yield fetch_gguf(Path(folder), lambda what, done, total: None)


def measure(run: lesson.Run, kind: str, details: list[dict[str, int]]) -> list[Any]:
    """For each set of details: the figures of each column, one a round."""
    engines = run.keep("workers", lambda: workers(run))
    rounds = QUICK_ROUNDS if run.quick else ROUNDS
    results: list[list[list[float]]] = [[] for _ in details]
    bystanders = Bystanders()
    with run.progress(kind, rounds * len(details)) as advance:
        for number in range(rounds):
            for place, detail in enumerate(details):
                turns = _turns(engines, kind, detail)
                columns = in_turns(turns, number, bystanders)
                results[place].append([figure for c in columns for figure in c])
                advance()
    bystanders.tell(run)
    return [[Series(c) for c in zip(*turns, strict=True)] for turns in results]


def _turns(
    engines: list[Worker], kind: str, detail: dict[str, int]
) -> list[tuple[int, Turn]]:
    """What each engine does in its turn: ours measures twice."""
    ours, *theirs = engines

    def twice() -> list[float]:
        return [ours.ask(kind, **detail), ours.ask(f"engine_{kind}", **detail)]

    turns: list[tuple[int, Turn]] = [(ours.pid, twice)]
    for other in theirs:
        turns.append((other.pid, lambda other=other: [other.ask(kind, **detail)]))
    return turns


def show_table(
    run: lesson.Run, title: str, what: str, sizes: tuple[int, ...], figures: list[Any]
) -> list[Percentile]:
    """Prints the table; gives back the ratios of the graph, one for each size."""
    rows: list[list[Cell]] = []
    ratios: list[Percentile] = []
    for size, columns in zip(sizes, figures, strict=True):
        graph, engine, *others = columns
        row: list[Cell] = [size, graph.median, engine.median]
        for other in others:
            ratios.append(Paired(graph, other).ratio())
            through = Paired(engine, other).ratio()
            row += [other.median, spelled(ratios[-1]), spelled(through)]
        rows.append([*row, graph.n])
    headings: list[Any] = [what, ("graph", "tokens/s"), ("engine", "tokens/s")]
    if ratios:
        headings += [("llama.cpp", "tokens/s"), ("graph", "times llama.cpp")]
        headings += [("engine", "times llama.cpp")]
    note = "Medians; ratios with their 95 % interval, which needs 6 turns."
    run.table(Table(title, [*headings, "n"], rows, note))
    return ratios


def spelled(ratio: Percentile) -> str:
    """A ratio with its interval, where there are values enough for one."""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}"
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def decode(run: lesson.Run) -> None:
    """Answers that grow together, a token a step."""
    run.predict("Each step reads all weights once, so more rows cost little more time.")
    figures = measure(run, "decode", [{"rows": n, "steps": STEPS[n]} for n in ROWS])
    ratios = show_table(run, "Decode", "rows", ROWS, figures)
    if not ratios:
        return
    ahead = sum(ratio.value > 1 for ratio in ratios)
    at_16 = ratios[ROWS.index(16)].value
    run.conclude(
        f"Ahead of llama.cpp at {ahead} of {len(ROWS)} batch sizes (bar: all); at 16 "
        f"rows {at_16:.2f} times as fast (bar: {AHEAD_AT_16})."
    )


def prefill(run: lesson.Run) -> None:
    """One prompt, read alone."""
    run.predict("Reading is bound by arithmetic: the rate depends little on length.")
    figures = measure(run, "prefill", [{"tokens": n} for n in PROMPTS])
    ratios = show_table(run, "Prefill", "prompt tokens", PROMPTS, figures)
    if ratios:
        ahead = sum(ratio.value > 1 for ratio in ratios)
        run.conclude(f"Ahead of llama.cpp at {ahead} of {len(PROMPTS)} lengths.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    parser.add_argument(
        "--llama-python",
        metavar="PATH",
        default=python,
        help="interpreter with llama-cpp-python; default: LLAMA_PYTHON, else this one",
    )
    parser.add_argument(
        "--gguf",
        metavar="PATH",
        type=Path,
        help="the weights for llama.cpp; default: fetched, 93 MB, and thrown away",
    )


SECTIONS = [
    lesson.Section("Decode", decode),
    lesson.Section("Prefill", prefill),
]


def main(argv: list[str] | None = None) -> int:
    """Measure both and print the tables."""
    return lesson.run(
        doc=__doc__,
        sections=SECTIONS,
        argv=argv,
        number=AFTER_LESSONS,
        add_arguments=add_arguments,
    )


if __name__ == "__main__":
    raise SystemExit(main())
