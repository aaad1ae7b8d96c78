"""Makes the files that learners begin with from the solutions: one source, no drift.

    python -m exercises.starter            write them all
    python -m exercises.starter --check    only say which differ; exit status 1 if any

In a solution, what stands between `# BEGIN SOLUTION` and `# END SOLUTION` is taken
out. Inside a function `raise NotImplementedError` takes its place; at the margin (an
import, a function of one's own) nothing does.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from exercises.catalogue import EXERCISES, ROOT

BLOCK = re.compile(
    r"^(?P<indent>[ ]*)# BEGIN SOLUTION\n(?P<body>.*?)^(?P=indent)# END SOLUTION\n",
    re.MULTILINE | re.DOTALL,
)


class MarkerError(ValueError):
    """BEGIN and END that are no pairs."""


def derive(solution: str) -> str:
    """The starter of a solution's text."""

    def empty(block: re.Match[str]) -> str:
        indent = block["indent"]
        return f"{indent}raise NotImplementedError\n" if indent else ""

    starter = BLOCK.sub(empty, solution)
    if left := re.search(r"# (BEGIN|END) SOLUTION", starter):
        line = starter[: left.start()].count("\n") + 1
        raise MarkerError(
            f"Expected BEGIN and END SOLUTION in pairs of one indentation, found a "
            f"lone {left[1]} about line {line}."
        )
    return re.sub(r"\n{4,}", "\n\n\n", starter)  # where a block at the margin was


def drifted() -> list[tuple[Path, str]]:
    """The files that differ from what their solution gives, with the right text."""
    found = []
    for exercise in EXERCISES:
        if exercise.solution.exists():
            text = derive(exercise.solution.read_text(encoding="utf-8"))
            for file in (exercise.file, exercise.starter):
                if not file.exists() or file.read_text(encoding="utf-8") != text:
                    found.append((file, text))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m exercises.starter")
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args(argv)
    differ = drifted()
    for file, text in differ:
        print(f"{'differs' if given.check else 'written'}: {file.relative_to(ROOT)}")
        if not given.check:
            file.write_text(text, encoding="utf-8")
    return int(given.check and bool(differ))


if __name__ == "__main__":
    raise SystemExit(main())
