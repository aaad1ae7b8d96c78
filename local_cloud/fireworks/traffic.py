"""A day of calls, hour by hour: the shop's, or your own.

`day.csv` is a generated day, not a recorded one: `python -m
local_cloud.fireworks.traffic` writes it again, from the seed below. Your own has the
same three columns: the hour from 0 to 23, its calls, and how many of them may wait.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

DAY = Path(__file__).with_name("day.csv")
COLUMNS = ["hour", "calls", "can_wait"]
SEED = 20261124
BUSIEST, NIGHT = 9_000, 4  # calls an hour: of an ordinary afternoon, from 1 to 5
NEWSLETTER = (12, 80_000)  # the hour it is sent, and the calls that it brings
CAN_WAIT = 0.3  # of the calls: old mail that is sorted again
HOUR_S = 3600.0


@dataclass(frozen=True)
class Hour:
    """One hour of the day."""

    calls: int
    can_wait: int  # of them

    def __post_init__(self) -> None:
        if not 0 <= self.can_wait <= self.calls:
            raise ValueError(f"hour: expected 0 <= can_wait <= calls, found {self}")


def read(path: Path = DAY) -> list[Hour]:
    """The 24 hours in a CSV file.

    Raises:
        ValueError: it has other columns, other hours, or impossible numbers.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or list(rows[0]) != COLUMNS or len(rows) != 24:
        raise ValueError(
            f"{path}: expected the columns {','.join(COLUMNS)} and 24 rows, found "
            f"{','.join(rows[0]) if rows else 'none'} and {len(rows)}; see {DAY}"
        )
    if [row["hour"] for row in rows] != [str(hour) for hour in range(24)]:
        raise ValueError(f"{path}: expected the hours from 0 to 23 in their order")
    return [Hour(int(row["calls"]), int(row["can_wait"])) for row in rows]


def option(text: str) -> list[Hour]:
    """A day named on a command line, read while that is parsed."""
    try:
        return read(Path(text))
    except (OSError, ValueError) as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem


def arrivals(day: Sequence[Hour], seed: int = SEED) -> list[float]:
    """When each call comes, in seconds of the day: anywhere within its hour."""
    chance = random.Random(seed)
    times = [
        (hour + chance.random()) * HOUR_S
        for hour, told in enumerate(day)
        for _ in range(told.calls)
    ]
    return sorted(times)


def generate(seed: int = SEED) -> list[Hour]:
    """A shop's day: quiet nights, a hill until midnight, and one newsletter."""
    chance = random.Random(seed)
    made = []
    for hour in range(24):
        hill = max(0.0, math.sin(math.pi * (hour - 5) / 19)) * BUSIEST
        calls = round((hill or NIGHT) * chance.lognormvariate(0, 0.15))
        if hour == NEWSLETTER[0]:
            calls = NEWSLETTER[1]
        made.append(Hour(calls, sum(chance.random() < CAN_WAIT for _ in range(calls))))
    return made


def write(day: Sequence[Hour], file: TextIO) -> None:
    """Write a day as `read` takes it."""
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows([hour, h.calls, h.can_wait] for hour, h in enumerate(day))


if __name__ == "__main__":
    write(generate(), sys.stdout)
