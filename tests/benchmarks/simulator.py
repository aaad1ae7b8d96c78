"""The simulator: how fast it is, and how far from what is known without it.

A thousand replicas at 90 % load, 50 ms a request: every way of balancing beside its
formula, with the requests simulated a second. Then one queue of several sizes beside
Erlang's formula, caches beside Che's, and the lesson's autoscalers on one day.

Run it:     python -m tests.benchmarks.simulator [--quick]       about a minute
"""

from __future__ import annotations

import time
from collections import OrderedDict

import numpy as np

from course import lesson
from course.show import Cell, Table
from local_cloud.scaling import day, theory, traffic
from local_cloud.scaling.planning import cost_per_1000
from local_cloud.scaling.policies import Picker
from local_cloud.scaling.simulator import Fleet, Trace, simulate
from local_cloud.scaling.traffic import Floats
from scaling_strategies import DAY_S, FLEET, PICKERS, SCALERS, SEED, live_through
from tests.benchmarks import AFTER_LESSONS

REQUESTS, QUICK_REQUESTS = 4_000_000, 600_000
BAR = 100_000  # requests simulated a second
BATCHES = 30
REPLICAS, RHO, MEAN_S = FLEET.replicas, FLEET.rho, FLEET.mean_s


def timed(
    load: tuple[Floats, Floats], fleet: Fleet, picker: Picker | None
) -> tuple[Trace, float]:
    """A simulation and the requests it did in a second."""
    start = time.perf_counter()
    trace = simulate(*load, fleet, picker)
    return trace, len(load[0]) / (time.perf_counter() - start)


