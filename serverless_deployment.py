"""A language model as a function: paid by the millisecond, asleep in between.

A server waits for callers, and its bill runs while it waits. A function costs nothing
until it is called. The price is hidden in the first call: somebody has to start a
process, import its libraries and load a model while a caller waits. And nobody asks
before a function is frozen, copied, or killed at its deadline in mid-sentence.

You will see: what happens between a call and its answer; what a cold start consists of
and four ways around it; what memory buys and what a deadline does; a pipeline of
events that survives the death of its workers.

Run it:     python serverless_deployment.py              all four sections, a minute
            python serverless_deployment.py 2 --quick    one section, rough, soon
Import it:  from serverless_deployment import handler
Needs:      pip install -r requirements.txt (the first run also builds the model)
Next:       deploy the same file for real: deploy/functions/
"""

from __future__ import annotations

# This file is the function that gets deployed. Whatever it imports here, every cold
# start pays for, so the demonstrations import what they need when they run.
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy

    from models import Piece, Sampling
    from models.lean import Lean

MAX_TOKENS = 64  # of an answer that names no limit
MOST_TOKENS = 512  # of any answer: with a deadline, a budget is part of the request
# What the function is deployed with. The first would make numpy start threads while it
# is imported; the second would make onnxruntime report its use; the third lets the
# heap have large pages, so that filling it takes fewer faults.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
SUMMARISE = "Summarize the following text in one short sentence:\n\n"

# ## Function-as-a-Service (FaaS) concepts
#
# A function is a file with a handler: an event goes in, a result comes out, both JSON.
# The platform decides when a process (a sandbox) is started for it, gives it one event
# at a time, freezes it in between and ends it when it likes. What a module holds stays
# from one call to the next, as long as the sandbox lives, and nobody says how long
# that is. So: keep what is dear to make (the model), keep nothing that matters.


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Answer a prompt, or summarise a text.

    Args:
        event: {"prompt": ...} or {"text": ...}, and if you like "max_tokens",
            "temperature" and "seed".
        context: Lambda's; of it, the time that is left until the deadline.

    Returns:
        The text, why it ended ("stop", "length" or "deadline"), its tokens, tokens a
        second and the seed that gives the same text again. For an event that cannot be
        answered {"error": ...}: it is the result, and not an exception, because the
        platform repeats what raises, and this would fail each time.
    """
    kept = LOADED or initialise()
    model: Lean = kept["model"]
    try:
        prompt, sampling = read_event(event, kept["random"])
        steps = model.stream(model.prompt(prompt), sampling)
    except ValueError as refused:
        return {"error": str(refused)}
    answer = answer_in_time(steps, context.get_remaining_time_in_millis)
    return {**answer._asdict(), "seed": sampling.seed, "revision": model.revision}


def read_event(event: Any, random: numpy.random.Generator) -> tuple[str, Sampling]:
    """What is asked for, and how to generate it.

    Raises:
        ValueError: expected, found, and what to send instead.
    """
    from models import Sampling

    asked = event if isinstance(event, dict) else {}
    words = [asked[name] for name in ("prompt", "text") if name in asked]
    if len(words) != 1 or not isinstance(words[0], str) or not words[0].strip():
        raise ValueError(
            'event: expected one of "prompt" and "text" with some words, found '
            f'{event!r:.80}; send {{"prompt": "..."}}'
        )
    seed = asked.get("seed")
    sampling = Sampling(
        max_tokens=asked.get("max_tokens", MAX_TOKENS),
        temperature=asked.get("temperature", 0.0),
        seed=int(random.integers(2**53)) if seed is None else seed,
    )
    if sampling.max_tokens > MOST_TOKENS:
        raise ValueError(
            f"max_tokens: expected 1 to {MOST_TOKENS}, found {sampling.max_tokens}; "
            "ask for less"
        )
    return SUMMARISE * ("text" in asked) + words[0], sampling


# ## Cold start mitigation strategies
#
# Pitfall: the first caller waits for a second, and so does everyone whom a burst sends
# to a new sandbox. Cure, from free to dear: import and load less (what follows); start
# from a snapshot (the hooks below); call the function now and then to keep a sandbox;
# pay for sandboxes that wait (provisioned concurrency).
#
# The init phase is the import of this file. It loads the model in its lean form
# (models/lean.py): no server, no engine, no thread, weights that are mapped instead of
# read and lie packed as this CPU wants them.

LOADED: dict[str, Any] = {}  # what the init phase leaves to the handler


def initialise() -> dict[str, Any]:
    """The init phase: everything that is dear to make and the same for all callers."""
    from models import lean

    LOADED["model"] = lean.load()
    seed_generators()
    return LOADED


def seed_generators() -> None:
    """Let this process draw random numbers that no other one draws."""
    import random

    import numpy

    LOADED["random"] = numpy.random.default_rng()  # seeded by the operating system
    numpy.random.seed()
    random.seed()


def before_snapshot() -> None:
    """Do once, for all clones, what each would do first: no caller waits for this."""
    LOADED["model"].warm_up()


def after_restore() -> None:
    """Make anew what no two clones may share.

    All clones wake up with the same generators in the same state. Without this, two
    callers get the same "random" text, and would get the same "unique" identifiers.
    """
    seed_generators()


def register_hooks() -> None:
    """Tell the runtime client, which calls them around the snapshot."""
    import snapshot_restore_py as snapshots

    snapshots.register_before_snapshot(before_snapshot)
    snapshots.register_after_restore(after_restore)


# In a sandbox, and there alone, the import is the init phase. Everywhere else (a
# test, an editor, the demonstrations) importing this file loads nothing.
if "AWS_LAMBDA_RUNTIME_API" in os.environ:
    initialise()
    if os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "snap-start":
        register_hooks()


# ## Memory and timeout optimization
#
# Memory is the only knob, and it turns the CPU as well: 1,769 MB buy one whole CPU, a
# quarter of that a quarter of its time. And every call has a deadline, at which the
# platform kills the process: the caller gets an error instead of the half of an answer
# that was there, pays for it, and the next one pays for a cold start.
#
# Pitfall: too little memory makes the same work slow, then late, then dead. Cure:
# measure the work at each size; and where time can run out, stop in time and say so.

HAND_OVER_MS = 50.0  # to hand the answer over: two or three periods of the CPU's quota
MARGIN = 2.0  # the next step may take so many times the slowest of the last ones
RECENT = 4  # steps


class Answer(NamedTuple):
    """An answer and how it came about."""

    text: str
    finish_reason: str
    tokens: int
    tokens_per_s: float | None


def answer_in_time(
    steps: Iterator[Piece | None], remaining_ms: Callable[[], float]
) -> Answer:
    """Generate until the answer ends, or until there is no time for one more step.

    How long a step takes depends on the memory the function was given, on the CPU it
    got and on its neighbours. So it is measured, here and now, and not configured.
    """
    text, tokens, reason = "", 0, "deadline"
    took: list[float] = []  # milliseconds of each step
    left = remaining_ms()
    while left > HAND_OVER_MS + MARGIN * max(took[-RECENT:], default=0.0):
        piece = next(steps)
        left, before = remaining_ms(), left
        took.append(before - left)
        if piece is None:
            continue
        text, tokens = text + piece.text, tokens + 1
        if piece.finish_reason is not None:
            reason = piece.finish_reason
            break
    decoding = took[len(took) - tokens + 1 :]
    rate = 1000 * len(decoding) / sum(decoding) if sum(decoding) else None
    return Answer(text, reason, tokens, rate)


# ## Event-driven AI applications
