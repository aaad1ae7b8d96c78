"""Goes through a cold start step by step and prints what each step took, as JSON.

Started by `cold_starts`, in a process of its own for each run, because an import costs
something only once:

    python -P phases.py naive|tuned <start>      the phases of a start
    python -P phases.py read|mapped|unpacked     one way to open the model, and a call

The steps call what the two functions call, in the same order. `<start>` is the parent's
clock when it started this process.
"""

from __future__ import annotations

import sys
import time

PROMPT = "Name a colour."
CALLS = 5


class Laps:
    """CPU and wall-clock milliseconds from lap to lap."""

    def __init__(self, start_s: float) -> None:
        self.laps: list[tuple[str, float, float]] = []
        self._cpu, self._wall = 0.0, start_s

    def lap(self, name: str) -> None:
        cpu, wall = time.process_time(), time.monotonic()
        lap = (name, 1000 * (cpu - self._cpu), 1000 * (wall - self._wall))
        self.laps.append(lap)
        self._cpu, self._wall = time.process_time(), time.monotonic()


def start(laps: Laps) -> None:
    """What both functions begin with."""
    laps.lap("interpreter")
    import awslambdaric.bootstrap
    import awslambdaric.lambda_runtime_client  # noqa: F401

    laps.lap("runtime client")


def naive(laps: Laps) -> None:
    """The steps of deploy/functions/naive.py."""
    start(laps)
    import models

    laps.lap("numpy")
    import model_api  # noqa: F401

    laps.lap("web framework")
    from models import build, model

    laps.lap("onnxruntime")
    files = build.ensure()
    laps.lap("check of the files")
    tokenizer = model.Tokenizer.load(files.tokenizer)
    laps.lap("tokenizer")
    rows = models.ROWS + models.SHELF
    runtime = model.Runtime(
        files.graph, rows=rows, context=models.CONTEXT, threads=model.usable_cores()
    )
    laps.lap("session")
    with model.Model(files, "cpu", model.Engine(runtime, tokenizer, models.SHELF)) as m:
        m.generate(PROMPT, models.Sampling(max_tokens=1))
        laps.lap("first token")


def tuned(laps: Laps) -> None:
    """The steps of serverless_deployment.py."""
    start(laps)
    import models

    laps.lap("numpy")
    import onnxruntime  # noqa: F401

    laps.lap("onnxruntime")
    from models import lean, packed

    files = packed.ensure()
    laps.lap("own code")
    tokenizer = lean.Tokenizer.load(files.tokenizer)
    laps.lap("tokenizer")
    runtime = lean.PackedRuntime(files.graph, rows=1, context=lean.CONTEXT, threads=1)
    laps.lap("session")
    model = lean.Lean(runtime, tokenizer, files.revision)
    list(model.stream(model.prompt(PROMPT), models.Sampling(max_tokens=1)))
    laps.lap("first token")


def open_model(way: str) -> tuple[float, float]:
    """CPU milliseconds to open the model in one of three ways, and of a call then."""
    from models import build, lean, packed, runtime

    class Unpacked(lean.PackedRuntime):
        """As packed files are opened, but onnxruntime may not pack at all."""

        def _options(self, threads: int):
            options = super()._options(threads)
            options.add_session_config_entry("session.disable_prepacking", "1")
            return options

    kinds = {"read": runtime.Runtime, "mapped": lean.PackedRuntime}
    kind = kinds.get(way, Unpacked)
    graph = build.ensure().graph if way == "read" else packed.ensure().graph
    begin = time.process_time()
    opened = kind(graph, rows=1, context=lean.CONTEXT, threads=1)
    opening = time.process_time() - begin
    opened.decode([1], [0])  # its first call binds and allocates
    begin = time.process_time()
    for length in range(1, 1 + CALLS):
        opened.decode([1], [length])
    call = (time.process_time() - begin) / CALLS
    return 1000 * opening, 1000 * call


def main(way: str, *rest: str) -> None:
    told: object = None
    if rest:
        laps = Laps(float(rest[0]))
        (naive if way == "naive" else tuned)(laps)
        told = laps.laps
    else:
        told = open_model(way)
    import json

    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
