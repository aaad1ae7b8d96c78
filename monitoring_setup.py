"""What to measure of a model in production, and a promise that wakes somebody in time.

A model that fails does not fall silent: it answers late, or wrongly, or to half of its
callers, and the graphs of the machine look as always. Whoever alarms on every graph is
woken for nothing and soon sleeps on. Here a promise to the users (an objective) is data,
and everything follows from it: the alerts, their tests, the dashboard, and how long an
outage can last before somebody hears of it. Then things are broken, and the prediction
is compared with the clock.

You will see: one request followed from the client to the log line; the model's drift
and its energy; real alerts from real faults, timed; a dashboard of one table.

Run it:     python monitoring_setup.py              all four sections, a minute
            python monitoring_setup.py 3 --quick    one section, rough figures, soon
            python monitoring_setup.py --deploy     write deploy/prometheus and grafana
Import it:  from monitoring_setup import SLO, rules, detection_s, psi
Needs:      pip install -r requirements.txt; real alerts also: Prometheus (README)
Next:       change an objective, run section 3 again, and see what moves
"""

from __future__ import annotations

import argparse

from course import lesson
from course.lesson import Run

# ## Performance metrics collection
#


def demo_metrics(run: Run) -> None:
    """Section 1."""


# ## Logging and tracing systems
#


def demo_tracing(run: Run) -> None:
    """Section 2."""


# ## Alerting and notification systems
#


def demo_alerts(run: Run) -> None:
    """Section 3."""


# ## Dashboards for visibility
#


def demo_dashboards(run: Run) -> None:
    """Section 4."""


SECTIONS = [
    lesson.Section("Performance metrics collection", demo_metrics),
    lesson.Section("Logging and tracing systems", demo_tracing),
    lesson.Section("Alerting and notification systems", demo_alerts),
    lesson.Section("Dashboards for visibility", demo_dashboards),
]


def main(argv: list[str] | None = None) -> int:
    """Run the lesson, or write what is deployed."""
    return lesson.run(
        doc=__doc__,
        sections=SECTIONS,
        argv=argv,
        number=6,
        after="python -m course report",
        add_arguments=add_arguments,
        instead=lambda arguments: write_deploy() if arguments.deploy else None,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deploy", action="store_true", help="write deploy/prometheus and grafana"
    )


def write_deploy() -> int:
    """Write all generated files; gives the exit code."""
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
