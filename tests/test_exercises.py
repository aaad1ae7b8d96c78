"""The exercises' command as a learner uses it, in copies of the repository."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from course import process
from exercises import doctor, exporters, results, runner, starter
from exercises.__main__ import main
from exercises.catalogue import (
    EXERCISES,
    POINTS,
    ROOT,
    Exercise,
    UnknownExercise,
    find,
)
from exercises.results import Check, Graded
from local_cloud.containers.engine import Engine

DEADLINE_S = 120.0
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda x: x.name)


def git(*words: str, **env: str) -> str:
    done = subprocess.run(
        ["git", *words],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """The working tree as git would commit it, written beside git's own objects."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout. To run it: git clone, instead of a bundle")
    folder = tmp_path_factory.mktemp("git")
    (folder / "objects").mkdir()
    objects = git("rev-parse", "--path-format=absolute", "--git-path", "objects")
    env = {
        "GIT_INDEX_FILE": str(folder / "index"),
        "GIT_OBJECT_DIRECTORY": str(folder / "objects"),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": objects,
    }
    git("add", "--all", **env)
    return git("write-tree", **env), env


def unpack(tree: tuple[str, dict[str, str]], folder: Path) -> Path:
    """What `git archive` makes of it: the bundle for students."""
    written, env = tree
    archive = folder / "bundle.tar"
    git("archive", "--format=tar", "--output", str(archive), written, **env)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "bundle", filter="data")
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundle(tree: tuple[str, dict[str, str]], tmp_path_factory) -> Path:
    """As it is made, whatever has been solved here meanwhile."""
    folder = unpack(tree, tmp_path_factory.mktemp("students"))
    for exercise in EXERCISES:
        shutil.copyfile(exercise.starter, folder / exercise.file.relative_to(ROOT))
    return folder


@pytest.fixture
def clone(bundle: Path, tmp_path: Path) -> Path:
    """A whole copy to work in: the bundle, and what only a clone has."""
    copy = tmp_path / "clone"
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("__pycache__", ".ex*"))
    for name in ("solutions", "variants"):
        shutil.copytree(
            ROOT / "tests" / "graders" / name, copy / "tests/graders" / name
        )
    return copy


