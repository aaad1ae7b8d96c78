"""The exercises' command: `python -m exercises`.

list            the exercises, and how far you are
check N         check your answer; exit status 0 only at full marks
watch [N]       check again whenever you save; without N, the first open one
hint N          the next of three hints
reset N         begin again; your file is kept as a copy
solution N      show ours, once yours passes
grade           check all, write results: --json PATH, --markdown PATH
doctor          what this machine has and lacks
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from course import show
from course.show import Table
from exercises import doctor, exporters, progress, results, runner
from exercises.catalogue import EXERCISES, ROOT, Exercise, UnknownExercise, find
from exercises.results import Check, Graded
from exercises.watch import changes

MARKS = {True: ("ok", "green"), False: ("no", "red"), None: ("-", "yellow")}
BROKEN = 2  # exit status: nothing was graded


class Refused(RuntimeError):
    """What was asked cannot be done now; the message says why."""


def list_all(_: argparse.Namespace) -> int:
    known = progress.load()
    rows = []
    for exercise in EXERCISES:
        mine = known.get(exercise.name, {})
        reached = f"{mine['score']} of {mine['points']}" if "score" in mine else "-"
        rows.append([exercise.number, exercise.title, reached, exercise.minutes])
        rows[-1].append(exercise.before)
    columns = [("no.", ""), "exercise", "points", ("takes", "minutes"), "read before"]
    show.table(Table("Exercises", columns, rows))
    show.say("Begin: python -m exercises watch 1, and open its file in your editor.")
    return 0


def check(given: argparse.Namespace) -> int:
    graded = runner.grade(given.exercise)
    progress.note_result(graded)
    report(given.exercise, graded)
    return int(not graded.full)


def watch(given: argparse.Namespace) -> int:
    exercise = given.exercise or _first_open()
    show.say(f"Watching {_relative(exercise.file)}. Save to check; Ctrl-C ends.")

    def changed(_: Path) -> bool:
        start = time.perf_counter()
        graded = runner.grade(exercise, quick=True)
        slow = [each for each in graded.checks if each.slow]
        report(exercise, graded, finished=not slow)
        took = time.perf_counter() - start
        show.labelled("checked", f"{time.strftime('%H:%M:%S')}, in {took:.2f} s", "dim")
        if slow and not graded.failed:
            show.say(f"Now the {len(slow)} checks that take longer.")
            graded = runner.grade(exercise)
            report(exercise, graded)
        progress.note_result(graded)
        return bool(graded.failed)

    changes([exercise.file], changed)
    return 0


def hint(given: argparse.Namespace) -> int:
    number, text = progress.next_hint(given.exercise)
    show.labelled(f"hint {number}/{progress.HINTS}", text)
    return 0


def reset(given: argparse.Namespace) -> int:
    exercise: Exercise = given.exercise
    if exercise.file.exists():
        show.say(f"Kept yours as {_relative(progress.back_up(exercise.file))}.")
    shutil.copyfile(exercise.starter, exercise.file)
    show.say(f"{_relative(exercise.file)} is as it was at the beginning.")
    return 0


def solution(given: argparse.Namespace) -> int:
    exercise: Exercise = given.exercise
    if not exercise.solution.exists():
        raise Refused("This bundle holds no solutions; ask whoever teaches.")
    if not progress.load().get(exercise.name, {}).get("solved"):
        n = exercise.number
        raise Refused(
            f"Ours is shown once yours passes: python -m exercises check {n}, and "
            f"python -m exercises hint {n} if you are stuck."
        )
    print(exercise.solution.read_text(encoding="utf-8"))
    return 0


def grade(given: argparse.Namespace) -> int:
    """Exit status 0 says that grading ran; the score is in the results alone.

    Where one grader cannot run the others' results are written all the same.
    """
    for option, path in (("--json", given.json), ("--markdown", given.markdown)):
        _may_be_written(option, path)
    graded, status = [], 0
    for exercise in EXERCISES:
        try:
            with show.progress(f"grading {exercise.name}"):
                graded.append(runner.grade(exercise))
            show.say(f"{exercise.name}: {graded[-1].score} of {graded[-1].points}")
        except runner.GraderError as problem:
            print(f"{exercise.name}: {problem}", file=sys.stderr)
            status = BROKEN
    if given.json:
        results.write(given.json, graded)
    if given.markdown:
        with given.markdown.open("a", encoding="utf-8") as summary:
            summary.write(exporters.markdown(graded))
    return status


def _may_be_written(option: str, path: Path | None) -> None:
    """Raises Refused before minutes of grading, not after."""
    try:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
    except OSError as error:
        raise Refused(
            f"Expected {option} to name a file that can be written, found {path}: "
            f"{error.strerror}. Name one in a folder that you may write in."
        ) from None


def examine(_: argparse.Namespace) -> int:
    """Exit status 1 if something is wrong that every exercise needs."""
    words = {True: "ok", False: "wrong", None: "missing"}
    found = doctor.examine()
    rows = [
        [x.what, words[x.good], x.found, "" if x.good else x.do or "-"] for x in found
    ]
    show.table(Table("This machine", ["what", "", "found", "do"], rows))
    show.say("What is missing is wanted by some checks only; they stay open without.")
    return int(any(x.good is False for x in found))


# -- what a learner sees


def report(exercise: Exercise, graded: Graded, *, finished: bool = True) -> None:
    """One line a check; the first that failed in full. Finished: no more will come."""
    first = next(iter(graded.failed), None)
    for each in graded.checks:
        _line(each, first=each is first)
    show.console().print()
    open_points = sum(each.points for each in graded.unchecked)
    text = f"{graded.score} of {graded.points} points"
    text += f", {open_points} left open" if open_points else ""
    show.labelled("score", text, "bold green" if graded.full else "bold yellow")
    if finished and not graded.failed:
        _finish(exercise, graded)


def _line(check: Check, *, first: bool) -> None:
    mark, style = MARKS[check.passed]
    text = f"{check.description} ({check.points})"
    if check.passed is None:
        text += f": {check.message}"
    if not first:
        show.console().print(f"{mark:{show.LABEL}}{text}", style=style, soft_wrap=True)
        return
    text += f"\n{check.message}\nHint: {check.hint}"
    if check.printed:
        text += f"\nIt printed:\n{check.printed.rstrip()}"
    show.console().print()
    show.labelled(mark, text, style)


def _finish(exercise: Exercise, graded: Graded) -> None:
    n = exercise.number
    show.rule(f"Exercise {n} is solved" if graded.full else f"Exercise {n}: no failure")
    known = progress.load()
    known[exercise.name] = {"solved": True}
    left = [x for x in EXERCISES if not known.get(x.name, {}).get("solved")]
    show.say(f"Compare with ours: python -m exercises solution {n}")
    if left:
        show.say(f"Next: python -m exercises watch {left[0].number} ({left[0].title})")
    else:
        show.say("That was the last one: every exercise of the module is solved.")


def _first_open() -> Exercise:
    known = progress.load()
    open_ones = [x for x in EXERCISES if not known.get(x.name, {}).get("solved")]
    return (open_ones or list(EXERCISES))[0]


def _relative(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


# -- the command line


def _exercise(word: str) -> Exercise:
    try:
        return find(word)
    except UnknownExercise as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exercises",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run, name in ((list_all, "list"), (examine, "doctor")):
        commands.add_parser(name).set_defaults(run=run)
    for run in (check, hint, reset, solution):
        one = commands.add_parser(run.__name__)
        one.add_argument("exercise", type=_exercise, metavar="N")
        one.set_defaults(run=run)
    some = commands.add_parser("watch")
    some.add_argument("exercise", type=_exercise, nargs="?", metavar="N")
    some.set_defaults(run=watch)
    every = commands.add_parser("grade")
    every.add_argument("--json", type=Path, metavar="PATH")
    every.add_argument("--markdown", type=Path, metavar="PATH", help="appended to")
    every.set_defaults(run=grade)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = arguments().parse_args(argv)
    try:
        return given.run(given)
    except (Refused, runner.GraderError) as problem:
        print(problem, file=sys.stderr)
        return BROKEN
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
