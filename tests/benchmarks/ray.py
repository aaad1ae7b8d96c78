"""Ray Serve: the shared model on two nodes, and one of them killed under load.

Two nodes on this machine, each with room for one replica. A steady load comes, every
process of the second node gets SIGKILL, and a new node joins. Counted are the tries
that failed and the requests whose client had to ask again; timed is how long the
cluster was one replica short.

Run it:     python -m tests.benchmarks.ray [--quick]    two minutes, or under one
Needs:      pip install -r requirements-ray.txt
"""

from __future__ import annotations

from course import lesson
from course.show import Cell, Table
from local_cloud.scaling import ray_serve
from local_cloud.scaling.ray_serve import Killed, Trial
from tests.benchmarks import AFTER_LESSONS

TRIALS, QUICK_TRIALS = 3, 1


def node_killed(run: lesson.Run) -> None:
    """Trials one after the other, each with a cluster of its own."""
    if not ray_serve.is_installed():
        raise lesson.Skip("Ray Serve is not installed", ray_serve.INSTALL)
    trial, count = Trial(), QUICK_TRIALS if run.quick else TRIALS
    run.predict(
        "Half of the replicas go at once: what was with them fails, and is asked again."
    )
    with run.progress("node killed", count) as advance:
        found = []
        for _ in range(count):
            found.append(ray_serve.kill_a_node(trial))
            advance()
    run.table(killed_table(found, trial))
    sent, answered = sum(one.sent for one in found), sum(one.answered for one in found)
    failed = sum(one.failed_tries for one in found)
    run.conclude(
        f"Of {sent} requests {answered} were answered (bar: all); {failed} tries "
        "failed on the way."
    )


def killed_table(found: list[Killed], trial: Trial) -> Table:
    """A row a trial."""
    rows: list[list[Cell]] = []
    for number, one in enumerate(found, 1):
        counts = [one.sent, one.answered, one.failed_tries, one.retried]
        times = [one.healthy_s, 1000 * one.median_s, 1000 * one.longest_s]
        rows.append([number, *counts, *times])
    columns = ["trial", "requests", "answered", "failed tries", "asked again"]
    columns += [("two replicas again", "s"), ("median", "ms"), ("longest", "ms")]
    note = f"{trial.rate_per_s:g} requests/s, open loop, {trial.tokens} tokens each; "
    note += "two nodes on 127.0.0.1, a new one joins after the kill"
    return Table("A node with one of two replicas is killed", columns, rows, note)


SECTIONS = [lesson.Section("A node is killed", node_killed)]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    raise SystemExit(main())
