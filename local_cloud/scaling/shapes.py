"""One large replica or several small ones: the real model in several shapes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from course.measure import Series
from course.show import Cell, Table

if TYPE_CHECKING:
    from course.lesson import Run
    from models import Model

Shape = tuple[int, int]  # replicas, and threads of each
SHAPES: tuple[Shape, ...] = ((1, 1), (1, 2), (2, 1), (4, 1))
CALLERS, TOKENS, TURNS = 8, 16, 3


def tokens_per_s(load_model: Callable[[], Model], replicas: int) -> Series:
    """What so many engines answer together, asked eight things at once; a few turns."""
    from models import Sampling

    few = Sampling(max_tokens=TOKENS)
    with ExitStack() as stack, ThreadPoolExecutor(CALLERS) as callers:
        engines = [stack.enter_context(load_model()) for _ in range(replicas)]

        def ask(number: int) -> int:
            engine = engines[number % replicas]
            return engine.generate(f"Tell me of {number}.", few).completion_tokens

        def turn(first: int) -> float:
            began = time.perf_counter()
            tokens = sum(callers.map(ask, range(first, first + CALLERS)))
            return tokens / (time.perf_counter() - began)

        for engine in engines:  # warm
            engine.generate("Hi", few)
        return Series(tuple(turn(n * CALLERS) for n in range(TURNS)), "tokens/s")


def show(run: Run) -> None:
    """Vertical (more threads) against horizontal (more replicas)."""
    import models

    found: dict[Shape, Series] = {}
    with run.progress("shapes", len(SHAPES)) as advance:
        for replicas, threads in SHAPES:
            load = partial(
                models.load, run.device, rows=4, context=512, threads=threads
            )
            found[replicas, threads] = tokens_per_s(load, replicas)
            advance()
    run.table(table(found))
    (fewer, _), (more, _) = SHAPES[-2:]
    gain = found[SHAPES[-1]].median / found[SHAPES[-2]].median - 1
    name = f"{more} replicas instead of {fewer}, on {os.cpu_count()} cores"
    run.fact(name, f"{gain:+.0%} tokens/s")


def table(found: Mapping[Shape, Series]) -> Table:
    """What each shape answered."""
    rows: list[list[Cell]] = [
        [*shape, told.median, f"{told.min:.0f} to {told.max:.0f}"]
        for shape, told in found.items()
    ]
    columns = ["replicas", "threads of each", ("together, median", "tokens/s")]
    columns += ["turns"]
    note = f"{CALLERS} callers at once, n = {TURNS} turns; {os.cpu_count()} cores"
    return Table("Vertical or horizontal", columns, rows, note)
