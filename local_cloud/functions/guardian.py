"""Ends a platform's processes when the platform could not do it itself.

A platform that is killed (kill -9, a crash) runs no clean-up. Its sandboxes would stay:
a handler in a loop for ever, since the deadline is the platform's to enforce; a frozen
one likewise, stopped. So a small process of its own session holds a pipe from the
platform, is told which process groups exist, and when the pipe closes kills what is
left and removes the control groups and the folder.

PR_SET_PDEATHSIG would be shorter and does not do: it fires when the *thread* that
started a process ends, and is Linux only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from local_cloud.functions.cgroup import end_group

REPOSITORY = Path(__file__).resolve().parents[2]


class Guardian:
    """The platform's end of the pipe."""

    def __init__(self, groups: list[Path], folder: Path | None):
        # Not -m: the package imports this module, and Python warns of the second one.
        code = f"import sys; from {__name__} import main; main(*sys.argv[1:])"
        argv = [sys.executable, "-S", "-c", code, str(folder or "")]
        self._process = subprocess.Popen(
            [*argv, *map(str, groups)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()

    def watch(self, group: int) -> None:
        """This process group must not outlive the platform."""
        os.write(self._pipe, b"+%d\n" % group)

    def forget(self, group: int) -> None:
        """It has ended; its number may be given to somebody else."""
        os.write(self._pipe, b"-%d\n" % group)

    def close(self) -> None:
        self._process.communicate()


def main(folder: str, *groups: str) -> None:
    """Reads until the platform is gone, then cleans up after it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    running: set[int] = set()
    for line in sys.stdin:
        (running.add if line[0] == "+" else running.discard)(int(line[1:]))
    for group in running:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for parent in map(Path, groups):
        for child in [*parent.glob("*/"), parent]:
            end_group(child)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
