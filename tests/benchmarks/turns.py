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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from course.process import ChildError

ROOT = Path(__file__).resolve().parents[2]
THREADS = len(os.sched_getaffinity(0))  # the same for every rival
DEADLINE_S = 300.0  # for one answer; the first one may build the model

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


class Worker:
    """A child process that answers questions, one at a time, over its pipes."""

    def __init__(self, process: subprocess.Popen[str], log: IO[bytes]) -> None:
        self.process, self.pid, self._log = process, process.pid, log

    def ask(self, question: str, **details: Any) -> Any:
        """Its answer, as JSON can carry it.

        Raises:
            ChildError: it ended, or gave no answer in time.
        """
        assert self.process.stdin and self.process.stdout
        line = ""
        try:
            print(
                json.dumps({"question": question, **details}),
                file=self.process.stdin,
                flush=True,
            )
            if select.select([self.process.stdout], [], [], DEADLINE_S)[0]:
                line = self.process.stdout.readline()
        except BrokenPipeError:
            pass  # it is dead: told below, with its last words
        if not line:
            raise ChildError(
                f"Expected an answer to {question!r} within {DEADLINE_S:.0f} s, found "
                f"none. Last output:\n{self._last_words()}"
            )
        return json.loads(line)

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")[-2000:]


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


def in_turns(turns: Sequence[tuple[int, Turn]], first: int = 0) -> list[Any]:
    """What one turn of each rival gives, in the order they are listed.

    Args:
        turns: for each rival its process group and what it does.
        first: the place in the list of the one that begins.
    """
    groups = [group for group, _ in turns]
    results: dict[int, Any] = {}
    for place in [*range(first, len(turns)), *range(first)]:
        group, turn = turns[place]
        with alone(group, groups):
            results[place] = turn()
    return [results[place] for place in range(len(turns))]
