"""The queue: messages a second, by batch and processes, and in a storm of kills.

Messages of 200 bytes on this disk. A send waits until the disk has them; a receive and
a delete do not. The storm is tests/storm.py: producers and workers are killed with
SIGKILL at random moments, and each side effect is committed one by one.

Run it:     python -m tests.benchmarks.queue [--quick]           a minute and a half
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from course import lesson
from course.measure import Series
from course.show import Cell, Table
from local_cloud.functions.queue import Queue
from tests.benchmarks import AFTER_LESSONS
from tests.storm import storm

ROOT = Path(__file__).parents[2]
ROUNDS, QUICK_ROUNDS = 5, 2
MESSAGES = 4000  # of all processes together, a round
BODY = "x" * 200
BAR = 1000  # messages a second
CASES = [(batch, processes) for batch in (1, 10) for processes in (1, 4)]


def send(path: str, batch: int, count: int) -> None:
    """Sends `count` messages."""
    with Queue(path) as queue:
        _ready()
        for _ in range(count // batch):
            queue.send_batch([BODY] * batch)


def take(path: str, batch: int, count: int) -> None:
    """Receives and deletes until nothing is left; `count` is not its concern."""
    with Queue(path) as queue:
        _ready()
        while messages := queue.receive(batch):
            queue.delete_batch([message.receipt for message in messages])


def _ready() -> None:
    """Waits until all processes are up, so that their start is not measured."""
    print("ready", flush=True)
    sys.stdin.read()


def rate(path: Path, role: str, batch: int, processes: int) -> float:
    """Messages a second of so many processes together."""
    argv = [sys.executable, "-m", "tests.benchmarks.queue", "--role", role]
    argv += [str(path), str(batch), str(MESSAGES // processes)]
    running = [
        subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(processes)
    ]
    try:
        for process in running:
            assert process.stdin
            assert process.stdout
            if process.stdout.readline() != b"ready\n":
                raise RuntimeError(f"Expected a process to start: {argv}")
        start = time.perf_counter()
        for process in running:
            assert process.stdin
            process.stdin.close()  # go
        for process in running:
            if process.wait(120):
                raise RuntimeError(f"Expected exit code 0, found {process.returncode}")
        return MESSAGES / (time.perf_counter() - start)
    finally:
        for process in running:
            process.kill()
            process.wait()


def throughput(run: lesson.Run) -> None:
    """Sends, then receives and deletes, by batch and processes."""
    run.predict("Ten a call are several times faster: one commit for ten.")
    rounds = QUICK_ROUNDS if run.quick else ROUNDS
    found: dict[tuple[str, int, int], list[float]] = {}
    with run.progress("throughput", rounds * len(CASES)) as advance:
        for _ in range(rounds):
            for batch, processes in CASES:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "queue"
                    for role in ("send", "take"):
                        told = rate(path, role, batch, processes)
                        found.setdefault((role, batch, processes), []).append(told)
                advance()
    rows: list[list[Cell]] = []
    for (role, batch, processes), rates in sorted(found.items()):
        series = Series(tuple(rates))
        name = "send" if role == "send" else "receive and delete"
        rows.append([name, batch, processes, series.median, series.spread, series.n])
    columns = ["call", ("batch", "messages"), "processes"]
    columns += [("median", "messages/s"), ("spread", "messages/s"), "n"]
    run.table(Table("Throughput", columns, rows))
    slowest = min(Series(tuple(rates)).median for rates in found.values())
    run.conclude(f"The slowest way moves {slowest:,.0f} messages/s (bar: {BAR:,}).")


def kills(run: lesson.Run) -> None:
    """The same work on a quiet day and in a storm."""
    run.predict("Kills cost the restarts and redeliveries, and never a message.")
    rounds, count = (QUICK_ROUNDS if run.quick else ROUNDS), 8000
    cases = {"nobody": None, "one every 40 ms": 0.04}
    outcomes: dict[str, list] = {name: [] for name in cases}
    with run.progress("storm", rounds * len(cases)) as advance:
        for seed in range(rounds):
            for name, every_s in cases.items():
                with tempfile.TemporaryDirectory() as folder:
                    options = {"count": count, "kill_every_s": every_s, "seed": seed}
                    outcomes[name].append(storm(Path(folder), **options))
                advance()
    rows: list[list[Cell]] = []
    for name, told in outcomes.items():
        series = Series(tuple(len(o.done) / o.seconds for o in told))
        again = sum(o.deliveries - o.total for o in told)
        lost = sum(len(o.lost) for o in told)
        twice = sum(o.total - len(o.done) for o in told)
        row: list[Cell] = [name, series.median, series.spread]
        row += [sum(o.kills for o in told), again, lost, twice, series.n]
        rows.append(row)
    columns = ["killed", ("median", "messages/s"), ("spread", "messages/s"), "kills"]
    columns += ["delivered again", "lost", "done twice", "n"]
    note = "2 producers in batches of 10, 3 workers; process starts are included."
    run.table(Table("Storm", columns, rows, note))
    run.conclude(
        f"In the storm {rows[1][1]:,.0f} messages/s (bar: {BAR:,}), {rows[1][5]} lost, "
        f"{rows[1][6]} done twice (bar: 0)."
    )


SECTIONS = [
    lesson.Section("Throughput", throughput),
    lesson.Section("Storm", kills),
]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the tables."""
    return lesson.run(doc=__doc__, sections=SECTIONS, argv=argv, number=AFTER_LESSONS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        role, path, batch, count = sys.argv[2:]
        {"send": send, "take": take}[role](path, int(batch), int(count))
    else:
        raise SystemExit(main())
