"""The dashboard in a terminal: a line a curve, its last minute as a sparkline."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from course.show import Table, console
from local_cloud.monitoring.live import EVERY_S, served
from local_cloud.monitoring.panels import Panel, SourceError, Watch, source

if TYPE_CHECKING:
    from rich.table import Table as RichTable

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # points of a sparkline
MOST_SCALE = 300.0
SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms")),
    "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
    "%": ((0.01, "%"),),
}


def say(value: float, unit: str) -> str:
    """A value with a unit of fitting size: 0.0173 s is 17.3 ms."""
    if not math.isfinite(value):
        return "-"
    scales = SCALES.get(unit, ((1.0, unit),))
    fitting = (pair for pair in scales if abs(value) >= pair[0])
    size, name = next(fitting, scales[-1])
    return (
        f"{value / size:.3g} {name}"
        if abs(value / size) < 100
        else (f"{value / size:,.0f} {name}")
    )


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """The last `width` values as bars from zero to their largest; a gap is blank."""
    kept = values[-width:]
    known = [value for value in kept if math.isfinite(value)]
    top, low = max([*known, 0.0]), min([*known, 0.0])
    span = (top - low) or 1.0
    return "".join(
        BARS[min(7, int(8 * (value - low) / span))] if math.isfinite(value) else " "
        for value in kept
    )


def rows(watch: Watch, width: int = WIDTH) -> list[tuple[str, str, str, str]]:
    """For each curve: panel, legend, its last minute, its value now."""
    return [
        (
            panel.title,
            legend,
            sparkline(values, width),
            say(values[-1] if values else math.nan, panel.unit),
        )
        for panel, legend, values in watch.current()
    ]


def table(watch: Watch, title: str, width: int = 30) -> Table:
    """The dashboard as a result that a lesson prints and keeps."""
    columns = ["panel", "curve", f"last {width} looks", "now"]
    return Table(title, columns, rows(watch, width), note=watch.fault)


def view(watch: Watch, address: str) -> RichTable:
    """The dashboard as it stands, for rich to draw; on top what is wrong, if so."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    drawn.title = Text(watch.fault or address, "bold red" if watch.fault else "dim")
    drawn.title_justify = "left"
    for name in ("Panel", "Curve", "Last minute"):
        drawn.add_column(name)
    drawn.add_column("Now", justify="right")
    before = ""
    for title, legend, line, now in rows(watch, _room()):
        name = "" if title == before else title
        drawn.add_row(Text(name, "bold"), Text(legend), Text(line, "cyan"), Text(now))
        before = title
    return drawn


def _room() -> int:
    """Columns that are left for the sparklines."""
    return max(10, min(WIDTH, console().width - 55))


def scale(text: str) -> float:
    """How much shorter windows are, from a command line."""
    number = float(text)
    if not 0 < number <= MOST_SCALE:
        raise argparse.ArgumentTypeError(
            f"expected more than 0 and at most {MOST_SCALE:g} (five minutes are a "
            f"second then), found {text}"
        )
    return number


def add_arguments(parser: argparse.ArgumentParser, scale_now: float) -> None:
    """The options of the lesson: what it does besides its sections."""
    add = parser.add_argument
    add("--deploy", action="store_true", help="write deploy/prometheus and grafana")
    add("--drift", action="store_true", help="with rules for an API that exports it")
    watch = "the dashboard of an API (METRICS_KEY_FILE: its key) or a Prometheus, live"
    add("--watch", metavar="URL", help=watch)
    what = "of its windows: 1 is production's (default: %(default)g)"
    add("--scale", type=scale, default=scale_now, help=what)


def show(url: str, panels: Sequence[Panel], looks: float = math.inf) -> int:
    """Draw the dashboard of an address, here and as a page, until Ctrl-C.

    Gives an exit code: 1 if nothing answers there.
    """
    from rich.live import Live as Screen

    try:
        watch = Watch(panels, source(url, panels))
    except SourceError as error:
        print(error, file=sys.stderr)
        return 1
    with suppress(KeyboardInterrupt), served(watch) as (page, _):
        address = f"{page} shows {watch.source.name}"
        with Screen(console=console(), auto_refresh=False) as screen:
            while True:
                screen.update(view(watch, address), refresh=True)
                if len(watch.points) >= looks:
                    break
                time.sleep(EVERY_S)
    return 0
