"""How a lesson runs: its sections, its command line, its results.

A lesson is a file with a docstring (its --help), constants, sections under headings
`# ## <bullet of the guide>`, one `demo_<topic>(run)` a section, and

    SECTIONS = [lesson.Section("Design RESTful endpoints ...", demo_endpoints), ...]

    def main(argv=None) -> int:
        return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv)

    if __name__ == "__main__":
        raise SystemExit(main())

A demo says what it expects, measures, shows a table, and concludes in one sentence
computed from the figures. It gets a `Run` for that; what it reports is printed and
saved under `reports/`.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import io
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from course import draw, report, show
from course.machine import card_line, machine_card
from course.measure import stopwatch

INTERRUPTED = 130  # what a shell reports of a program ended by Ctrl-C

T = TypeVar("T")


class Skip(Exception):
    """Ends a demo whose means are not here; `command` is what would get them."""

    def __init__(self, reason: str, command: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.command = command


class Failure(Exception):
    """Ends the lesson in plain words: a traceback would hide what to do.

    For what concerns the reader's machine rather than the program. What was measured
    until then is saved, what was started is taken down, and the exit code is 1.
    """


@dataclass(frozen=True)
class Section:
    """One section: a bullet of the guide, word for word, and what shows it."""

    title: str
    demo: Callable[[Run], None]


@dataclass
class Run:
    """One run of a lesson: how it was asked for, and where its results go.

    `Run(quick=True)` is enough to try a demo by itself.
    """

    lesson: str = "lesson"
    quick: bool = False
    device: str = "cpu"
    arguments: argparse.Namespace = field(default_factory=argparse.Namespace)
    events: list[dict[str, Any]] = field(default_factory=list)  # of this section
    _kept: dict[str, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def say(self, text: str) -> None:
        """Prose: what is about to happen and why."""
        show.say(text)
        self._record("say", text=text)

    def predict(self, text: str) -> None:
        """One line before measuring: what should come out, or the ceiling."""
        show.labelled("Prediction", text, "bold blue")
        self._record("predicted", text=text)

    def conclude(self, text: str) -> None:
        """One sentence, computed from the figures just measured."""
        show.labelled("Result", text, "bold green")
        self._record("concluded", text=text)

    def fact(self, name: str, value: show.Cell, unit: str = "") -> None:
        """A single figure under a name."""
        text = f"{name}: {show.number(value)} {unit}".rstrip()
        show.labelled("Fact", text, "cyan")
        figure = {"name": name, "value": show.plain(value), "unit": unit}
        self._record("fact", text=text, **figure)

    def table(self, table: show.Table) -> None:
        """A measured result."""
        show.table(table)
        self._record("table", **table.as_json())

    def picture(self, draw_fn: Callable[..., None], name: str, **options: Any) -> None:
        """A picture, drawn by `draw_fn(axes)`; for options see `draw.picture`."""
        path = report.folder() / f"{self.lesson}-{name}.png"
        try:
            draw.picture(path, draw_fn, **options)
        except ModuleNotFoundError as missing:
            if missing.name != "matplotlib":
                raise
            self.skip("matplotlib is missing", "pip install -r requirements.txt")
            return
        show.labelled("Picture", _near(path), "magenta")
        self._record("picture", text=name, file=path.name)

    def skip(self, reason: str, command: str) -> None:
        """Says that a part is left out, and the command that would make it run."""
        show.labelled("SKIPPED", f"{reason}\nTo run it: {command}", "bold yellow")
        self._record("skipped", text=reason, command=command)

    def fail(self, problem: Exception) -> None:
        """Notes in the results that the demo failed; the reason is printed later."""
        name = "" if isinstance(problem, Failure) else f"{type(problem).__name__}: "
        self._record("failed", text=f"{name}{problem}")

    def progress(
        self, description: str, total: float | None = None
    ) -> AbstractContextManager[Callable[..., None]]:
        """A bar for what takes over a second: `with ... as advance: advance()`."""
        return show.progress(description, total)

    def keep(self, name: str, make: Callable[[], AbstractContextManager[T]]) -> T:
        """What several sections share: opened once, closed when the lesson ends."""
        if name not in self._kept:
            self._kept[name] = self._stack.enter_context(make())
        return self._kept[name]

    def close(self) -> None:
        """Closes what was kept, last opened first."""
        self._kept.clear()
        self._stack.close()

    def _record(self, kind: str, **details: Any) -> None:
        self.events.append({"kind": kind, **details})


def run(
    *,
    doc: str | None,
    sections: Sequence[Section],
    argv: Sequence[str] | None = None,
    number: int = 0,
    after: str = "",
    model_digest: Callable[[str], str] | None = None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    instead: Callable[[argparse.Namespace], int | None] | None = None,
) -> int:
    """Runs a lesson from its command line; gives back the exit code.

    Args:
        doc: the lesson's docstring; its first line is the title.
        sections: the lesson's sections, in order.
        argv: the command line without the program; None takes `sys.argv`.
        number: the lesson's place in the course.
        after: how to go on, said at the end.
        model_digest: gives the digest of the model for a device, for the card.
        add_arguments: adds the lesson's own options to the parser.
        instead: called with the arguments; unless it returns None, what it returns
            is the exit code and no section runs (a `--serve`, for instance).
    """
    parser = _parser(doc or "", sections)
    if add_arguments:
        add_arguments(parser)
    arguments = parser.parse_args(argv)
    chosen = _choose(parser, sections, arguments.section)
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: expected an existing folder, found {arguments.json}")
    if instead and (code := instead(arguments)) is not None:
        return code
    if importlib.util.find_spec("rich") is None:
        parser.error("rich is missing; run: pip install -r requirements.txt")
    name = Path(inspect.unwrap(sections[0].demo).__code__.co_filename).stem
    teller = Run(name, arguments.quick, arguments.device, arguments)
    record = _blank_record(teller, doc or "", number, sections)
    with _signals_unwind():
        code = _tell(teller, record, chosen, model_digest)
        return _finish(record, arguments.json, after, code)


def _parser(doc: str, sections: Sequence[Section]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc,
        epilog=f"sections:\n{_listing(sections)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("section", nargs="?", metavar="SECTION", help="only this one: number or word")
    add("--pause", action="store_true", help="wait for Enter between sections")
    add("--quick", action="store_true", help="fewer repeats: rough figures, soon")
    add("--json", type=Path, metavar="PATH", help="also write all results to PATH")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    return parser


def _listing(sections: Sequence[Section]) -> str:
    return "\n".join(f"  {i}  {s.title}" for i, s in enumerate(sections, 1))


Numbered = tuple[int, Section]


def _choose(
    parser: argparse.ArgumentParser, sections: Sequence[Section], wanted: str | None
) -> list[Numbered]:
    """The sections asked for; a number, or a word of exactly one title."""
    numbered = list(enumerate(sections, 1))
    if wanted is None:
        return numbered
    words = wanted.casefold()
    found = [(i, s) for i, s in numbered if words == str(i)]
    found = found or [(i, s) for i, s in numbered if words in s.title.casefold()]
    if len(found) != 1:
        what = "in several titles" if found else "in none"
        parser.error(
            f"expected the number of a section or a word of one title, found "
            f"{wanted!r}, which is {what}:\n{_listing(sections)}"
        )
    return found


def _blank_record(
    teller: Run, doc: str, number: int, sections: Sequence[Section]
) -> report.Record:
    return {
        "lesson": teller.lesson,
        "number": number,
        "title": doc.strip().partition("\n")[0],
        "device": teller.device,
        "machine": {},
        "titles": [section.title for section in sections],
        "sections": [],
        "seconds": 0.0,
    }


def _tell(
    teller: Run,
    record: report.Record,
    chosen: Sequence[Numbered],
    model_digest: Callable[[str], str] | None,
) -> int:
    """Runs the chosen sections; gives back 0, 1 after a failure, 130 after Ctrl-C."""
    with stopwatch() as watch:
        try:
            with ExitStack() as stack:
                stack.callback(teller.close)
                digest = model_digest and _digest(model_digest, teller.device)
                record["machine"] = machine_card(model_digest=digest)
                _open(record)
                for number, section in chosen:
                    if (number, section) != chosen[0] and teller.arguments.pause:
                        _pause()
                    show.rule(f"{number} of {len(record['titles'])}  {section.title}")
                    _demonstrate(teller, section, record["sections"])
            code = 0
        except KeyboardInterrupt:
            print("\nInterrupted; what was started has been stopped.", file=sys.stderr)
            code = INTERRUPTED
        except Failure as problem:
            print(f"\n{problem}\nWhat was started has been stopped.", file=sys.stderr)
            code = 1
        except Exception:
            traceback.print_exc()
            code = 1
    record["seconds"] = round(watch.seconds, 3)
    return code


def _digest(model_digest: Callable[[str], str], device: str) -> str:
    """The model is got ready here: no network or no room is no bug of the lesson."""
    try:
        return model_digest(device)
    except Exception as problem:
        raise Failure(f"{type(problem).__name__}: {problem}") from problem


def _open(record: report.Record) -> None:
    # What a terminal cannot write becomes "?", rather than the end of the lesson.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    show.heading(record["title"], card_line(record["machine"]))


def _demonstrate(teller: Run, section: Section, records: list[report.Record]) -> None:
    """Runs one demo; its record says how it ended."""
    teller.events = []
    record: report.Record = {
        "title": section.title,
        "outcome": "interrupted",  # until it is known better
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "quick": teller.quick,
        "events": teller.events,
    }
    records.append(record)
    with stopwatch() as watch:
        try:
            section.demo(teller)
            record["outcome"] = "done"
        except Skip as skip:
            teller.skip(skip.reason, skip.command)
            record["outcome"] = "skipped"
        except Exception as problem:
            teller.fail(problem)
            record["outcome"] = "failed"
            raise
        finally:
            record["seconds"] = round(watch.seconds, 3)


def _pause() -> None:
    if sys.stdin and sys.stdin.isatty():
        with suppress(EOFError):
            input("Enter goes on, Ctrl-C ends. ")


def _finish(record: report.Record, copy: Path | None, after: str, code: int) -> int:
    """Saves what was found and says how to go on; gives back the exit code."""
    saved = ""
    if any(section["outcome"] != "interrupted" for section in record["sections"]):
        try:
            saved = f", saved in {_near(report.save(record))}"
        except (OSError, ValueError) as problem:  # a read-only folder, a broken file
            print(f"The results were not saved: {problem}", file=sys.stderr)
    if copy:
        try:
            report.write(copy, report.as_text(record))
        except OSError as problem:
            print(f"--json was not written: {problem}", file=sys.stderr)
            code = code or 1
    if code == 0:
        count = len(record["sections"])
        sections = f"{count} section{'s' if count > 1 else ''}"
        show.labelled("Done", f"{sections} in {record['seconds']:.1f} s{saved}", "dim")
        if after:
            show.labelled("Next", after)
    return code


def _near(path: Path) -> str:
    """The path as short as it can be said from here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end the lesson as Ctrl-C does: through `with` blocks.

    Without it, `timeout 60 python lesson.py` would leave a lesson's servers running.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may say what a signal does
    before = {n: signal.getsignal(n) for n in numbers}
    caught = [n for n, old in before.items() if old is not signal.SIG_IGN]  # nohup
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])
