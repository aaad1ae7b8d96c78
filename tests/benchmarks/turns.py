"""Rivals that take turns on the same cores, each in a process of its own.

Two engines in one process disturb each other: each keeps a pool of threads, and a
pool that has just worked spins for a while in case more work comes. So each rival gets
a process, and a process that is not at work is stopped by the operating system.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from course.lesson import Run
from course.process import ChildError

ROOT = Path(__file__).resolve().parents[2]
THREADS = len(os.sched_getaffinity(0))  # the same for every rival
DEADLINE_S = 300.0  # for one answer; the first one may build the model
DISTURBED = 0.05  # of the machine: with more in other hands, figures are doubtful
QUIET_S = 2.0  # without much of it: the machine is ours again
PATIENCE_S = 60.0  # for measuring again while others disturb, in one table
LAST_WORDS = 2000  # bytes of a dead child's output that an error shows
TICKS = os.sysconf("SC_CLK_TCK")  # a second of the kernel's accounts

T = TypeVar("T")
Turn = Callable[[], Any]


@contextmanager
def alone(one: int, everyone: Sequence[int]) -> Iterator[None]:
    """Stops all process groups but `one` for the length of the block."""
    others = [group for group in everyone if group != one]
    try:
        for group in others:
            os.killpg(group, signal.SIGSTOP)
        yield
    finally:
        for group in others:
            os.killpg(group, signal.SIGCONT)


class Bystanders:
    """What other programs took of the machine while it was measured."""

    def __init__(self) -> None:
        self.taken_s = self.offered_s = 0.0
        self.repeated, self.patience_s = 0, PATIENCE_S

    def watch(self, groups: Sequence[int], work: Callable[[], T]) -> T:
        """Does the work; does it anew if programs not in these groups did much.

        What decides is their share alone, never the result. Once patience is at its
        end, results count however they were: `tell` says what share was theirs.
        """
        while True:
            busy, ours, began = _busy_s(), _used_s(groups), time.monotonic()
            result = work()
            taken_s = _busy_s() - busy - (_used_s(groups) - ours)
            offered_s = (time.monotonic() - began) * (os.cpu_count() or 1)
            if taken_s <= DISTURBED * offered_s or self.patience_s <= 0:
                break
            self.repeated += 1
            self._wait_for_quiet()
            self.patience_s -= time.monotonic() - began
        self.taken_s += taken_s
        self.offered_s += offered_s
        return result

    def _wait_for_quiet(self) -> None:
        end = time.monotonic() + self.patience_s
        quiet = False
        while not quiet and time.monotonic() < end:
            busy = _busy_s()
            time.sleep(QUIET_S)
            quiet = _busy_s() - busy <= DISTURBED * QUIET_S * (os.cpu_count() or 1)

    def tell(self, run: Run) -> None:
        """Says how much it was, and whether that is too much."""
        share = max(0.0, self.taken_s / self.offered_s)
        run.fact("taken by other programs meanwhile", 100 * share, "% of the machine")
        if self.repeated:
            run.fact("repeated because they took more", self.repeated, "measurements")
        if share > DISTURBED:
            run.say("That is much: the figures are disturbed. Measure again in peace.")


def _busy_s() -> float:
    """CPU seconds of this machine that were not idle, since it started."""
    with open("/proc/stat") as file:
        times = [int(ticks) for ticks in file.readline().split()[1:9]]
    return (sum(times) - times[3] - times[4]) / TICKS  # idle, waiting for disks


def _used_s(groups: Sequence[int]) -> float:
    """CPU seconds of these processes and of this one."""
    total = time.process_time()
    for pid in groups:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


class Worker:
    """A child process that answers questions, one at a time, over its pipes."""

    def __init__(self, process: subprocess.Popen[str], log: IO[bytes]) -> None:
        self.process, self.pid, self._log = process, process.pid, log

    def ask(self, question: str, **details: Any) -> Any:
        """Its answer, as JSON can carry it.

        Raises:
            ChildError: it ended, or gave no answer in time.
        """
        writing, reading = self.process.stdin, self.process.stdout
        assert writing is not None
        assert reading is not None
        line = ""
        try:
            print(
                json.dumps({"question": question, **details}),
                file=writing,
                flush=True,
            )
            if select.select([reading], [], [], DEADLINE_S)[0]:
                line = reading.readline()
        except BrokenPipeError:
            pass  # it is dead: told below, with its last words
        if not line:
            raise ChildError(
                f"Expected an answer to {question!r} within {DEADLINE_S:.0f} s, found "
                f"none. Last output:\n{self._last_words()}"
            )
        return json.loads(line)

    def _last_words(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        # pread leaves alone the position that the child is writing at.
        tail = os.pread(self._log.fileno(), LAST_WORDS, max(0, size - LAST_WORDS))
        return tail.decode("utf-8", "replace")


@contextmanager
def worker(argv: Sequence[str]) -> Iterator[Worker]:
    """Runs a program that ends in `answer_questions`; it dies with the block."""
    with tempfile.TemporaryFile(prefix="worker-") as log:
        process = subprocess.Popen(
            list(argv),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        try:
            yield Worker(process, log)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # it has nothing to put in order
            process.communicate()


def answer_questions(answers: Mapping[str, Callable[..., Any]]) -> None:
    """The worker's side: between questions it sleeps in the read of a line."""
    for line in sys.stdin:
        details = json.loads(line)
        result = answers[details.pop("question")](**details)
        print(json.dumps(result), flush=True)


def in_turns(
    turns: Sequence[tuple[int, Turn]], number: int, bystanders: Bystanders
) -> list[Any]:
    """What one turn of each rival gives, in the order they are listed.

    Args:
        turns: for each rival its process group and what it does.
        number: of the round; who begins changes with it.
        bystanders: where the other programs' work is counted.
    """
    first = number % len(turns)
    groups = [group for group, _ in turns]
    results: list[Any] = [None] * len(turns)

    def everyone() -> None:
        for place in [*range(first, len(turns)), *range(first)]:
            group, turn = turns[place]
            with alone(group, groups):
                results[place] = turn()

    bystanders.watch(groups, everyone)
    return results
