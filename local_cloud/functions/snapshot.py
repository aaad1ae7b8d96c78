"""Start by fork: what SnapStart does with virtual machines, done with one process.

A function's init is the same every time, so it is done once: in a template, a process
that imports the handler, runs the before-snapshot hooks and then waits. Each sandbox is
a fork of it. The kernel copies page tables, not pages: a clone shares all memory with
its template until one of the two writes, and starts in milliseconds.

What is the same in all clones is the catch. Random generators, identifiers and open
connections were made before the fork: the after-restore hooks must make them anew.
Unlike SnapStart, which stores a whole virtual machine, a fork copies no threads: what
starts some in its init works there and not here.

`template.py` is the program that runs inside; this is the platform's side of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from local_cloud.functions.errors import FunctionError
from local_cloud.functions.sandbox import (
    Host,
    Sandbox,
    environment,
    launch,
    patience_s,
)

if TYPE_CHECKING:
    from local_cloud.functions.platform import Function

FORK_LIMIT_S = 10.0
PROGRAM = Path(__file__).with_name("template.py")
READY = b"ready"


class Template:
    """One initialised process: made with the object, forked by `clone`, ended by `end`.

    Raises:
        FunctionError: the init failed or took too long; the message has its log.
    """

    def __init__(self, function: Function, host: Host):
        self.function, self.host = function, host
        self.endpoint = host.api.open()
        self.folder = host.root / f"template-{uuid.uuid4().hex}"
        self.tmp.mkdir(parents=True)
        self._log = os.open(self.log_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        begin = time.perf_counter()
        with theirs:
            self._process = self._start(theirs.fileno())
        try:
            self._await_snapshot()
        except BaseException:
            self.end()
            raise
        self.init_ms = 1000 * (time.perf_counter() - begin)

    @property
    def tmp(self) -> Path:
        return self.folder / "tmp"

    @property
    def log_path(self) -> Path:
        return self.folder / "log"

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        """What the init and the before-snapshot hooks have written."""
        return self.log_path.read_text("utf-8", "replace")

    def clone(self, sandbox: Sandbox) -> int:
        """Fork a process that becomes this sandbox; returns its id.

        Raises:
            OSError: the template is gone, or there is no room for one more process.
        """
        order = {
            "id": sandbox.id,
            "doors": sandbox.limits.doors,
            "environment": {"TMPDIR": str(sandbox.tmp)},
        }
        pid = self._ask(order, [sandbox.log])["pid"]
        assert pid is not None
        return pid

    def code_of(self, pid: int) -> int | None:
        """How a clone ended, as `subprocess` tells it; None while it lives."""
        return self._ask({"code_of": pid}, [])["code"]

    def end(self) -> None:
        """End the template. Its clones stay: they are sandboxes, ended one by one."""
        self._control.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self.host.guardian.forget(self.pid)
        self.host.api.shut(self.endpoint)
        os.close(self._log)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, fd: int) -> subprocess.Popen:
        """Run `template.py` on the function, with its end of the control socket."""
        argv = [sys.executable, "-P", str(PROGRAM), self.function.handler, str(fd)]
        env = environment(self.function, self.endpoint.address, "snap-start")
        process = launch(argv, self.function, env, self.tmp, self._log, pass_fds=[fd])
        self.host.guardian.watch(process.pid)
        return process

    def _await_snapshot(self) -> None:
        limit_s = patience_s(self.function)
        self._control.settimeout(limit_s)
        try:
            if self._control.recv(64) == READY:
                return
            found = f"that it ended with exit code {self._process.wait()}"
        except TimeoutError:
            found = f"that it had not after {limit_s:g} s"
        raise FunctionError(
            f"{self.function.name}: expected its init to succeed for the snapshot, "
            f"found {found}. Mend it, or deploy without snapshot:\n{self.log()}"
        )

    def _ask(self, order: dict, fds: list[int]) -> dict[str, int | None]:
        with self._lock:
            self._control.settimeout(FORK_LIMIT_S)
            socket.send_fds(self._control, [json.dumps(order).encode()], fds)
            answer = self._control.recv(1024)
        if not answer:
            raise ConnectionResetError(
                f"snapshot of {self.function.name}: expected its template to answer, "
                "found that it has ended; deploy the function again"
            )
        return json.loads(answer)
