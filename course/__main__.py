"""Builds one HTML page of all that the lessons measured.

python -m course report [--out reports/index.html]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from course import report


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; gives back its exit code."""
    parser = argparse.ArgumentParser(prog="python -m course", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True, metavar="report")
    page = commands.add_parser("report", help="build the page")
    page.add_argument("--out", type=Path, metavar="PATH", help="where the page goes")
    arguments = parser.parse_args(argv)
    return build(arguments.out or report.folder() / "index.html")


def build(out: Path) -> int:
    """Writes the page to `out`; gives back the exit code."""
    try:
        records = report.load()
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    if not records:
        print(
            f"Expected results of lessons in {report.folder()}, found none. Run a "
            "lesson first, for example: python model_api.py",
            file=sys.stderr,
        )
        return 1
    report.write(out, report.page(records))
    print(f"{out}: {len(records)} lesson{'s' if len(records) > 1 else ''}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
