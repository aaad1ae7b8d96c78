"""The power tuner: one function at several memory sizes, and what each costs.

Memory buys CPU in proportion. So more of it may cost nothing, as long as the time it
saves is worth its price; past one whole CPU it buys a second one, which only helps who
can use two. Where that is so can be measured only, on the function itself.

The choices are those of aws-lambda-power-tuning: cheapest, fastest, or balanced. What
it reads are REPORT lines, so that logs of the real Lambda serve as well:

    tuning = Tuning.of(reports_in(Path("cloudwatch.log").read_text()))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from course import draw
from course.show import Table
from local_cloud.functions import costs
from local_cloud.functions.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

    from local_cloud.functions import Function, Platform

SIZES_MB = (128, 256, 512, 1024, 1769, 3008)
CALLS = 10  # measured at each size, after the one that starts cold
MILLION = 1_000_000


class TuningError(ValueError):
    """Nothing could be measured: expected, found, do."""


@dataclass(frozen=True)
class Point:
    """One memory size; medians of its warm calls, one request in a sandbox each."""

    memory_mb: int
    duration_ms: float
    billed_ms: float
    max_memory_mb: int
    calls: int
    usd_per_million: float


@dataclass(frozen=True)
class Tuning:
    """All sizes that worked, by memory, and why the others did not."""

    points: tuple[Point, ...]
    failed: dict[int, str]  # memory in MB: what happened there

    @classmethod
    def of(
        cls,
        reports: Iterable[Report],
        price: costs.FunctionPrice = costs.LAMBDA_X86,
    ) -> Tuning:
        """Sorts reports by memory; raises TuningError where no size has worked.

        Cold calls are left out: how many there are is a matter of traffic, not of
        memory. One failed call fails its size.
        """
        sizes: dict[int, list[Report]] = {}
        for report in reports:
            sizes.setdefault(report.memory_mb, []).append(report)
        points, failed = [], {}
        for memory_mb, all_of_it in sorted(sizes.items()):
            bad = [report.status for report in all_of_it if report.status != "success"]
            warm = [r for r in all_of_it if r.init_ms is None and r.restore_ms is None]
            if bad or not warm:
                failed[memory_mb] = bad[0] if bad else "no warm call"
            else:
                points.append(point(warm, price))
        if not points:
            raise TuningError(
                f"Expected a memory size at which the function works, found {failed}. "
                "Choose larger sizes, or read what the function wrote."
            )
        return cls(tuple(points), failed)

    @property
    def cheapest(self) -> Point:
        return min(self.points, key=lambda p: (p.usd_per_million, p.duration_ms))

    @property
    def fastest(self) -> Point:
        return min(self.points, key=lambda p: (p.duration_ms, p.usd_per_million))

    def balanced(self, cost_weight: float = 0.5) -> Point:
        """The least weighted sum of cost and time, each as a share of the worst."""
        if not 0 <= cost_weight <= 1:
            raise TuningError(
                f"cost_weight: expected 0 to 1, found {cost_weight}; 1 is the cheapest."
            )
        dearest = max(p.usd_per_million for p in self.points)
        slowest = max(p.duration_ms for p in self.points)

        def burden(p: Point) -> float:
            cost, time = p.usd_per_million / dearest, p.duration_ms / slowest
            return cost_weight * cost + (1 - cost_weight) * time

        return min(self.points, key=burden)


def point(warm: Sequence[Report], price: costs.FunctionPrice) -> Point:
    """What the reports of one memory size say together."""
    memory_mb, billed_ms = warm[0].memory_mb, median(r.billed_ms for r in warm)
    return Point(
        memory_mb=memory_mb,
        duration_ms=median(r.duration_ms for r in warm),
        billed_ms=billed_ms,
        max_memory_mb=max(r.max_memory_mb for r in warm),
        calls=len(warm),
        usd_per_million=costs.lambda_cost(
            MILLION, MILLION * billed_ms / 1000, memory_mb, price
        ),
    )


def tune(
    cloud: Platform,
    function: Function,
    payload: Any,
    *,
    sizes_mb: Sequence[int] = SIZES_MB,
    calls: int = CALLS,
    price: costs.FunctionPrice = costs.LAMBDA_X86,
    on_call: Callable[[], object] = lambda: None,
) -> Tuning:
    """Deploys the function at each size and calls it, one call after the other.

    A size at which the platform ends a call (time, memory) is left at once. The
    function stays deployed at the last size.

    Raises:
        TuningError: the function itself refuses the payload, or no size works.
    """
    reports: list[Report] = []
    for memory_mb in sizes_mb:
        cloud.deploy(replace(function, memory_mb=memory_mb))
        for _ in range(1 + calls):
            result = cloud.invoke(function.name, payload)
            reports.append(result.report)
            on_call()
            if result.report.status != "success":
                break
            if result.error:
                raise TuningError(
                    f"Expected {function.name} to answer the payload, found "
                    f"{result.payload[:200]!r}. Tune with a payload that it answers."
                )
    return Tuning.of(reports, price)


def reports_in(log: str) -> list[Report]:
    """The REPORT lines of a log, whatever stands between them."""
    return [
        Report.parse(line[line.index("REPORT RequestId:") :])
        for line in log.splitlines()
        if "REPORT RequestId:" in line
    ]


def table(tuning: Tuning) -> Table:
    """The sizes that worked; below, why the others did not."""
    columns = [("memory", "MB"), ("duration", "ms"), ("billed", "ms")]
    columns += [("used", "MB"), ("a million calls", "USD")]
    rows = [
        [p.memory_mb, p.duration_ms, p.billed_ms, p.max_memory_mb, p.usd_per_million]
        for p in tuning.points
    ]
    failed = ", ".join(f"{mb} MB: {why}" for mb, why in tuning.failed.items())
    return Table("Power tuning, medians of warm calls", columns, rows, failed)


def draw_curve(time_axis: Axes, cost_axis: Axes, tuning: Tuning) -> None:
    """Draws time and cost over memory, side by side (panels=2); marks the best."""
    memory = [p.memory_mb for p in tuning.points]
    curves = {
        time_axis: ("duration_ms", "duration (ms)", tuning.fastest, "fastest"),
        cost_axis: (
            "usd_per_million",
            "US dollars a million",
            tuning.cheapest,
            "cheapest",
        ),
    }
    for ax, (what, unit, best, name) in curves.items():
        values = [getattr(p, what) for p in tuning.points]
        draw.lines(ax, {what: (memory, values)}, x="memory (MB)", y=unit, log_x=True)
        ax.set_ylim(top=1.12 * max(values))
        height = getattr(best, what)
        ax.plot(best.memory_mb, height, "o", color=draw.COLOURS[1], markersize=12)
        ax.annotate(
            f"{name}: {best.memory_mb:,} MB",
            (best.memory_mb, height),
            (0, 14),
            textcoords="offset points",
            ha="center",
        )
    balanced = tuning.balanced()
    cost_axis.set_title(f"balanced: {balanced.memory_mb:,} MB")
