"""`python -m models` builds the model's files ahead of time and prints what it made."""

from __future__ import annotations

import argparse
import sys

from models import build
from models.errors import ModelError
from models.graph import PRECISIONS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    parser.add_argument("--precision", choices=PRECISIONS, default="int4")
    parser.add_argument("--rebuild", action="store_true", help="build it again")
    options = parser.parse_args(argv)
    try:
        files = build.ensure(options.precision, rebuild=options.rebuild)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    size = files.graph.stat().st_size / 1e6
    print(f"{files.graph}\n{size:.0f} MB, {files.precision}, revision {files.revision}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
