"""The whole drill: each fault with the time its alert was due, and the time it came.

Two minutes of good traffic first, which must page nobody and become the history of all
objectives. Then errors, latency, drift, a leak and a blip at one time, each behind an
edge and under a job of its own; then a server that is stopped; then one that is
overloaded. At scale 60: a minute of production passes in a second. Before all this,
how long promtool takes for the rules of production. It ends with 1 where a figure is
beyond its bar.

Run it:     python -m tests.benchmarks.drill                  about six minutes
            python -m tests.benchmarks.drill --quick          four and a half
            python -m tests.benchmarks.drill --portable       without Prometheus
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import monitoring_setup as course
from course import lesson
from course.measure import Series
from course.show import Table
from local_cloud.monitoring import drill, rule_tests, stack
from local_cloud.monitoring.drift import DriftCollector, Watch
from local_cloud.monitoring.ground import (
    LEAK_MIB_S,
    Ground,
    short_request,
)
from local_cloud.monitoring.rule_groups import MEMORY_BYTES
from local_cloud.monitoring.scrape import scrape
from tests.benchmarks import AFTER_LESSONS
from tests.benchmarks.bars import Bars

SCALE = 60.0
RATE = 2.0  # requests a second on each of the edges
CLEAN_S, QUICK_CLEAN_S = 120.0, 60.0
SHARES = {"errors-100": 1.0, "errors-50": 0.5, "errors-30": 0.3}
EDGES = {**dict.fromkeys(SHARES, "api"), "latency": "api", "blip": "api"}
EDGES |= {"drift": "api", "clean": "api", "stopped": "api-2"}
DELAY_S = 3.0  # more than the 2.5 s within which first tokens are promised
MIB = 1 << 20
DRIFT_JOB = "drift-watch"
SEED = 1
PROMTOOL_S, PROMTOOL_ROUNDS = 10.0, 3
BARS = Bars()


class Prompts:
    """What the traffic asks, and the drift that is watched in it: words a prompt."""

    def __init__(self) -> None:
        self.draw, self.long = random.Random(SEED), False
        baseline = [self.words(False) for _ in range(1000)]
        self.watch = Watch("prompt_words", baseline, course.psi)
        self.seen: deque[int] = deque(maxlen=self.watch.window)
        for value in baseline[-self.watch.window :]:  # the traffic of before
            self.observe(value)

    def words(self, long: bool) -> int:
        return self.draw.randint(8, 14) if long else self.draw.randint(2, 10)

    def observe(self, words: int) -> None:
        self.seen.append(words)
        self.watch.observe(words)

    def ask(self, job: str) -> dict[str, Any]:
        if job != "drift":
            return short_request(job)
        words = self.words(self.long)
        self.observe(words)
        return {**short_request(job), "prompt": " ".join(["weather"] * words)}

    def drift_s(self, limit: float, wait_s: float) -> float:
        """How long until the window has drifted, by playing it through."""
        draw, window = random.Random(SEED + 1), deque(self.seen, self.watch.window)
        for number in range(self.watch.window):
            score = course.psi(self.watch.baseline, self.watch.count(list(window)))
            if score > limit:
                return number / RATE + wait_s
            window.append(draw.randint(8, 14))
        return float("inf")


@contextmanager
def exported(watch: Watch) -> Iterator[str]:
    """The watch's metrics on a port of this machine; gives its address."""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(DriftCollector(watch))  # type: ignore[arg-type]
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def due_s(slo: int, share: float) -> Callable[[float], float]:
    """When an objective pages, by the history there is."""
    return lambda past: course.detection_s(course.SLOS[slo], share, SCALE, past)


def first_faults(ground: Ground, prompts: Prompts, history_s: float) -> list[Any]:
    """All that can be tried at one time."""
    minute = course.MINUTE_S / SCALE
    wait_s = 10 * minute  # as the rules for causes have it
    edge = ground.edges["latency"]
    third_s = due_s(0, 1.0)(history_s) / 3  # of the time until such errors page
    server = ground.servers["api-2"]
    used = scrape(server.url).total("process_resident_memory_bytes")
    leak = drill.leak_s(
        used, LEAK_MIB_S * MIB, MEMORY_BYTES, 60 * minute, 240 * minute, wait_s
    )
    fault = drill.Fault
    return [
        *(
            drill.errors(ground, j, share, due_s(0, share))
            for j, share in SHARES.items()
        ),
        drill.blip(ground, "blip", max(1, int(RATE * third_s)), due_s(0, 1.0)),
        fault(
            f"answers {DELAY_S:g} s late",
            "latency",
            "FirstTokenBurn",
            lambda past: DELAY_S + due_s(1, 1.0)(past),
            partial(edge.inject, delay_s=DELAY_S),
            edge.clear,
            struck=lambda: edge.injected,
        ),
        fault(
            f"leak, {LEAK_MIB_S:g} MiB/s",
            "api-2",
            "MemoryGrows",
            leak,
            server.leak,
            server.mend,
            severity="ticket",
        ),
        fault(
            "longer prompts (drift)",
            DRIFT_JOB,
            "InputDrift",
            lambda _: prompts.drift_s(prompts.watch.limit, wait_s),
            lambda: setattr(prompts, "long", True),
            lambda: setattr(prompts, "long", False),
            severity="ticket",
        ),
    ]


