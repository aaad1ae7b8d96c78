"""The README's commands are run as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from course import process
from models import build

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LIMIT_S = 240.0
# How the README's long lines begin. What follows runs here in the environment of the
# tests; CI runs the line that tests, whole and in a fresh environment.
SET_UP = re.compile(
    r"python3 -m venv \.venv && \.venv/bin/pip install -q -r (?P<file>\S+) && "
    r"\.venv/bin/python (?P<rest>.+)"
)
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "build", "reports", "__pycache__", ".*_cache", "node_modules"
)


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str = README) -> list[str]:
    """The shell commands of all blocks; a backslash continues a line."""
    joined = "".join(blocks("bash", text)).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, as a clone would be: nothing here changes the real."""
    place = tmp_path_factory.mktemp("clone") / "course"
    shutil.copytree(ROOT, place, ignore=NOT_COPIED)
    author = ["-c", "user.name=reader", "-c", "user.email=reader@localhost"]
    for step in (["init"], ["add", "--all"], [*author, "commit", "--message=clone"]):
        subprocess.run(["git", *step], cwd=place, check=True, stdout=subprocess.DEVNULL)
    return place


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`python` is the one of the tests, as activating makes it that of `.venv`; the
    model is the one that is built."""
    bin = tmp_path_factory.mktemp("bin")
    for name in ("python", "python3"):
        (bin / name).symlink_to(sys.executable)
    # A link alone would look for its packages beside itself.
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    return {
        **os.environ,
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": packages,
        "MODEL_DIR": str(build.model_folder()),
    }


@pytest.fixture(scope="module")
def served(clone: Path, environment: dict[str, str]) -> Iterator[str]:
    """The server of the README's first line, on a free port; gives its address."""
    first = SET_UP.fullmatch(commands()[0])
    assert first, "the README's first command sets up and serves"
    port = process.free_port()
    script, *options = first["rest"].split()
    argv = [sys.executable, str(clone / script), *options, "--port", str(port)]
    ready = f"http://127.0.0.1:{port}/health/ready"
    with process.child(argv, env=environment, ready=ready, deadline_s=120):
        yield f"127.0.0.1:{port}"


def shell(command: str, clone: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command,
        shell=True,
        executable="/bin/bash",
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_two_lines_install_what_is_there():
    lines = [line for line in commands() if "venv .venv" in line]
    found = [SET_UP.fullmatch(line) for line in lines]
    assert [match and match["rest"] for match in found] == [
        "model_api.py --serve",
        "-m pytest",
    ]
    assert all(match and (ROOT / match["file"]).is_file() for match in found)


def test_the_environment_is_activated_before_the_first_python():
    first = re.search(r"^python ", README, re.MULTILINE)
    assert first
    assert ". .venv/bin/activate" in README[: first.start()]


@pytest.mark.skipif(not shutil.which("curl"), reason="apt-get install curl")
def test_curl_gets_an_answer(served: str, clone: Path, environment: dict[str, str]):
    (command,) = [line for line in commands() if line.startswith("curl")]
    said = shell(command.replace("127.0.0.1:8000", served), clone, environment)
    assert said.count("data: {") > 5
    assert said.rstrip().endswith("data: [DONE]")


def test_the_snippet_prints_an_answer(
    served: str, clone: Path, environment: dict[str, str]
):
    (snippet,) = blocks("python")
    (clone / "snippet.py").write_text(snippet.replace("127.0.0.1:8000", served))
    said = shell("python snippet.py", clone, environment)
    assert "gravity" in said.lower()


@pytest.mark.parametrize(
    "command", [c for c in commands() if not re.match(r"python3 -m venv|curl", c)]
)
def test_a_command_runs(command: str, clone: Path, environment: dict[str, str]):
    shell(command, clone, environment)
