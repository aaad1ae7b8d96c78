"""What a learner installs is enough for what a learner runs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from exercises.catalogue import GRADERS, ROOT
from exercises.doctor import _wanted as named_in
from tests.benchmarks.lessons import LESSONS
from tests.test_readme import blocks


def brought_by(file: str) -> set[str]:
    """The packages that a requirements file names, and all that those ask for."""
    waiting, found = list(named_in(file)), set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        with suppress(PackageNotFoundError):  # for another system
            asked = [Requirement(text) for text in requires(name) or ()]
            waiting += [
                one.name
                for one in asked
                if not one.marker or one.marker.evaluate({"extra": ""})
            ]
    return found


def imported(source: str) -> Iterator[str]:
    """The first words of all its imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def run_by_a_learner() -> Iterator[tuple[str, str]]:
    """Lessons, exercises, graders and the README's snippets: a name, and Python."""
    folders = (ROOT / "course", ROOT / "exercises", GRADERS)
    below = (path for folder in folders for path in folder.rglob("*.py"))
    for path in (*(ROOT / f"{name}.py" for name in LESSONS), *below):
        if path.name != "locustfile.py":  # says itself what it needs beyond
            yield str(path.relative_to(ROOT)), path.read_text("utf-8")
    for snippet in blocks("python"):
        yield "README.md", snippet


def test_what_a_learner_runs_needs_only_what_a_learner_installs():
    ours = {path.stem for path in ROOT.iterdir()}
    needed = {
        (name, file) for file, source in run_by_a_learner() for name in imported(source)
    }
    foreign = {x for x in needed if x[0] not in ours | set(sys.stdlib_module_names)}
    assert {"pytest", "jsonschema", "numpy", "openai"} <= {name for name, _ in foreign}
    known, brought = packages_distributions(), brought_by("requirements.txt")
    lacking = [
        f"{name} in {file}"
        for name, file in sorted(foreign)
        if not {canonicalize_name(package) for package in known[name]} & brought
    ]
    assert lacking == [], "not brought by requirements.txt"