def balancing(run: lesson.Run) -> None:
    """Each way of choosing a replica, beside its formula."""
    requests = QUICK_REQUESTS if run.quick else REQUESTS
    run.predict("Each additional look at the replicas saves less than the one before.")
    rng = np.random.default_rng(SEED)
    load = traffic.steady(rng, REPLICAS, RHO, MEAN_S, requests)
    rows: list[list[Cell]] = []
    speeds: dict[str, float] = {}
    with run.progress("balancing", len(PICKERS)) as advance:
        for name, make in PICKERS.items():
            trace, speeds[name] = timed(load, Fleet(REPLICAS), make())
            trace = trace.after(requests // 3)
            mean, formula = 1000 * trace.mean_s, FLEET.known_s()[name]
            known = formula and 1000 * formula
            off = 100 * (mean / known - 1) if known else None
            p95, p99 = (1000 * trace.quantile(share) for share in (0.95, 0.99))
            rows.append([name, known, mean, off, p95, p99, round(speeds[name])])
            advance()
    columns = ["balancing", ("theory", "ms"), ("simulation", "ms"), ("off", "%")]
    columns += [("p95", "ms"), ("p99", "ms"), ("speed", "requests/s")]
    note = (
        f"{REPLICAS} replicas, {RHO:.0%} load, exponential {1000 * MEAN_S:g} ms; "
        f"n = {requests:,}, the first third not counted"
    )
    run.table(Table("From arrival to end, mean", columns, rows, note))
    name, slowest = min(speeds.items(), key=lambda item: item[1])
    run.conclude(
        f"The slowest, {name}, simulates {slowest:,.0f} requests/s (bar: {BAR:,})."
    )


def one_queue(run: lesson.Run) -> None:
    """M/M/c of several sizes beside Erlang-C, and how much of the distance is luck."""
    requests = QUICK_REQUESTS if run.quick else REQUESTS
    rows: list[list[Cell]] = []
    told: list[tuple[float, float]] = []
    sizes = [(1, 0.5), (1, 0.8), (2, 0.7), (5, 0.8), (20, 0.8), (100, 0.95)]
    with run.progress("one queue", len(sizes)) as advance:
        for servers, rho in sizes:
            rng = np.random.default_rng(SEED)
            load = traffic.steady(rng, servers, rho, MEAN_S, requests)
            waits = simulate(*load, Fleet(servers), None).after(requests // 10).waits
            known = theory.mmc_wait(servers, servers * rho, MEAN_S)
            p99 = theory.mmc_wait_quantile(servers, servers * rho, MEAN_S, 0.99)
            apart = 100 * (float(waits.mean()) / known - 1)
            luck = 100 * standard_error(waits) / known
            told.append((abs(apart), luck))
            found = 1000 * float(waits.mean()), 1000 * float(np.quantile(waits, 0.99))
            row = [servers, rho, 1000 * known, found[0], apart, luck]
            rows.append([*row, requests * luck**2 / 1e6, 1000 * p99, found[1]])
            advance()
    columns = [("servers", ""), ("load", ""), ("mean, theory", "ms")]
    columns += [("simulation", "ms"), ("apart", "%"), ("standard error", "%")]
    columns += [("for 1 %", "million requests"), ("p99, theory", "ms")]
    columns += [("simulation", "ms")]
    note = f"n = {requests:,}, the first tenth not counted; {BATCHES} batch means"
    run.table(Table("Wait in one queue (M/M/c)", columns, rows, note))
    sure = [apart for apart, luck in told if luck <= 1]
    worst = max(apart / luck for apart, luck in told)
    run.conclude(
        f"Where the standard error is at most 1 %, at most {max(sure, default=0):.1f} "
        f"% from Erlang-C (bar: 2 %); anywhere at most {worst:.1f} standard errors. "
        "The fuller and larger a fleet, the more its waits resemble those just before, "
        f"and the more requests one percent takes: at last {rows[-1][6]:.0f} million."
    )


def standard_error(values: Floats) -> float:
    """Of the mean of values that resemble their neighbours, by batch means.

    Batches much longer than the resemblance reaches (some 2,000 requests at 100 servers
    and 95 % load) have means that are independent. Source: A. Law, Simulation Modeling
    and Analysis, 2015, 9.5.3.
    """
    whole = len(values) // BATCHES * BATCHES
    means = values[:whole].reshape(BATCHES, -1).mean(axis=1)
    return float(means.std(ddof=1) / np.sqrt(BATCHES))


def caches(run: lesson.Run) -> None:
    """LRU hit rates beside Che's approximation."""
    requests = QUICK_REQUESTS if run.quick else REQUESTS // 2
    rows: list[list[Cell]] = []
    apart: list[float] = []
    cases = [(skew, size) for skew in (0.7, 1.0, 1.3) for size in (10, 100, 1000)]
    with run.progress("caches", len(cases)) as advance:
        for skew, size in cases:
            popularity = 1 / np.arange(1, 10_001) ** skew
            known = theory.che_hit_rate(popularity, size)
            found = lru(popularity, size, requests)
            apart.append(abs(known - found))
            rows.append([skew, size, known, found, apart[-1]])
            advance()
    columns = [("Zipf exponent", ""), ("cache", "items"), ("Che", "")]
    columns += [("simulated LRU", ""), ("apart", "")]
    note = f"10,000 items, n = {requests:,}, the first tenth not counted"
    run.table(Table("Hit rate", columns, rows, note))
    run.conclude(f"At most {max(apart):.4f} apart (bar: 0.002).")


def lru(popularity: Floats, size: int, requests: int) -> float:
    """The hit rate of a real LRU cache for independent requests."""
    rng = np.random.default_rng(SEED)
    asked = rng.choice(len(popularity), requests, p=popularity / popularity.sum())
    cache: OrderedDict[int, None] = OrderedDict()
    hits, warm = 0, requests // 10
    for i, item in enumerate(asked.tolist()):
        if item in cache:
            cache.move_to_end(item)
            hits += i >= warm
        else:
            cache[item] = None
            if len(cache) > size:
                cache.popitem(last=False)
    return hits / (requests - warm)


def autoscaling(run: lesson.Run) -> None:
    """The lesson's day, to fixed fleets and to the three autoscalers."""
    arrivals = day.arrivals(SEED, DAY_S)
    rows: list[list[Cell]] = []
    with run.progress("autoscaling", len(SCALERS)) as advance:
        for name in SCALERS:
            trace = live_through(arrivals, name)
            most = max((t.load.ready for t in trace.ticks), default=SCALERS[name][0])
            mean = trace.replica_s / DAY_S
            p50, p95, p99 = (trace.quantile(share) for share in (0.5, 0.95, 0.99))
            row = [name, mean, most, 100 * trace.utilisation, p50, p95, p99]
            rows.append([*row, cost_per_1000(trace, price_hour=1.0)])
            advance()
    columns = ["fleet", ("replicas, mean", ""), ("most", ""), ("busy", "%")]
    columns += [("p50", "s"), ("p95", "s"), ("p99", "s"), ("cost of 1,000", "prices/h")]
    run.table(Table("One day", columns, rows, f"n = {len(arrivals):,}"))


SECTIONS = [
    lesson.Section("Balancing", balancing),
    lesson.Section("One queue", one_queue),
    lesson.Section("Caches", caches),
    lesson.Section("Autoscaling", autoscaling),
]


def main(argv: list[str] | None = None) -> int:
    """Simulate, compare and print the tables."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
