"""The graders are graded: right answers get everything, wrong ones lose what they must.

Each case is graded in a process of its own, two at a time. A variant holds only what
it does otherwise than the solution, which it is appended to. `FAILS` in a wrong one
names the checks that must fail, and no others may: no other at all where it names a
slow check, no other quick one where it names none, for then only those run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from exercises import catalogue, runner, starter
from exercises.catalogue import EXERCISES, ROOT, Exercise
from exercises.results import Check, Graded
from tests.graders.plugin import UNJUDGED

AT_A_TIME = 2
ASLEEP_AT_A_TIME = 4
# Endless loops sleep, which interrupts as well as any and leaves the machine to others.
BROKEN = {
    "empty": "",
    "syntax error": "def f(:\n",
    "sys.exit(0)": "import sys\nsys.exit(0)\n",
    "os._exit(0)": "import os\nos._exit(0)\n",
    "endless loop": "import time\nwhile True:\n    time.sleep(0.01)\n",
    "endless loop that catches all": (
        "import time\nwhile True:\n    try:\n        while True:\n"
        "            time.sleep(0.01)\n    except BaseException:\n        pass\n"
    ),
}
STUBBORN_S = 7.0  # given to the last one, which only being killed can end
IN_TIME_S = 90.0  # far less than an exercise's limit, and far more than it takes


@dataclass(frozen=True)
class Case:
    """One text to grade: a kind, and which of that kind."""

    exercise: Exercise
    kind: str  # solution, starter, wrong, right, broken
    name: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.exercise.name, self.kind, self.name)))

    @property
    def text(self) -> str:
        if self.kind == "broken":
            return BROKEN[self.name]
        solution = self.exercise.solution.read_text(encoding="utf-8")
        if self.kind in ("wrong", "right"):
            return f"{solution}\n\n{self.variant.read_text(encoding='utf-8')}"
        return solution if self.kind == "solution" else starter.derive(solution)

    @property
    def variant(self) -> Path:
        return self.exercise.variants / f"{self.kind}_{self.name}.py"

    @property
    def fails(self) -> set[str]:
        """What a wrong variant says that it must lose."""
        for node in ast.parse(self.variant.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FAILS":
                return set(ast.literal_eval(node.value))
        raise AssertionError(f"{self.variant}: expected FAILS = {{...}}, found none")

    def grade(self, folder: Path) -> Graded:
        file = folder / f"{self}"
        file.mkdir()
        file /= self.exercise.file.name
        file.write_text(self.text, encoding="utf-8")
        # What a wrong variant loses without slow checks needs none of them.
        slow = {check.name for check in checks(self.exercise) if check.slow}
        quick = self.kind == "wrong" and not self.fails & slow
        limit = STUBBORN_S if self.name == "endless loop that catches all" else None
        return runner.grade(self.exercise, file, quick=quick, limit_s=limit)


@cache
def checks(exercise: Exercise) -> tuple[Check, ...]:
    return runner.grade(exercise, exercise.starter, quick=True).checks


def cases(*kinds: str) -> list[Case]:
    found = []
    for exercise in EXERCISES:
        for kind in kinds:
            names = [""]
            if kind in ("wrong", "right"):
                paths = sorted(exercise.variants.glob(f"{kind}_*.py"))
                names = [path.stem.removeprefix(f"{kind}_") for path in paths]
            elif kind == "broken":
                names = list(BROKEN)
            found += [Case(exercise, kind, name) for name in names]
    return found


def each(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases(*kinds), ids=str)


@pytest.fixture(scope="session")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Case, Future[Graded]]]:
    """All cases of this session, begun two at a time."""
    folder = tmp_path_factory.mktemp("selfcheck")
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = [call.params.get("case") for call in calls if call]
    # Other tests have parameters of this name too.
    wanted = [case for case in wanted if isinstance(case, Case)]
    with (
        ThreadPoolExecutor(AT_A_TIME) as pool,
        ThreadPoolExecutor(ASLEEP_AT_A_TIME) as asleep,
    ):
        begun = {
            case: (asleep if "endless" in case.name else pool).submit(
                case.grade, folder
            )
            for case in wanted
        }
        request.config.pluginmanager.register(Times(begun))
        yield begun
        for workers in (pool, asleep):
            workers.shutdown(cancel_futures=True)


class Times:
    """Tells at the end of the session what the grading of each exercise took."""

    def __init__(self, begun: dict[Case, Future[Graded]]) -> None:
        self.begun = begun

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        seconds: dict[str, list[float]] = {}
        for case, future in self.begun.items():
            if not future.cancelled() and not future.exception():
                took = seconds.setdefault(case.exercise.name, [])
                took.append(future.result().seconds)
        terminalreporter.section("graders graded")
        for name, took in seconds.items():
            line = f"{name}: {len(took)} answers, {sum(took):.0f} s"
            terminalreporter.write_line(line)


@pytest.fixture
def graded(case: Case, running: dict[Case, Future[Graded]]) -> Graded:
    return running[case].result()


def lacking(result: Graded) -> list[str]:
    """Why some checks could not run on this machine."""
    return sorted({x.message for x in result.unchecked if "To run it:" in x.message})


def skip_if_lacking(result: Graded) -> None:
    """After all that could be seen was seen: what could not be is no pass."""
    if reasons := lacking(result):
        pytest.skip("; ".join(reasons))


def told(result: Graded) -> str:
    return "\n".join(f"{x.name}: {x.passed}: {x.message}" for x in result.checks)


@each("solution", "right")
def test_a_right_answer_gets_full_marks(case: Case, graded: Graded):
    assert graded.failed == [], told(graded)
    assert graded.points == catalogue.POINTS
    # Only what this machine cannot check may be open, and it says why.
    assert all("To run it:" in check.message for check in graded.unchecked)
    skip_if_lacking(graded)
    assert graded.full


@each("starter")
def test_the_starter_gets_nothing_and_is_told_why(case: Case, graded: Graded):
    assert graded.score == 0, told(graded)
    assert graded.failed
    assert all(x.message.startswith("not started: ") for x in graded.failed)
    skip_if_lacking(graded)


@each("wrong")
def test_a_wrong_answer_fails_what_it_must_and_no_more(case: Case, graded: Graded):
    open_here = {check.name for check in graded.unchecked}
    assert {x.name for x in graded.failed} == case.fails - open_here, told(graded)
    for check in graded.failed:
        assert all(word in check.message for word in ("called ", "expected ", "got "))
        assert "because" in check.message
        assert UNJUDGED not in check.message
    if case.fails <= open_here:
        skip_if_lacking(graded)


@each("broken")
def test_a_broken_file_gets_nothing_in_time(case: Case, graded: Graded):
    assert graded.score == 0, told(graded)
    assert graded.failed
    assert graded.seconds < IN_TIME_S
    assert UNJUDGED not in told(graded)
    skip_if_lacking(graded)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda x: x.name)
def test_there_are_enough_variants_and_they_kill_every_check(exercise: Exercise):
    wrong = [case for case in cases("wrong") if case.exercise == exercise]
    right = [case for case in cases("right") if case.exercise == exercise]
    assert 5 <= len(wrong) <= 10
    assert len(right) >= 2
    killed = set().union(*(case.fails for case in wrong))
    assert killed == {check.name for check in checks(exercise)}


def test_the_starters_are_what_the_solutions_give():
    drifted = [str(path.relative_to(ROOT)) for path, _ in starter.drifted()]
    assert drifted == [], (
        "Expected exercises as their solutions give them. If you changed a solution: "
        "python -m exercises.starter. If you solved an exercise here: python -m "
        "exercises reset N, or work in the student bundle (README)."
    )
