"""Bills: how long a deployment that sleeps is up, the table and the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from course import draw
from course.show import Table
from local_cloud.fireworks.prices import FP8_SAVES, UP_TO_4B, PerToken, Tokens
from local_cloud.fireworks.traffic import Hour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_PER_HOUR, MOST_PER_HOUR = 1e4, 1e7  # calls; the ends of the picture


def awake(times: Sequence[float], sleep_s: float) -> tuple[float, int]:
    """Seconds that one replica is up for calls at these times, and how often it wakes.

    It wakes for a call that finds it asleep, sleeps after `sleep_s` without one, and is
    billed from when it can serve: booting is not billed, and so is not in here.
    """
    up_s, wakes, sleeps_at = 0.0, 0, -1.0
    for time in times:
        if time > sleeps_at:
            wakes += 1
            up_s += sleep_s
        else:
            up_s += time + sleep_s - sleeps_at
        sleeps_at = time + sleep_s
    return up_s, wakes


def table(
    told: Mapping[str, Mapping[str, float]], day: Sequence[Hour], a_call: Tokens
) -> Table:
    """The bill of a day: a row for each way to pay, a column for each model."""
    ways = next(iter(told.values()))
    rows = [[way, *(bill[way] for bill in told.values())] for way in ways]
    saves = "{:.0%} to {:.0%}".format(*FP8_SAVES)
    note = (
        f"{sum(h.calls for h in day):,} calls in a day (the course's is generated), "
        f"each {a_call.prompt} tokens read, {a_call.cached} of them cached, "
        f"{a_call.completion} written: measured, in the shared model's tokens.\n"
        f"Prices: local_cloud/fireworks/prices.py. FP8 ({saves} less cost, says the "
        "service; not measured) changes no row: one replica is the least there is."
    )
    columns = ["way", *((name, "dollars/day") for name in told)]
    return Table("The bill of a day", columns, rows, note)


def break_even_picture(
    prices: Mapping[str, PerToken], a_call: Tokens, usd_per_hour: float, busiest: float
) -> Callable[[Axes], None]:
    """What draws it: a call at each of these prices, and the small model's by batch."""
    calls_usd = {name: a_call.dollars(price) for name, price in prices.items()}
    calls_usd["up to 4B, by batch"] = a_call.dollars(UP_TO_4B, known=False, batch=True)
    return partial(
        draw_break_even,
        calls_usd=calls_usd,
        usd_per_hour=usd_per_hour,
        busiest=busiest,
    )


def draw_break_even(
    axes: Axes,
    calls_usd: Mapping[str, float],
    usd_per_hour: float,
    busiest: float,
) -> None:
    """Dollars an hour over calls an hour, both logarithmic.

    Args:
        axes: where to draw.
        calls_usd: dollars a call, for each way to pay by the token.
        usd_per_hour: of a GPU of one's own.
        busiest: calls in the busiest hour of the day.
    """
    ends = [LEAST_PER_HOUR, MOST_PER_HOUR]
    axes.plot(ends, [usd_per_hour] * 2, color=draw.COLOURS[0], label="one GPU, on")
    axes.axvline(busiest, color=draw.INK, linewidth=1, label="the day's busiest hour")
    styles = zip(draw.COLOURS[1:], draw.DASHES, draw.MARKERS, strict=True)
    for (name, usd), (colour, dash, mark) in zip(
        calls_usd.items(), styles, strict=False
    ):
        even = usd_per_hour / usd
        label = f"{name}: equal at {even:,.0f}"
        axes.plot(ends, [usd * x for x in ends], dash, color=colour)
        axes.plot([even], [usd_per_hour], mark, color=colour)
        axes.plot([], [], dash, marker=mark, color=colour, label=label)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("calls an hour (whether one GPU can answer so many: measure it)")
    axes.set_ylabel("US dollars an hour")
    axes.set_title("From where on a GPU of one's own pays")
    axes.legend(loc="lower right")
