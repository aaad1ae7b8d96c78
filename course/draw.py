"""Pictures in one style: labelled axes with units, no decoration, 1000 pixels wide.

The colours are Okabe and Ito's, told apart by colour-blind readers; markers and
dashes differ too, so a grey print still reads.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course.show import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 100  # pixels an inch: 10 inches make 1000 pixels
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", "-", "--", "-.")
INK, FAINT = "#222222", "#dddddd"

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: no search, no warning
    "font.size": 12,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "figure.constrained_layout.w_pad": 0.12,  # inches
    "figure.constrained_layout.h_pad": 0.12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": FAINT,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def picture(
    path: str | Path,
    draw: Callable[..., None],
    *,
    size: tuple[float, float] = (10, 5.6),
    panels: int = 1,
) -> Path:
    """Draws a PNG of `size` inches (100 pixels each); gives back its path.

    `draw` gets the axes, as many as there are panels, side by side.
    """
    # Its log says that it builds a font cache, once, on the very first use.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)  # no pyplot: no window, no state, any thread
        draw(*figure.subplots(1, panels, squeeze=False)[0])
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            half = Path(beside) / path.name
            figure.savefig(half, format="png")
            half.replace(path)
    return path


def lines(
    ax: Axes,
    series: Mapping[str, Sequence[Sequence[float]]],
    *,
    x: str,
    y: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = True,
) -> None:
    """Draws named curves; each is (xs, ys) or (xs, ys, lows, highs) with a band.

    `x` and `y` name the axes, with their units: "clients", "time to first token (ms)".
    `log_x` is for counts that double: the measured counts themselves become the ticks.
    """
    for i, (name, (xs, ys, *band)) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        marker, dash = MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)]
        ax.plot(xs, ys, dash, color=colour, marker=marker, label=name)
        if band:
            low, high = band
            ax.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    if log_x:
        ticks = sorted({value for xs, *_ in series.values() for value in xs})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [number(tick) for tick in ticks], minor=False)
        ax.set_xticks([], minor=True)
    if log_y:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    elif from_zero:
        ax.set_ylim(bottom=0)
    _label(ax, x, y, title)
    if len(series) > 1:
        ax.legend(loc="best")


def bars(
    ax: Axes,
    values: Mapping[str, float],
    *,
    x: str,
    title: str = "",
    errors: Mapping[str, tuple[float, float]] | None = None,
    highlight: str | None = None,
) -> None:
    """Draws horizontal bars, first on top, each with its value; `x` names the axis.

    `errors` gives (low, high) bounds by name; `highlight` names the one bar in the
    second colour.
    """
    names = list(values)
    widths = [values[name] for name in names]
    colours = [COLOURS[1] if name == highlight else COLOURS[0] for name in names]
    drawn = ax.barh(names, widths, color=colours, height=0.62)
    bounds = errors or {}
    for place, name in enumerate(names):
        if name in bounds:
            ax.plot(bounds[name], [place, place], color=INK, linewidth=1.5)
    ends = [max([values[name], *bounds.get(name, ())]) for name in names]
    # The label stands behind the bar, or behind the whisker where that reaches on.
    for bar, value, end in zip(drawn, widths, ends, strict=True):
        height = bar.get_y() + bar.get_height() / 2
        ax.annotate(
            number(value),
            (end, height),
            (6, 0),
            textcoords="offset points",
            va="center",
        )
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.tick_params(axis="y", length=0)
    ax.margins(x=0.12)
    _label(ax, x, "", title)


def _label(ax: Axes, x: str, y: str, title: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if title:
        ax.set_title(title)
