"""Which exercises there are, and where their files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRADERS = ROOT / "tests" / "graders"
POINTS = 25  # an exercise


class UnknownExercise(LookupError):
    """No exercise has this number or name."""


@dataclass(frozen=True)
class Exercise:
    """One exercise: `limit_s` is what grading it may take in all, whatever happens."""

    number: int
    name: str
    title: str
    minutes: int  # a learner needs
    before: str  # what to have read
    limit_s: float = 120.0

    @property
    def file(self) -> Path:
        """What the learner writes in."""
        return ROOT / "exercises" / f"{self.name}.py"

    @property
    def starter(self) -> Path:
        """What the learner begins with, kept for `reset`; made by `starter`."""
        return ROOT / "exercises" / "starters" / f"{self.name}.py"

    @property
    def hints(self) -> Path:
        """Three steps of help, each under a heading of its own."""
        return ROOT / "exercises" / "hints" / f"{self.name}.md"

    @property
    def grader(self) -> Path:
        return GRADERS / f"grade_{self.name}.py"

    @property
    def solution(self) -> Path:
        """The source of the starter; a student bundle has none."""
        return GRADERS / "solutions" / f"{self.name}.py"

    @property
    def variants(self) -> Path:
        """Wrong and right answers that the grader is tested with."""
        return GRADERS / "variants" / self.name


EXERCISES = (
    Exercise(
        1,
        "ex1_docker_challenge",
        "A container that beats the naive one",
        minutes=60,
        before="docker_deployment.py, sections 1 to 3",
        limit_s=600.0,  # building the naive image for comparison takes minutes, once
    ),
    Exercise(
        2,
        "ex2_load_test",
        "A load test that finds the bottleneck",
        minutes=60,
        before="model_api.py, section 2; scaling_strategies.py, section 2",
    ),
    Exercise(
        3,
        "ex3_serverless_vs_container",
        "The same model as a function and as a container",
        minutes=60,
        before="serverless_deployment.py, sections 1 to 3",
        limit_s=600.0,  # building the container's image takes minutes, once
    ),
    Exercise(
        4,
        "ex4_fireworks_function",
        "A function that keeps the books, and its bill",
        minutes=60,
        before="fireworks_deployment.py, sections 2 and 3",
    ),
    Exercise(
        5,
        "ex5_autoscaler",
        "An autoscaler that keeps its promise for less",
        minutes=90,
        before="scaling_strategies.py, section 1",
    ),
    Exercise(
        6,
        "ex6_slo_alerts",
        "Alerts that wake somebody for the right reason",
        minutes=90,
        before="monitoring_setup.py, section 3",
    ),
)


def find(word: str) -> Exercise:
    """The exercise of this number ("2") or name ("ex2", "ex2_load_test")."""
    for exercise in EXERCISES:
        if word in (str(exercise.number), f"ex{exercise.number}", exercise.name):
            return exercise
    known = ", ".join(f"{x.number} ({x.name})" for x in EXERCISES)
    raise UnknownExercise(f"Expected an exercise, found {word!r}. There are: {known}.")
