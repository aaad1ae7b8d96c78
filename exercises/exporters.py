"""Results for other systems: Gradescope's JSON, and a summary in Markdown.

python -m exercises.exporters gradescope results.json > gradescope.json
python -m exercises.exporters markdown results.json >> "$GITHUB_STEP_SUMMARY"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exercises import results
from exercises.results import Check, Graded

MARKS = {True: "✓", False: "✗", None: "·"}


def gradescope(graded: Sequence[Graded]) -> dict[str, Any]:
    """The form that Gradescope's autograder reads; what was not checked earns 0."""
    tests = [_gradescope_test(each, check) for each in graded for check in each.checks]
    return {
        "score": sum(each.score for each in graded),
        "execution_time": round(sum(each.seconds for each in graded)),
        "output": "\n".join(f"{g.file}: SHA-256 {g.sha256}" for g in graded),
        "tests": tests,
    }


def _gradescope_test(graded: Graded, check: Check) -> dict[str, Any]:
    test = {
        "name": f"{graded.exercise}: {check.description}",
        "score": check.score,
        "max_score": check.points,
        "output": check.message,
    }
    # Without a status Gradescope shows partial credit as failed, which a null is not.
    return test if check.passed is None else {**test, "status": _status(check)}


def _status(check: Check) -> str:
    return "passed" if check.passed else "failed"


def markdown(graded: Sequence[Graded]) -> str:
    """A table of all exercises, then what is open in each."""
    lines = [
        "| exercise | score | not checked | SHA-256 |",
        "| --- | --- | --- | --- |",
    ]
    for each in graded:
        unchecked = sum(check.points for check in each.unchecked)
        digest = (each.sha256 or "no file")[:12]
        score = f"{each.score} of {each.points}"
        lines.append(f"| {each.title} | {score} | {unchecked} | `{digest}` |")
    for each in graded:
        open_ones = [check for check in each.checks if not check.passed]
        if open_ones:
            lines += ["", f"### {each.title}", ""]
            lines += [_line(check) for check in open_ones]
    return "\n".join(lines) + "\n"


def _line(check: Check) -> str:
    # As code: a learner's values must not become markup on somebody's page.
    told = check.message.replace("`", "'").replace("\n", " ")
    return f"- {MARKS[check.passed]} {check.description} ({check.points}): `{told}`"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m exercises.exporters")
    parser.add_argument("form", choices=("gradescope", "markdown"))
    parser.add_argument("results", type=Path)
    given = parser.parse_args(argv)
    try:
        graded = results.read(given.results)
    except results.ResultsError as error:
        parser.exit(2, f"{error}\n")
    if given.form == "markdown":
        print(markdown(graded), end="")
    else:
        print(json.dumps(gradescope(graded), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