def later_faults(ground: Ground) -> Iterator[Any]:
    """Those that would show in everything else; one after the other."""
    minute = course.MINUTE_S / SCALE
    yield drill.freeze(ground, "stopped", due_s(0, 1.0))
    server = ground.servers["api-2"]
    yield drill.Fault(
        "overload, four times the rows",
        "api-2",
        "QueueGrows",
        lambda _: 2 * minute,
        server.overload,
        server.relieve,
        severity="ticket",
    )


def rules_tried(run: lesson.Run) -> None:
    """promtool, with all tests of the rules of production."""
    if missing := stack.found():
        raise lesson.Skip(missing, stack.INSTALL)
    run.predict(f"All of them take less than {PROMTOOL_S:g} s.")
    tests, times = course.rule_tests(), []
    own = [(g, [t for t in tests if t.group == g["name"]]) for g in course.groups()]
    for _ in range(PROMTOOL_ROUNDS):
        began = time.perf_counter()
        outcomes = rule_tests.run(own)
        times.append(time.perf_counter() - began)
    told = Series(tuple(times))
    columns = ["promtool", "tests", ("median", "s"), ("spread", "s"), "n"]
    row = ["rules of production", len(tests), told.median, told.spread, told.n]
    run.table(Table("The rules' own tests", columns, [row]))
    failed = sum(not outcome.passed for outcome in outcomes)
    BARS.most("groups of rules that promtool objects to", failed, 0)
    BARS.most("promtool", told.median, PROMTOOL_S, "s")
    run.conclude(
        f"{len(tests)} tests take {told.median:.1f} s (bar: {PROMTOOL_S:g}); {failed} "
        "groups fail theirs (bar: 0)."
    )


def whole_drill(run: lesson.Run) -> None:
    """Good traffic, then everything that can go wrong."""
    if not run.arguments.portable and (missing := stack.found()):
        run.skip(missing, stack.INSTALL)
    clean_s = QUICK_CLEAN_S if run.quick else CLEAN_S
    prompts = Prompts()
    options = {"portable": run.arguments.portable, "ask": prompts.ask, "rate": RATE}
    groups = course.groups(SCALE)
    with (
        exported(prompts.watch) as address,
        Ground(
            groups,
            EDGES,
            scale=SCALE,
            more={DRIFT_JOB: address},
            edges_s=(2.5,),
            **options,
        ) as ground,
    ):
        begun = time.monotonic()
        with run.progress("good traffic", clean_s) as advance:
            for _ in range(round(clean_s)):
                time.sleep(1)
                advance()
        false = [one for one in ground.notifications if one.severity == "page"]
        run.fact(f"false pages in {clean_s:g} s of good traffic", len(false))
        for one in {f"{one.job}: {one.summary}": one for one in false}:
            run.say(one)
        faults = first_faults(ground, prompts, time.monotonic() - begun)
        outcomes = drill.run(ground, faults, time.monotonic() - begun)
        ratio = f'{course.ratio_name(6 * course.HOUR_S)}{{slo="availability"}}'
        burning = [one for one in outcomes if one.fault.job in {*SHARES, "blip"}]
        curves = drill.burn_curves(ground, burning, ratio, course.SLOS[0].budget)
        for fault in later_faults(ground):
            outcomes += drill.run(ground, [fault], time.monotonic() - begun)
            ground.servers["api-2"].restore()
        clean = drill.pages(ground.notifications, "clean")
        untouched = ground.edges["clean"]
        counted = scrape(untouched.url).total(course.HTTP)
    by = type(ground.watch).__name__
    run.table(drill.table(outcomes, f"The drill at scale {SCALE:g}, watched by {by}"))
    limit = 6  # with so short a past the pair of the longer windows fires first
    run.picture(
        partial(drill.draw, curves=curves, outcomes=outcomes, limit=limit), "burn"
    )
    run.fact("pages for the job without a fault, in the whole drill", len(clean))
    # A machine that is too busy, or stopped for others, fails without being asked to.
    bad = 1 - untouched.answered / counted
    run.fact("of its requests, answered badly or too late", 100 * bad, "%")
    good = sum(one.good for one in outcomes)
    BARS.most("faults that did not go as promised", len(outcomes) - good, 0)
    BARS.most("false pages in good traffic", len(false), 0)
    BARS.most("pages for the job without a fault", len(clean), 0)
    run.conclude(
        f"{good} of {len(outcomes)} went as promised (bar: all), with {len(false)} "
        f"false pages in {clean_s:g} s of good traffic (bar: 0)."
    )


SECTIONS = [
    lesson.Section("The rules' own tests", rules_tried),
    lesson.Section("The whole drill", whole_drill),
]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    BARS.missed.clear()
    code = lesson.run(
        doc=__doc__,
        sections=SECTIONS,
        argv=argv,
        number=AFTER_LESSONS,
        add_arguments=add_arguments,
    )
    return BARS.code(code)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--portable", action="store_true", help="watch with the portable evaluator"
    )


if __name__ == "__main__":
    raise SystemExit(main())
