"""What a learner installs is enough for what a learner runs."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from exercises.catalogue import GRADERS, ROOT
from exercises.doctor import _wanted as named_in


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


def imported(file: Path) -> Iterator[str]:
    """The first words of all its imports."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_graders_need_only_what_a_learner_installs():
    ours = {path.stem for path in ROOT.iterdir()}
    graders = [*GRADERS.glob("*.py"), *GRADERS.glob("solutions/*.py")]
    modules = {name for file in graders for name in imported(file)}
    foreign = modules - ours - set(sys.stdlib_module_names)
    assert {"pytest", "jsonschema"} <= foreign  # this looks at something
    known, brought = packages_distributions(), brought_by("requirements.txt")
    for name in foreign:
        packages = {canonicalize_name(package) for package in known[name]}
        assert packages & brought, f"{name} is not brought by requirements.txt"