def python(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *words],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def command(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = python(folder, "-m", "exercises", *words, **env)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def solve(folder: Path, number: str) -> None:
    file = find(number).file.relative_to(ROOT)
    solution = find(number).solution.read_text()
    (folder / file).write_text(solution)


# ---------------------------------------------------------------- what students get


def test_the_bundle_has_graders_and_no_solutions(bundle: Path):
    here = {str(path.relative_to(bundle)) for path in bundle.rglob("*")}
    assert not [path for path in here if "solution" in path or "variants" in path]
    assert here.isdisjoint({"tests/test_selfcheck.py", "tests/test_exercises.py"})
    for exercise in EXERCISES:
        assert str(exercise.grader.relative_to(ROOT)) in here
        assert "SOLUTION" not in (bundle / exercise.file.relative_to(ROOT)).read_text()


def test_the_bundle_is_graded_to_nothing_with_nothing_started(
    bundle: Path, tmp_path: Path
):
    told, summary = tmp_path / "results.json", tmp_path / "summary.md"
    done = command(bundle, "grade", "--json", str(told), "--markdown", str(summary))
    assert done.returncode == 0  # grading ran; the score is in the file
    written = json.loads(told.read_text())
    assert (written["score"], written["points"]) == (0, POINTS * len(EXERCISES))
    assert written["machine"]["cores"] >= 1
    graded = results.read(told)
    assert [each.exercise for each in graded] == [x.name for x in EXERCISES]
    for each in graded:
        assert each.failed
        assert all(check.message.startswith("not started") for check in each.failed)
        file = bundle / each.file
        assert each.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert each.title in summary.read_text()


def test_a_bundle_keeps_no_solution_to_show(bundle: Path):
    done = command(bundle, "solution", "1")
    assert done.returncode == 2
    assert "no solutions" in done.stderr


# ---------------------------------------------------------------- a learner's way


def test_list_shows_every_exercise_also_beside_a_broken_file(clone: Path):
    (clone / find("1").file.relative_to(ROOT)).write_text("def f(:\n")
    done = command(clone, "list")
    assert done.returncode == 0
    assert all(exercise.title in done.stdout for exercise in EXERCISES)


def test_check_tells_the_first_failure_in_full_and_the_rest_in_a_line(clone: Path):
    done = command(clone, "check", "2")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert sum("not started" in line for line in lines) == 1
    assert sum("Hint:" in line for line in lines) == 1
    assert sum(line.startswith("no ") for line in lines) == 14
    assert "0 of 25 points" in done.stdout


def test_from_the_starter_to_the_finish(clone: Path):
    refused = command(clone, "solution", "5")
    assert refused.returncode == 2
    assert "check 5" in refused.stderr
    solve(clone, "5")
    solved = command(clone, "check", "5")
    assert solved.returncode == 0, solved.stdout
    assert "25 of 25 points" in solved.stdout
    assert "Exercise 5 is solved" in solved.stdout
    assert "Next:" in solved.stdout
    assert "25 of 25" in command(clone, "list").stdout
    ours = command(clone, "solution", "5")
    assert ours.returncode == 0
    assert ours.stdout.rstrip() == find("5").solution.read_text().rstrip()


def test_hints_come_one_after_another(clone: Path):
    told = [command(clone, "hint", "2").stdout for _ in range(4)]
    assert len(set(told)) == 3
    assert told[2] == told[3]


@each_exercise
def test_there_are_three_hints(exercise):
    assert len(re.findall(r"(?m)^## ", exercise.hints.read_text())) == 3


def test_reset_keeps_what_was_written(clone: Path):
    file = clone / find("2").file.relative_to(ROOT)
    for text in ("first = 1\n", "second = 2\n"):  # within a second, too
        file.write_text(text)
        assert command(clone, "reset", "2").returncode == 0
    assert file.read_text() == find("2").starter.read_text()
    kept = {path.read_text() for path in (clone / ".exercises-backups").iterdir()}
    assert kept == {"first = 1\n", "second = 2\n"}


def test_a_broken_file_of_progress_is_no_error(clone: Path):
    (clone / ".exercises.json").write_text('{"ex1_docker_challenge": 3}')
    assert command(clone, "list").returncode == 0


def test_unknown_exercises_are_refused_with_what_there_is(clone: Path):
    done = command(clone, "check", "9")
    assert done.returncode == 2
    assert "1 (ex1_docker_challenge)" in done.stderr
    with pytest.raises(UnknownExercise):
        find("ex9")
    assert find("ex2") == find("2") == find("ex2_load_test")


@each_exercise
def test_commands_of_the_docstring_run(exercise, clone: Path):
    doc = ast.get_docstring(ast.parse(exercise.starter.read_text())) or ""
    found = re.findall(r"python -m exercises\S*(?: \w+)*", doc)
    assert any(f"check {exercise.number}" in words for words in found)
    assert any(words.endswith(f"exercises.{exercise.name}") for words in found)
    for words in found:
        done = python(clone, *shlex.split(words)[1:])
        assert (done.returncode, done.stderr) == (1, ""), words
        assert "not started" in done.stdout


@each_exercise
def test_the_docstring_agrees_with_the_catalogue(exercise):
    doc = ast.get_docstring(ast.parse(exercise.starter.read_text())) or ""
    title = exercise.title[0].lower() + exercise.title[1:]
    assert doc.startswith(f"Exercise {exercise.number}: {title}.")
    assert f"Minutes   {exercise.minutes}" in doc
    assert exercise.before in " ".join(doc.split())
    assert "Points    25" in doc


# ---------------------------------------------------------------- watch


@pytest.fixture
def watching(clone: Path) -> Iterator[process.Child]:
    argv = [sys.executable, "-u", "-m", "exercises", "watch", "5"]
    with chdir(clone), process.child(argv) as running:  # a child runs where we are
        yield running


def until(running: process.Child, text: str) -> None:
    process.wait_until(lambda: text in running.output(), DEADLINE_S, f"{text!r}")


def test_watch_checks_at_once_at_each_save_and_ends_when_solved(
    watching: process.Child, clone: Path
):
    until(watching, "0 of 25 points")
    file = clone / find("5").file.relative_to(ROOT)
    solution = find("5").solution.read_text()
    file.write_text("def f(:\n")
    until(watching, "SyntaxError")
    wrong = "return cold_s  # and the queue?"
    file.write_text(solution.replace("return cold_s + (rate - before)", f"{wrong} ("))
    until(watching, "14 of 25 points, 9 left open")
    new = file.with_suffix(".new")  # as an editor saves: a new file, renamed
    new.write_text(solution)
    new.replace(file)
    until(watching, "Now the 4 checks that take longer")
    until(watching, "Exercise 5 is solved")
    assert watching.process.wait(DEADLINE_S) == 0
    assert (
        watching.output().count("Compare with ours") == 1
    )  # when all has been checked


def test_watch_ends_with_ctrl_c(watching: process.Child):
    until(watching, "0 of 25 points")
    watching.process.send_signal(signal.SIGINT)
    assert watching.process.wait(DEADLINE_S) == 130


# ---------------------------------------------------------------- grading one file


def graded(tmp_path: Path, text: str) -> Graded:
    file = tmp_path / "ex2_load_test.py"
    file.write_text(text)
    return runner.grade(find("2"), file, quick=True)


def passed(result: Graded) -> list[str]:
    return [check.name for check in result.checks if check.passed]


def test_what_ends_the_grader_in_the_middle_loses_what_was_left(tmp_path: Path):
    text = find("2").solution.read_text()
    text += "\ndef percentile(groups, q):\n    import os\n    os._exit(0)\n"
    result = graded(tmp_path, text)
    assert "fire_keeps_the_order" in passed(result)
    lost = {x.message for x in result.checks if x.name.startswith("percentile")}
    assert lost == {"never finished: your file ended the grader with exit code 0"}


def test_what_a_submission_prints_is_kept_beside_its_failure(tmp_path: Path):
    text = "def schedule(*_):\n    print('look at me')\n    return []\n"
    first = graded(tmp_path, text).failed[0]
    assert "look at me" in first.printed
    assert "called schedule(200.0, 50.0, 3), expected " in first.message


def test_an_error_names_the_learners_own_line(tmp_path: Path):
    result = graded(tmp_path, "def schedule(*_):\n\n    return 1 / 0\n")
    message = result.failed[0].message
    assert "got ZeroDivisionError: division by zero (line 3 of ex2" in message


def test_a_call_without_end_fails_its_own_checks_only(tmp_path: Path):
    text = find("2").solution.read_text()
    text += "\ndef percentile(groups, q):\n    while True:\n        pass\n"
    result = graded(tmp_path, text)
    assert {x.name.split("_")[0] for x in result.failed} == {"percentile"}
    assert all("time limit" in x.message for x in result.failed)


def test_a_submissions_processes_end_with_the_grading(tmp_path: Path):
    text = f"""
import subprocess, sys
made = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open({str(tmp_path / "pid")!r}, "w").write(str(made.pid))
"""
    graded(tmp_path, text)
    pid = int((tmp_path / "pid").read_text())

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    process.wait_until(gone, DEADLINE_S, "the submission's process to be gone")


def test_a_thread_that_goes_on_keeps_nobody_waiting(tmp_path: Path):
    text = find("2").solution.read_text()
    text += (
        "\nimport threading\nthreading.Thread(target=time.sleep, args=(999,)).start()"
    )
    result = graded(tmp_path, text)
    assert result.failed == []
    assert result.seconds < 999  # what the thread would take


def test_a_value_of_another_kind_fails_and_says_so(tmp_path: Path):
    text = find("2").solution.read_text()
    text += "\ndef schedule(*_):\n    return ['soon'] * 10_000\n"
    messages = {x.name: x.message for x in graded(tmp_path, text).failed}
    assert "of the kinds that the docstring names" in messages["schedule_is_poisson"]
    assert "TypeError" in messages["schedule_is_poisson"]


def test_a_file_that_is_not_there_gets_nothing(tmp_path: Path):
    result = runner.grade(find("2"), tmp_path / "ex2_load_test.py", quick=True)
    assert (result.score, result.sha256) == (0, None)
    assert "found no file" in result.failed[0].message


def test_a_grader_that_cannot_run_is_no_fault_of_the_learner(tmp_path: Path):
    broken = dataclasses.replace(find("2"), name="ex9_none")
    with pytest.raises(runner.GraderError, match=r"(?s)grade_ex9_none.*exercises doc"):
        runner.grade(broken, find("2").file)


@pytest.mark.docker
def test_ctrl_c_leaves_no_container_of_the_grader(docker_engine: Engine, clone: Path):
    solve(clone, "1")
    argv = [sys.executable, "-m", "exercises", "check", "1"]

    def listed() -> list[Any]:
        # Others' containers may vanish while they are looked at.
        return docker_engine.client.containers.list(all=True, ignore_removed=True)

    before = {x.id for x in listed()}

    def made() -> list[str]:
        found = listed()
        images = {x.id: x.attrs["Config"]["Image"] for x in found}
        return [
            id
            for id, image in images.items()
            if id not in before and image.startswith("exercise-1:")
        ]

    with chdir(clone), process.child(argv, stop_s=40) as running:
        # An engine that has no image yet builds the naive one first.
        process.wait_until(made, EXERCISES[0].limit_s, "a container of the grader")
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(DEADLINE_S) == 130
    assert made() == []


def test_a_report_that_is_being_written_is_read_as_far_as_it_goes(tmp_path: Path):
    report = tmp_path / "report.jsonl"
    assert runner._lines(report) == []
    report.write_text('{"checks": [{"name": "a"}')
    assert runner._lines(report) == []
    report.write_text('{"checks": [{"name": "a"}]}\n{"name": {}')
    assert runner._lines(report) == [{"checks": [{"name": "a"}]}]


def test_one_broken_grader_takes_no_result_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def grade(exercise: Exercise) -> Graded:
        if exercise.number == 1:
            raise runner.GraderError("broken")
        return dataclasses.replace(SOME, exercise=exercise.name)

    monkeypatch.setattr(runner, "grade", grade)
    told = tmp_path / "of" / "today" / "results.json"  # folders that are not there yet
    assert main(["grade", "--json", str(told)]) == 2
    assert "ex1_docker_challenge: broken" in capsys.readouterr().err
    graded = results.read(told)
    assert [each.exercise for each in graded] == [x.name for x in EXERCISES[1:]]


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_where_nothing_can_be_written_is_told_before_grading(clone: Path, option: str):
    done = command(clone, "grade", option, "exercises")
    assert done.returncode == 2
    assert f"Expected {option} to name a file" in done.stderr
    assert "ex1" not in done.stdout


# ---------------------------------------------------------------- results


SOME = Graded(
    "ex1_docker_challenge",
    "A container",
    "exercises/ex1.py",
    "ab" * 32,
    1.5,
    (
        Check("a", "It holds", 3, True),
        Check("b", "It is not so", 2, False, "got `</td>|`\n# x", "think"),
        Check("c", "An engine says so", 4, None, "no engine"),
    ),
)


def test_results_read_back_as_they_were_written(tmp_path: Path):
    path = tmp_path / "reports" / "results.json"
    results.write(path, [SOME])
    assert results.read(path) == [SOME]
    assert (SOME.score, SOME.points, SOME.full) == (3, 9, False)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "another"}', '{"schema": 1'])
def test_what_holds_no_results_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(results.ResultsError, match=r"results\.json: expected"):
        results.read(path)


def test_what_was_not_checked_is_no_pass_anywhere():
    told = exporters.gradescope([SOME])
    assert told["score"] == 3
    assert [t["score"] for t in told["tests"]] == [3, 0, 0]
    assert [t["max_score"] for t in told["tests"]] == [3, 2, 4]
    assert [t.get("status") for t in told["tests"]] == ["passed", "failed", None]
    assert "| A container | 3 of 9 | 4 |" in exporters.markdown([SOME])


def test_a_message_stays_text_in_markdown():
    lines = exporters.markdown([SOME]).splitlines()
    (line,) = [line for line in lines if "It is not so" in line]
    assert line.endswith("`got '</td>|' # x`")
    assert "# x" not in lines


def test_exporters_read_the_file_that_grading_wrote(tmp_path: Path):
    path = tmp_path / "results.json"
    results.write(path, [SOME])
    done = python(ROOT, "-m", "exercises.exporters", "gradescope", str(path))
    assert json.loads(done.stdout)["score"] == 3
    refused = python(ROOT, "-m", "exercises.exporters", "markdown", str(tmp_path))
    assert refused.returncode == 2
    assert "python -m exercises grade --json" in refused.stderr


# ---------------------------------------------------------------- starters, doctor


def test_a_starter_has_a_raise_where_the_solution_was():
    solution = (
        "# BEGIN SOLUTION\nimport math\n\n# END SOLUTION\n"
        "def f():\n    # TODO(1a): x.\n"
        "    # BEGIN SOLUTION\n    return math.pi\n    # END SOLUTION\n"
    )
    expected = "def f():\n    # TODO(1a): x.\n    raise NotImplementedError\n"
    assert starter.derive(solution) == expected


@pytest.mark.parametrize(
    "text",
    [
        "# BEGIN SOLUTION\nx\n",
        "x\n# END SOLUTION\n",
        "# BEGIN SOLUTION\n  # END SOLUTION\n",
    ],
)
def test_lone_markers_are_refused(text: str):
    with pytest.raises(starter.MarkerError, match="pairs"):
        starter.derive(text)


def test_doctor_tells_what_to_do_without_an_engine(clone: Path):
    done = command(clone, "doctor", DOCKER_HOST="unix:///nowhere/docker.sock")
    assert done.returncode == 0, done.stdout
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("Docker engine")]
    assert "missing" in line
    assert "docker" in line.partition("none that answers.")[2]


