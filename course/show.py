"""What a lesson writes to the terminal: prose, labelled lines, tables, progress.

Everything works in a terminal and in a pipe. In a pipe there is no colour and no
width to respect, so nothing is cut: prose wraps at `PROSE`, a table is as wide as it
needs to be.
"""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Cell = str | int | float | bool | None

PIPE_WIDTH = 100  # columns assumed where no terminal says how many there are
PROSE = 92  # columns of a line of text; longer ones are hard to read
LABEL = 12  # columns of the label before a labelled line


@dataclass(frozen=True)
class Column:
    """A table's column: its name and the unit of everything in it."""

    name: str
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """A measured result: every column with its unit, numbers left as numbers.

    A column may be given as "name", ("name", "unit") or `Column`.
    """

    title: str
    columns: Sequence[str | tuple[str, str] | Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Expected {len(self.columns)} cells in each row of "
                    f"{self.title!r}, found {len(row)}: {list(row)!r}."
                )

    def headings(self) -> list[Column]:
        """The columns, each as a `Column`."""
        return [_column(column) for column in self.columns]

    def cells(self) -> list[list[str]]:
        """The rows as text; the numbers of a column share their decimals."""
        columns = [
            _column_text([row[i] for row in self.rows])
            for i in range(len(self.columns))
        ]
        return [list(row) for row in zip(*columns, strict=True)]

    def numeric(self) -> list[bool]:
        """Which columns hold numbers only, and so are set flush right."""
        return [
            all(_is_numeric(row[i]) for row in self.rows)
            for i in range(len(self.columns))
        ]

    def as_json(self) -> dict[str, Any]:
        """The table as JSON values, numbers at full precision."""
        return {
            "title": self.title,
            "columns": [{"name": c.name, "unit": c.unit} for c in self.headings()],
            "rows": [[plain(cell) for cell in row] for row in self.rows],
            "note": self.note,
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Table:
        """The table that `as_json` wrote."""
        columns = [Column(c["name"], c["unit"]) for c in saved["columns"]]
        return cls(saved["title"], columns, saved["rows"], saved.get("note", ""))


def _column(column: str | tuple[str, str] | Column) -> Column:
    if isinstance(column, Column):
        return column
    return Column(column) if isinstance(column, str) else Column(*column)


def plain(value: Any) -> Cell:
    """A value JSON can hold: numpy scalars unwrapped, what is not finite None."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def number(value: Cell, decimals: int | None = None) -> str:
    """A value for people: 12,345 or 12.3; three significant digits by default."""
    value = plain(value)
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if decimals is None:
        decimals = max(0, min(9, 2 - _magnitude(value)))
    return f"{value:,.{decimals}f}"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def _is_numeric(cell: Cell) -> bool:
    """Whether a cell reads as a number, `12.3 (n=5)` included."""
    if isinstance(cell, str):
        return cell[:1].isdigit() or cell[:2] in ("-", "< ", "> ")
    return not isinstance(cell, bool)


def _column_text(cells: Sequence[Cell]) -> list[str]:
    """The cells of one column, with the decimals its numbers need in common."""
    values = [plain(cell) for cell in cells]
    sizes = [_magnitude(v) for v in values if isinstance(v, float) and v]
    if not sizes or max(sizes) - min(sizes) > 3:  # too far apart for one format
        return [number(v) for v in values]
    near = max(sizes) - min(sizes) < 2  # else the large would look too exact
    decimals = max(0, (2 if near else 1) - min(sizes))
    return [number(v, decimals) for v in values]


@cache
def _console() -> Console:
    from rich.console import Console

    # No guessing: square brackets and colons in a model's answer are text.
    return Console(markup=False, emoji=False, highlight=False)


def console() -> Console:
    """The one console, set to the width of the terminal, or `PIPE_WIDTH`."""
    shared = _console()
    wide = shutil.get_terminal_size((PIPE_WIDTH, 25)).columns
    shared.width = wide if shared.is_terminal else max(wide, PIPE_WIDTH)
    return shared


def is_terminal() -> bool:
    """Whether standard output is a terminal that shows colours and bars."""
    return console().is_terminal


def _print(renderable: RenderableType) -> None:
    """Prints; in a pipe as wide as needed and without blanks at the line ends."""
    from rich.measure import Measurement

    target = console()
    if target.is_terminal:
        target.print(renderable)
        return
    target.width = 10_000
    need = Measurement.get(target, target.options, renderable).maximum
    target.width = max(PIPE_WIDTH, min(need, target.width))
    with target.capture() as captured:
        target.print(renderable)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    target.out("\n".join(lines))


def _wrapped(text: str, indent: int = 0) -> str:
    width = max(20, min(console().width, PROSE) - indent)
    paragraphs = [
        textwrap.fill(line, width, break_on_hyphens=False, break_long_words=False)
        for line in text.splitlines()
    ]
    return textwrap.indent("\n".join(paragraphs), " " * indent).strip()


# Every block ends with an empty line, so that blocks stand apart in any order.


def say(text: str) -> None:
    """Prints prose, wrapped."""
    console().print(_wrapped(text) + "\n", soft_wrap=True)


def heading(title: str, below: str) -> None:
    """Prints what comes first: a title, and a quiet line below it."""
    console().print(_wrapped(title), style="bold", soft_wrap=True)
    console().print(_wrapped(below) + "\n", style="dim", soft_wrap=True)


def labelled(label: str, text: str, style: str = "bold") -> None:
    """Prints a short coloured label and, beside it, wrapped text."""
    from rich.text import Text

    line = Text(label.ljust(LABEL), style=style)
    line.append(_wrapped(text, LABEL) + "\n", style="default not bold")
    console().print(line, soft_wrap=True)


def rule(title: str) -> None:
    """Prints a section's heading: its title on a line across the page."""
    from rich.rule import Rule
    from rich.text import Text

    width = min(console().width, PIPE_WIDTH)
    line = Rule(Text(title, style="bold"), align="left", style="cyan")
    console().print(line, "", width=width)


def table(result: Table) -> None:
    """Prints a table: heading with units beneath, numbers flush right."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=result.title,
        title_justify="left",
        title_style="bold",
        caption=result.note or None,
        caption_justify="left",
        caption_style="dim",
        header_style="",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 2),
        collapse_padding=True,
    )
    units = any(column.unit for column in result.headings())
    for column, numeric in zip(result.headings(), result.numeric(), strict=True):
        text = Text(column.name, style="cyan")
        if units:
            text.append(f"\n{column.unit}", style="dim")
        side = "right" if numeric else "left"
        drawn.add_column(text, justify=side, overflow="fold", vertical="bottom")
    for row in result.cells():
        drawn.add_row(*(Text(cell) for cell in row))
    _print(drawn)
    console().print()


@contextmanager
def progress(
    description: str, total: float | None = None
) -> Iterator[Callable[..., None]]:
    """A bar that is gone when the work is done; gives `advance(amount=1)`.

    In a pipe there is no bar. `total=None` shows that something is going on.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}", markup=False, style="dim"),
        BarColumn(bar_width=40),
        TextColumn("{task.percentage:>3.0f} %" if total else "", style="dim"),
        TimeElapsedColumn(),
        console=console(),
        transient=True,
        refresh_per_second=4,  # it runs beside what is being measured
        disable=not is_terminal(),
    ) as bar:
        task = bar.add_task(description, total=total)

        def advance(amount: float = 1) -> None:
            bar.advance(task, amount)

        yield advance
