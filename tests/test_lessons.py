"""What all lessons have in common: anatomy, an import that does nothing, an end."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from local_cloud.monitoring import stack

ROOT = Path(__file__).parent.parent
DEADLINE_S = 300.0

# The bullets of the guide, word for word: they are the headings of the sections.
GUIDE = {
    "docker_deployment": [
        "Creating optimized Dockerfiles for ML workloads",
        "Managing dependencies and environment variables",
        "Building multi-stage containers for efficiency",
        "Docker Compose for local testing",
    ],
    "model_api": [
        "Design RESTful endpoints for model inference",
        "Handle batch requests efficiently",
        "Implement proper error handling",
        "Add authentication and request validation",
    ],
    "serverless_deployment": [
        "Function-as-a-Service (FaaS) concepts",
        "Cold start mitigation strategies",
        "Memory and timeout optimization",
        "Event-driven AI applications",
    ],
    "fireworks_deployment": [
        "Setting up a Fireworks.ai account",
        "Configuring and deploying functions",
        "Optimizing performance and cost",
        "Monitoring and logging",
    ],
    "scaling_strategies": [
        "Auto-scaling configurations",
        "Load balancing techniques",
        "Queue-based architectures for peak handling",
        "Caching strategies for repeated requests",
    ],
    "monitoring_setup": [
        "Performance metrics collection",
        "Logging and tracing systems",
        "Alerting and notification systems",
        "Dashboards for visibility",
    ],
}
HEAVY = {"onnxruntime", "tokenizers", "httpx", "rich", "matplotlib", "docker"}
NEEDS = {"fireworks_deployment": {"httpx", "rich"}}  # the SDK imports them
WITH_PROMETHEUS = [
    pytest.mark.prometheus,
    pytest.mark.skipif(stack.found() is not None, reason=str(stack.found())),
]
each_lesson = pytest.mark.parametrize("name", GUIDE)


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def sections(name: str) -> list[tuple[str, Any]]:
    """Titles and demonstrations; a lesson that is deployed as a file has pairs."""
    found = importlib.import_module(name).SECTIONS
    return [
        pair if isinstance(pair, tuple) else (pair.title, pair.demo) for pair in found
    ]


@each_lesson
def test_the_headings_are_the_guides_bullets(name: str):
    headings = re.findall(r"^# ## (.+)$", source(name), re.MULTILINE)
    assert headings == GUIDE[name]
    assert [title for title, _ in sections(name)] == GUIDE[name]


@each_lesson
def test_each_section_ends_in_a_demonstration_of_its_own(name: str):
    demos = [demo.__name__ for _, demo in sections(name)]
    assert all(demo.startswith("demo_") for demo in demos)
    assert len(set(demos)) == 4
    text = source(name)
    places = [text.index(f"# ## {title}") for title in GUIDE[name]]
    for demo, start, end in zip(demos, places, [*places[1:], len(text)], strict=True):
        assert start < text.index(f"def {demo}(") < end


@each_lesson
def test_the_docstring_says_what_a_reader_needs(name: str):
    doc = ast.get_docstring(ast.parse(source(name))) or ""
    assert len(doc.splitlines()) <= 25
    for label in ("You will see:", "Run it:", "Import it:", "Needs:", "Next:"):
        assert label in doc
    assert f"python {name}.py" in doc


@each_lesson
def test_importing_does_nothing(name: str):
    heavy = HEAVY - NEEDS.get(name, set())
    code = (
        f"import sys, threading, {name};"
        f"print(threading.active_count(), {heavy!r} & set(sys.modules) or 'light')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    assert done.stdout.split() == ["1", "light"]


@pytest.mark.parametrize(
    "name",
    [
        "model_api",
        "serverless_deployment",
        "fireworks_deployment",
        "scaling_strategies",
        pytest.param("monitoring_setup", marks=WITH_PROMETHEUS),
    ],
)
def test_the_lesson_runs_as_a_newcomer_would_run_it(name: str, tmp_path: Path):
    """All four sections on the real model, offline: nothing skipped, nothing said."""
    figures = tmp_path / "figures.json"
    argv = [sys.executable, "-W", "error", f"{name}.py", "--quick"]
    done = subprocess.run(
        [*argv, "--json", str(figures)],
        cwd=ROOT,
        env={**os.environ, "REPORTS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = json.loads(figures.read_text())["sections"]
    assert [section["title"] for section in told] == GUIDE[name]
    assert {section["outcome"] for section in told} == {"done"}
    assert "SKIPPED" not in done.stdout
    pictures = list(tmp_path.glob(f"{name}-*.png"))
    assert pictures
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
    if name == "monitoring_setup":
        the_drill_went_well(told[2])


def the_drill_went_well(section: dict[str, Any]) -> None:
    """Each fault found, told and over; the blip silent. Not when: machines are busy."""
    (drill,) = [e for e in section["events"] if "As promised" in e.get("note", "")]
    names = [column["name"] for column in drill["columns"]]
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in drill["rows"]}
    blip = rows.pop("errors, 1 in a row")
    assert (blip["alert"], blip["webhook"], blip["as promised"]) == ("none", "-", True)
    assert len(rows) == 2
    for row in rows.values():
        assert row["alert"] == "AvailabilityBurn"
        assert "-" not in (row["measured"], row["webhook"], row["mail"])
        assert row["resolved"] != "-"
    said = [e["text"] for e in section["events"] if e["kind"] == "say"]
    assert "The page of the errors: errors: promised: 0.99 of requests" in said[-1]
    assert "{{" not in said[-1]


def test_the_alerts_come_without_prometheus_too(tmp_path: Path):
    """What is missing is named with the command; the evaluator does the rest."""
    figures, empty = tmp_path / "figures.json", tmp_path / "empty"
    empty.mkdir()
    argv = [sys.executable, "-W", "error", "monitoring_setup.py", "3", "--quick"]
    done = subprocess.run(
        [*argv, "--json", str(figures)],
        cwd=ROOT,
        env={**os.environ, "REPORTS_DIR": str(tmp_path), "PATH": str(empty)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "SKIPPED" in done.stdout
    assert "by Evaluator" in done.stdout
    (section,) = json.loads(figures.read_text())["sections"]
    (skipped,) = [e for e in section["events"] if e["kind"] == "skipped"]
    assert skipped["command"] == stack.INSTALL
    assert section["outcome"] == "done"
    the_drill_went_well(section)
