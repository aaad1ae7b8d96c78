"""Child processes that never outlive their `with` block, and waits that end."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TypeVar

TAIL_BYTES = 65_536  # of a child's output that are kept
TAIL_LINES = 20  # of it that an error shows
POLL_S = 0.05

T = TypeVar("T")
Ready = str | Callable[[], object] | None


class ChildError(RuntimeError):
    """A child process that did not become ready."""


class Child:
    """A running child process: its `pid`, what it wrote, and whether it lives."""

    def __init__(self, argv: Sequence[str], process: subprocess.Popen, log: IO[bytes]):
        self.argv = tuple(argv)
        self.process = process
        self.pid = process.pid
        self._log = log
        self._last_words: str | None = None

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        """The end of what it has written so far to stdout and stderr."""
        if self._last_words is not None:
            return self._last_words
        size = os.fstat(self._log.fileno()).st_size
        start = max(0, size - TAIL_BYTES)
        # pread leaves alone the position that the child is writing at.
        tail = os.pread(self._log.fileno(), TAIL_BYTES, start)
        return tail.decode("utf-8", "replace")

    def last_lines(self, count: int = TAIL_LINES) -> str:
        """Its last lines, indented, for an error message."""
        lines = self.output().splitlines()[-count:]
        return "\n".join("    " + line for line in lines or ["(it wrote nothing)"])

    def stop(self, stop_s: float) -> None:
        """Asks the whole group to end, and after `stop_s` seconds makes it.

        A second Ctrl-C while waiting skips the rest of the wait, not the end.
        """
        try:
            _signal_group(self.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(stop_s)
        finally:
            # Also when the leader is gone: its children may have stayed.
            _signal_group(self.pid, signal.SIGKILL)
            self.process.wait()
            self._last_words = self.output()


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(
        ProcessLookupError, PermissionError
    ):  # gone, or only a zombie (macOS)
        os.killpg(group, number)


@contextmanager
def child(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    ready: Ready = None,
    deadline_s: float = 30.0,
    stop_s: float = 5.0,
) -> Iterator[Child]:
    """Runs a program beside this one for the length of the block.

    Args:
        argv: the program and its arguments; no shell is involved.
        env: variables set in addition to this process's own.
        ready: what tells that it is up: a URL that answers 200, a function that
            returns something true, or None for "at once".
        deadline_s: seconds it may take to be ready.
        stop_s: seconds it gets between SIGTERM and SIGKILL.

    It leads its own process group, so that its children end with it, and Ctrl-C
    reaches this process alone, which then ends the group. If it dies early, or the
    block fails, the error shows the last lines of its output.
    """
    with tempfile.TemporaryFile(prefix="child-") as log:
        process = subprocess.Popen(
            list(argv),
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        running = Child(argv, process, log)
        try:
            _await_ready(running, ready, deadline_s)
            yield running
        except ChildError:
            raise
        except Exception as error:
            error.add_note(_words(running))
            raise
        finally:
            running.stop(stop_s)


def _await_ready(running: Child, ready: Ready, deadline_s: float) -> None:
    if ready is None:
        return
    check = (lambda: answers(ready)) if isinstance(ready, str) else ready
    start = time.monotonic()

    def settled() -> bool:
        # Dead counts as settled: there is no use in waiting for the deadline.
        return not running.alive or bool(check())

    what = f"`{ready}` to answer 200" if isinstance(ready, str) else "it to be ready"
    try:
        wait_until(settled, deadline_s, what)
    except TimeoutError as late:
        raise ChildError(f"{late}\n{_words(running)}") from None
    if not running.alive:
        took = time.monotonic() - start
        raise ChildError(
            f"Expected {what}, found that it ended after {took:.1f} s with exit code "
            f"{running.process.returncode}.\n{_words(running)}"
        )


def _words(running: Child) -> str:
    command = shlex.join(running.argv)
    return f"Last output of `{command}`:\n{running.last_lines()}"


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Whether a GET of this URL is answered with 200; never through a proxy."""
    from http.client import HTTPException
    from urllib.request import ProxyHandler, build_opener

    try:
        with build_opener(ProxyHandler({})).open(url, timeout=timeout_s) as response:
            return response.status == 200
    except (OSError, HTTPException):  # refused, reset, timed out, another status
        return False


def wait_until(
    predicate: Callable[[], T], deadline_s: float, what: str, *, every_s: float = POLL_S
) -> T:
    """Calls `predicate` until it returns something true, and returns that.

    Raises TimeoutError, naming `what` was expected, after `deadline_s` seconds.
    """
    end = time.monotonic() + deadline_s
    while not (found := predicate()):
        if time.monotonic() >= end:
            raise TimeoutError(f"Expected {what} within {deadline_s:g} s, found: not.")
        time.sleep(every_s)
    return found


def free_port() -> int:
    """A port on 127.0.0.1 that nobody uses now; take it soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
