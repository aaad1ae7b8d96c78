"""What a grader is written with: points, a submission to call, and fair messages.

    from tests.graders.plugin import Submission, points

    @points(3, hint="Sort first; do not interpolate.")
    def check_percentile_was_measured(submission: Submission) -> None:
        \"""A percentile is one of the latencies that were measured.\"""
        found = submission.call("percentile", [3.0, 1.0, 2.0], 50)
        found.equals(2.0, because="2.0 is the middle one of the three")

One check is one claim: its name and docstring appear in the results. The submission is
loaded by path, once, and only after the checks were announced in the report.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import math
import os
import reprlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

from exercises import doctor, runner

LOAD_S = 5.0  # importing a submission
AGAIN_S = 10.0
CHECK_S = 5.0  # one check, unless it says otherwise
UNJUDGED = (
    "called the checks on what your functions gave, expected values of the kinds that "
    "the docstring names because the checks compute with them"
)
PRINTED = 2000  # characters of a submission's output that are kept

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = 120


def points(
    n: int, *, hint: str, needs: str = "", slow: bool = False, limit_s: float = CHECK_S
) -> Callable[[Any], Any]:
    """Marks a check.

    Args:
        n: points it is worth; those of an exercise sum up to 25.
        hint: one sentence that helps on, and gives nothing away.
        needs: what of `exercises.doctor.MACHINERY` it cannot do without.
        slow: it takes more than half a second; `watch` leaves it for last.
        limit_s: seconds it may take.
    """
    return pytest.mark.points(n, hint=hint, needs=needs, slow=slow, limit_s=limit_s)


class Failed(AssertionError):
    """A claim that does not hold; the message is for the learner."""


class TimeLimit(BaseException):
    """Not an Exception: a submission that catches those must not catch this."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends the block after so many seconds, where the system has such an alarm."""
    if not hasattr(signal, "setitimer"):  # Windows: the runner's limit must do
        yield
        return

    def ring(*_: Any) -> NoReturn:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, ring)
    # And again, as a submission may catch it and loop on; but not while what was
    # started is being ended.
    outer = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, before)


# -- what a check calls


@dataclass(frozen=True)
class Call:
    """A call of the learner's that came back: what was called, and the value."""

    text: str
    value: Any

    def equals(self, expected: Any, because: str) -> None:
        """Claims that it gave exactly this."""
        self.must(self.value == expected, repr(expected), because)

    def near(self, expected: float, because: str, within: float = 0.01) -> None:
        """Claims that it gave this number, give or take a share of it."""
        number = isinstance(self.value, int | float) and not isinstance(
            self.value, bool
        )
        holds = number and math.isclose(
            self.value, expected, rel_tol=within, abs_tol=1e-9
        )
        self.must(holds, f"{expected:.6g} (within {within:.0%})", because)

    def must(
        self, holds: object, expected: str, because: str, got: object = ...
    ) -> None:
        """Claims whatever `holds` says; `got` is what to show instead of the value."""
        if not holds:
            shown = self.value if got is ... else got
            shown = shown if isinstance(shown, str) and got is not ... else short(shown)
            raise Failed(
                f"called {self.text}, expected {expected} because {because}, "
                f"got {shown}"
            )


def short(value: object) -> str:
    """A value in one line of bearable length."""
    return _SHORT.repr(value)


class Submission:
    """The learner's file: its functions are called through `call`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = path.read_bytes() if path.is_file() else None
        self._module: ModuleType | None = None
        self._problem = "" if self.source is not None else f"found no file {path}"
        self._endless: set[str] = set()  # what did not return; not waited for again

    @property
    def sha256(self) -> str | None:
        """Of the very bytes that are run."""
        return None if self.source is None else hashlib.sha256(self.source).hexdigest()

    @property
    def module(self) -> ModuleType:
        """The file as a module, run once; fails alike each time if that failed."""
        if self._module is None and not self._problem:
            try:
                with time_limit(LOAD_S):
                    self._module = self._run()
            except TimeLimit:
                self._problem = f"importing it took more than {LOAD_S:g} s: endless?"
            except (Exception, SystemExit) as error:
                self._problem = f"importing it got {self._told(error)}"
        if self._module is None:
            raise Failed(
                f"called import {self.path.stem}, expected a module because all "
                f"checks call its functions, got none: {self._problem}"
            )
        return self._module

    def _run(self) -> ModuleType:
        # Not by importlib: its bytecode cache may miss two saves within a second.
        module = ModuleType(self.path.stem)
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module
        assert self.source is not None
        code = compile(self.source, str(self.path), "exec", dont_inherit=True)
        exec(code, module.__dict__)
        return module

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the submission, to be handed to what calls it."""
        found = getattr(self.module, name, None)
        if not callable(found):
            raise Failed(
                f"called {name}, expected a function because the exercise names it, "
                f"got {'none' if found is None else short(found)}. `python -m "
                f"exercises reset N` brings the starter back"
            )
        return found

    def call(self, name: str, *args: Any, **named: Any) -> Call:
        """Calls a function; a coroutine is run to its end. Fails if it raises."""
        function = self.function(name)
        text = _text(name, args, named)
        with self.explained(text):
            value = function(*args, **named)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
        return Call(text, value)

    def refuses(
        self, kind: type[Exception], name: str, *args: Any, because: str, **named: Any
    ) -> None:
        """Claims that a call raises this kind of error."""
        function = self.function(name)
        text = _text(name, args, named)
        with self.explained(text):
            try:
                value = function(*args, **named)
            except NotImplementedError:
                raise
            except kind:
                return
        Call(text, value).must(False, f"a {kind.__name__}", because)

    @contextmanager
    def explained(self, text: str) -> Iterator[None]:
        """Turns what the learner's code raises within into a message about `text`."""
        name = text.partition("(")[0]
        endless = (
            f"called {text}, expected {name} to return because the checks have a time "
            f"limit, got no answer: endless?"
        )
        if name in self._endless:
            raise Failed(endless)
        try:
            yield
        except NotImplementedError as error:
            where = self._function_of(error) or text
            raise Failed(f"not started: {where} raises NotImplementedError") from None
        except TimeLimit:
            self._endless.add(name)
            raise Failed(endless) from None
        except (Failed, pytest.skip.Exception):
            raise
        except (Exception, SystemExit) as error:
            raise Failed(
                f"called {text}, expected it to return because its arguments are "
                f"valid, got {self._told(error)}"
            ) from None

    def _told(self, error: BaseException) -> str:
        """An error in one line, with the learner's line that it came from."""
        told = f"{type(error).__name__}: {error}"
        if isinstance(error, SystemExit):
            return f"{told}: a submission must not end the program"
        lines = [
            x.tb_lineno
            for x in _trace(error)
            if x.tb_frame.f_code.co_filename == str(self.path)
        ]
        return f"{told} (line {lines[-1]} of {self.path.name})" if lines else told

    def _function_of(self, error: BaseException) -> str | None:
        """The name of the learner's function that an error came from."""
        codes = [x.tb_frame.f_code for x in _trace(error)]
        mine = [x.co_qualname for x in codes if x.co_filename == str(self.path)]
        return mine[-1] if mine else None


