"""The lesson's trials of what need not be computed twice, on the real model.

`ask_repeatedly` puts the same question to the API from many callers, without a cache,
with an empty one, a full one and an outdated one. `prefix_hits` sends conversations to
several engines and counts the tokens that their prefix caches knew. `answered` works
off jobs with whatever does them.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from course.measure import Series
from course.process import wait_until
from course.show import Cell, Table
from local_cloud.scaling import semantic
from local_cloud.scaling.cache import CachedApp, ResponseCache, Rules
from local_cloud.scaling.jobs import Jobs, SQLiteJobs, Status
from local_cloud.scaling.ring import Ring, prefix
from local_cloud.scaling.worker import work

if TYPE_CHECKING:
    from course.lesson import Run
    from models import Model

CHAT = "/v1/chat/completions"
RULES = Rules(ttl_s=60.0, jitter=0.0, stale_s=60.0)
WORDS = ("red", "salt", "wind", "moon", "tree", "road", "lamp", "stone")


# One answer for many.


@dataclass(frozen=True)
class Asked:
    """The same question from many at once."""

    what: str  # state of the cache
    callers: int
    computed: int  # answers of the model
    each: Series  # seconds


def ask_repeatedly(
    app: Any, model: Model, callers: int = 100, tokens: int = 8
) -> list[Asked]:
    """Without a cache, with an empty, a full and an outdated one; no sockets between.

    Args:
        app: the API around the model.
    """
    return asyncio.run(_ask_repeatedly(app, model, callers, tokens))


async def _ask_repeatedly(
    app: Any, model: Model, callers: int, tokens: int
) -> list[Asked]:
    now = [0.0]  # the cache's clock stands: what it holds is as old as we say
    cache = ResponseCache(RULES, clock=lambda: now[0])
    cached = CachedApp(app, cache, revision=model.revision)
    found = []
    for what, asked in (("none", app), ("empty", cached), ("full", cached)):
        found.append(await _asked(what, asked, model, callers, tokens))
    now[0] += RULES.ttl_s
    found.append(await _asked("outdated", cached, model, callers, tokens))
    await cache.close()
    return found


async def ask_at_once(
    app: Any, model: str, count: int, tokens: int
) -> tuple[float, Series]:
    """The same question from many callers; seconds for all, and of each."""
    import httpx

    question = {
        "model": model,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": tokens,
    }
    took: list[float] = []
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://api", timeout=120
    ) as http:

        async def one() -> None:
            started = time.perf_counter()
            (await http.post(CHAT, json=question)).raise_for_status()
            took.append(time.perf_counter() - started)

        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(count)))
        return time.perf_counter() - started, Series(tuple(took))


async def _asked(what: str, app: Any, model: Model, callers: int, tokens: int) -> Asked:
    before = finished(model)
    _, took = await ask_at_once(app, model.name, callers, tokens)
    if what == "outdated":  # it is answered at once, and renewed after that
        async with asyncio.timeout(60):
            while finished(model) == before:
                await asyncio.sleep(0.01)
    return Asked(what, callers, finished(model) - before, took)


def finished(model: Model) -> int:
    """Answers that the engine has ended so far."""
    return sum(model.engine.snapshot().finished.values())


def show_asked(
    run: Run, app: Any, model: Model, callers: int, tokens: int
) -> list[Asked]:
    """The same question from many at once, by the state of the cache."""
    found = ask_repeatedly(app, model, callers, tokens)
    run.table(asked_table(found))
    return found


def asked_table(found: Sequence[Asked]) -> Table:
    """What the same question cost, by the state of the cache."""
    rows: list[list[Cell]] = []
    for one in found:
        times = [1000 * one.each.median, 1000 * one.each.max]
        rows.append([one.what, one.computed, *times, one.each.n])
    columns = ["cache", "answers computed", ("median", "ms"), ("slowest", "ms"), "n"]
    note = (
        "the real model, all at once; outdated: given out at once, renewed after that"
    )
    return Table("The same question", columns, rows, note)


# One beginning on one replica.

Pick = Callable[[Sequence[int]], str]  # the name of who gets a prompt of these tokens


def by_turns(names: Sequence[str]) -> Pick:
    """Each in turn."""
    turns = itertools.cycle(names)
    return lambda ids: next(turns)


def by_prefix(names: Sequence[str]) -> Pick:
    """Who has what begins like this."""
    ring = Ring(names)
    return lambda ids: ring.pick(prefix(ids))


def conversations(
    model: Model, beginnings: int, count: int, seed: int
) -> list[list[int]]:
    """Prompts as tokens, each with one of a few long beginnings."""
    draw = random.Random(seed)
    systems = [" ".join(draw.choices(WORDS, k=80)) for _ in range(beginnings)]
    return [
        model.prompt(
            [
                {"role": "system", "content": draw.choice(systems)},
                {"role": "user", "content": f"Question {number}?"},
            ]
        )
        for number in range(count)
    ]


def prefix_hits(
    replicas: Mapping[str, Model], prompts: Sequence[list[int]], pick: Pick, warm: int
) -> float:
    """Per cent of the prompts' tokens that a replica knew, after the first `warm`."""
    from models import Sampling

    read = known = 0
    for number, ids in enumerate(prompts):
        answer = replicas[pick(ids)].generate(ids, Sampling(max_tokens=1))
        if number >= warm:
            read += answer.prompt_tokens
            known += answer.cached_tokens
    return 100 * known / read


