"""A simulated day: its traffic, what fleets make of it, and what they cost.

A fleet is right when it is the cheapest that keeps its promise, so every figure here
stands beside the `Terms` that it is judged by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from course import draw
from course.show import Cell, Table
from local_cloud.scaling import traffic
from local_cloud.scaling.planning import cheapest, cost_per_1000
from local_cloud.scaling.policies import Picker
from local_cloud.scaling.simulator import Fleet, Trace, simulate
from local_cloud.scaling.traffic import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from course.lesson import Run

MOST = 64  # replicas that a fleet that never changes may have


@dataclass(frozen=True)
class Terms:
    """What is promised, and what is paid; dollars."""

    promise_s: float  # p95 from arrival to end
    price_hour: float  # a replica
    price_overflow: float = 0.0  # a request that is served elsewhere

    def per_1000(self, trace: Trace) -> float:
        """What a thousand requests cost."""
        return cost_per_1000(trace, self.price_hour, self.price_overflow)


def arrivals(seed: int, day_s: float) -> Floats:
    """Few requests at midnight, many at noon, and bursts at any hour."""
    rng = np.random.default_rng(seed)
    calm = traffic.daily(rng, 1, 20, day_s)
    burst = traffic.bursts(rng, 0, 20, 1770, 30, day_s)
    return np.sort(np.concatenate([calm, burst]))


def services(seed: int, mean_s: float, requests: int) -> Floats:
    """How long each takes; a stream of its own, or it would repeat the arrivals'."""
    rng = np.random.default_rng([seed, 1])
    return traffic.lognormal(rng, mean_s, 1.0, requests)


def show(
    run: Run, fleets: Mapping[str, Trace], drawn: Sequence[str], terms: Terms
) -> None:
    """The day's table, and a picture of the fleets of some names."""
    run.table(table(fleets, terms))
    run.picture(partial(draw_day, {name: fleets[name] for name in drawn}), "day")


def table(fleets: Mapping[str, Trace], terms: Terms) -> Table:
    """What each fleet made of the day."""
    rows: list[list[Cell]] = []
    for name, trace in fleets.items():
        mean, p95_s = trace.replica_s / float(trace.ends.max()), trace.quantile(0.95)
        row = [name, mean, 100 * trace.utilisation, trace.quantile(0.5), p95_s]
        kept = "yes" if p95_s <= terms.promise_s else "no"
        rows.append([*row, kept, terms.per_1000(trace)])
    columns = ["fleet", ("replicas, mean", ""), ("busy", "%"), ("p50", "s")]
    columns += [("p95", "s"), "promise kept", ("1,000 requests", "$")]
    count = len(next(iter(fleets.values())).arrivals)
    note = f"simulated; n = {count:,} requests; promise: p95 <= {terms.promise_s:g} s"
    return Table("A day", columns, rows, note)


def draw_day(traces: Mapping[str, Trace], axes: Axes) -> None:
    """Replicas over the day beside the work that came."""
    one = next(iter(traces.values()))
    edges = np.arange(0, one.arrivals[-1] + 60, 60)
    brought = np.histogram(one.arrivals, edges, weights=one.ends - one.starts)[0] / 60
    axes.fill_between(
        edges[:-1] / 3600, brought, color="#dddddd", label="work (Erlang)"
    )
    for (name, trace), colour in zip(traces.items(), draw.COLOURS, strict=False):
        hours = [tick.load.time_s / 3600 for tick in trace.ticks]
        ready = [tick.load.ready for tick in trace.ticks]
        axes.step(hours, ready, label=name, color=colour, linewidth=1.2)
    axes.set_title("Replicas that serve")
    axes.set_xlabel("time (h)")
    axes.set_ylabel("replicas")
    axes.set_ylim(0, 46)
    axes.legend(loc="upper right", ncols=3)


def show_cheapest(
    run: Run, picker: Callable[[], Picker], steady: tuple[Floats, Floats], terms: Terms
) -> None:
    """The cheapest fleet for a load, and what one replica less would do."""

    def simulated(replicas: int) -> Trace:
        return simulate(*steady, Fleet(replicas), picker())

    plan = cheapest(simulated, terms.promise_s, terms.price_hour, most=MOST)
    if plan is None:
        run.fact(f"replicas for a p95 of {terms.promise_s:g} s", f"more than {MOST}")
        return
    n, what = plan.replicas, f"steady load, promise {terms.promise_s:g} s"
    if n > 1:
        less = simulated(n - 1).quantile(0.95)
        told = f"{less:.2f} and {plan.p95_s:.2f} s"
        run.fact(f"p95 with {n - 1} and {n} replicas, {what}", told)
    name = f"the cheapest fleet that keeps it: {n} replicas; 1,000 requests cost"
    run.fact(name, plan.per_1000, "$")