def test_doctor_finds_a_wrong_version(monkeypatch: pytest.MonkeyPatch):
    assert doctor.pins().good
    wanted = {**doctor._wanted("requirements.txt"), "numpy": "0.1", "no-such": "1"}
    monkeypatch.setattr(doctor, "_wanted", lambda _: wanted)
    found = doctor.pins()
    assert not found.good
    assert "(expected 0.1), no-such none (expected 1)" in found.found
    assert "pip install -r requirements.txt" in found.do


@pytest.mark.parametrize(("gib", "good"), [(3.8, True), (2.0, None)])
def test_doctor_takes_a_machine_of_four_gigabytes(
    monkeypatch: pytest.MonkeyPatch, gib: float, good: bool | None
):
    monkeypatch.setattr(doctor, "memory_bytes", lambda: gib * 2**30)
    assert doctor.ram().good is good


def test_doctor_finds_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        found = doctor._port(number, "python model_api.py --serve")
    assert found.good is None
    assert f"--port {number + 1}" in found.do


def test_without_an_engine_those_checks_stay_open_and_earn_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    result = runner.grade(find("1"), find("1").solution)
    assert result.failed == []
    assert {x.name for x in result.unchecked} == {
        x.name for x in result.checks if x.slow
    }
    assert all("none that answers. To run it:" in x.message for x in result.unchecked)
    assert result.score == 18
    assert not result.full