def compare_routing(
    names: Sequence[str],
    load: Callable[[], Model],
    prompts: Sequence[list[int]],
    warm: int,
) -> tuple[float, float]:
    """The `prefix_hits` by turns and by prefix, each on new engines."""
    hits = []
    for pick in (by_turns(names), by_prefix(names)):
        with ExitStack() as stack:  # nobody inherits a cache
            replicas = {name: stack.enter_context(load()) for name in names}
            hits.append(prefix_hits(replicas, prompts, pick, warm))
    return hits[0], hits[1]


def show_routing(
    run: Run,
    names: Sequence[str],
    load: Callable[[], Model],
    prompts: Sequence[list[int]],
    warm: int,
) -> float:
    """Prompt tokens known, by turns and by prefix; gives the points between them."""
    turns, routed = compare_routing(names, load, prompts, warm)
    run.fact("prompt tokens known, by turns", turns, "%")
    run.fact("prompt tokens known, by prefix", routed, "%")
    return routed - turns


# One false friend.


def semantic_table(rates: Sequence[semantic.Rates]) -> Table:
    """What a semantic cache finds and confuses, by threshold."""
    rows: list[list[Cell]] = [
        [rate.threshold, 100 * rate.right, 100 * rate.false] for rate in rates
    ]
    columns = [("threshold", "cosine"), ("paraphrases found", "%")]
    columns += [("opposites taken for them", "%")]
    pairs = f"{len(semantic.PARAPHRASES)} and {len(semantic.OPPOSITES)} pairs"
    return Table("A semantic cache", columns, rows, f"n = {pairs}")


def show_semantic(run: Run, model: Model) -> semantic.Rates:
    """The table of thresholds; gives the best of them, which is not good."""
    rates = semantic.trial(semantic.embedder(model.tokenizer))
    run.table(semantic_table(rates))
    return max(rates, key=lambda rate: (rate.right, -rate.false))


# Jobs, done by whatever does them.


def answered(
    jobs: Jobs,
    do: Callable[[Any], Any],
    payloads: Sequence[Any],
    deadline_s: float = 60,
) -> list[Status]:
    """Submit all, let one worker do them, and give what became of them."""
    ids, stop = [jobs.submit(payload) for payload in payloads], threading.Event()
    worker = threading.Thread(target=work, args=(jobs, do, stop))
    worker.start()
    try:
        wait_until(partial(ended, jobs, ids), deadline_s, f"{len(ids)} jobs to end")
    finally:
        stop.set()
        worker.join()
    return [status for id in ids if (status := jobs.get(id))]


def done_by(do: Callable[[Any], Any], payloads: Sequence[Any]) -> list[Status]:
    """What became of jobs in a queue that was made for them."""
    with TemporaryDirectory() as folder, SQLiteJobs(Path(folder) / "jobs") as jobs:
        return answered(jobs, do, payloads)


def show_jobs(run: Run, do: Callable[[Any], Any], payloads: Sequence[Any]) -> None:
    """How many were done, and what the last one said."""
    told = done_by(do, payloads)
    done = sum(one.state == "done" for one in told)
    run.fact(
        "jobs that the real model did",
        f"{done} of {len(told)}, the last: {told[-1].result!r}",
    )


def ended(jobs: Jobs, ids: Sequence[str]) -> bool:
    """Whether nobody will work on any of them again."""
    found = [jobs.get(id) for id in ids]
    return all(one is None or one.state not in ("waiting", "leased") for one in found)