def _trace(error: BaseException) -> Iterator[Any]:
    step = error.__traceback__
    while step:
        yield step
        step = step.tb_next


def _text(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> str:
    words = [short(arg) for arg in args]
    words += [f"{key}={short(value)}" for key, value in named.items()]
    return f"{name}({', '.join(words)})"


# -- what pytest calls


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--submission", type=Path, required=True)
    parser.addoption("--report", type=Path, required=True)
    parser.addoption("--quick-only", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "points(n, hint, needs, slow, limit_s): worth")
    config.stash[SUBMISSION] = Submission(config.getoption("submission"))
    # The runner says SIGTERM: as after Ctrl-C, fixtures shall end what they started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


SUBMISSION = pytest.StashKey[Submission]()


@pytest.fixture(scope="session")
def submission(pytestconfig: pytest.Config) -> Submission:
    return pytestconfig.stash[SUBMISSION]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Announces the checks, before the submission gets a word in."""
    if not session.items:
        return
    checks = [_announced(item) for item in session.items]
    sha256 = session.config.stash[SUBMISSION].sha256
    _write(session.config, {"sha256": sha256, "checks": checks})


def _announced(item: pytest.Item) -> dict[str, Any]:
    mark = _mark(item)
    doc = inspect.getdoc(getattr(item, "function", None)) or item.name
    return {
        "name": item.name.removeprefix("check_"),
        "description": doc.partition("\n\n")[0].replace("\n", " "),
        "points": mark.args[0],
        "hint": mark.kwargs["hint"],
        "slow": mark.kwargs["slow"],
    }


def _mark(item: pytest.Item) -> pytest.Mark:
    mark = item.get_closest_marker("points")
    if mark is None:
        raise pytest.UsageError(f"{item.nodeid}: expected @points(...), found none.")
    return mark


def _write(config: pytest.Config, line: dict[str, Any]) -> None:
    with config.getoption("report").open("a", encoding="utf-8") as report:
        report.write(json.dumps(line) + "\n")
        report.flush()
        os.fsync(report.fileno())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    mark = _mark(item)
    if mark.kwargs["slow"] and item.config.getoption("quick_only"):
        pytest.skip("takes longer: not in a quick run")
    if mark.kwargs["needs"] and (reason := doctor.missing(mark.kwargs["needs"])):
        pytest.skip(f"could not be checked here: {reason}")
    with time_limit(mark.kwargs["limit_s"]):  # fixtures call the submission, too
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with time_limit(_mark(item).kwargs["limit_s"]):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:
    report: Any = yield
    if report.when == "call" or report.outcome != "passed":
        passed = {"passed": True, "failed": False, "skipped": None}[report.outcome]
        message = _message(call.excinfo.value) if call.excinfo else ""
        line = {"name": item.name.removeprefix("check_"), "passed": passed}
        printed = report.capstdout[-PRINTED:]
        _write(item.config, {**line, "message": message, "printed": printed})
    return report


@pytest.hookimpl(trylast=True)  # when all that fixtures started has ended
def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.testscollected:
        _write(session.config, runner.FINISHED)


def _message(error: BaseException) -> str:
    if isinstance(error, Failed):
        return str(error)
    if isinstance(error, pytest.skip.Exception):
        return error.msg or "skipped"
    if isinstance(error, TimeLimit):
        return "the check took longer than it may, outside of your functions"
    return f"{UNJUDGED}, got {error!r}"
