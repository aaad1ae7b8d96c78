"""One execution environment: init, then one invocation at a time, frozen in between.

A sandbox is a process group under limits, with a folder of its own for its log and its
temporary files (TMPDIR; Lambda mounts /tmp, which needs root). Its life:

- init: the process starts, imports the handler and asks for work. Ten seconds at most
  while a caller waits, and the CPU is not limited yet, as on Lambda.
- invoke: the event goes out, the result comes back, or the deadline comes first. The
  runtime client never looks at the deadline: the platform kills.
- idle: it waits for `invocation/next`, and is frozen a little later.

What goes wrong ends as Lambda ends it: the same error types, messages and lines of log.
After a crash Lambda keeps the environment with its /tmp, and the next invocation begins
with another init, which has the function's timeout and counts as Duration. Here it gets
a new environment, and an init phase like any first one.

A snapshot's clone is a sandbox too. `snapshot.Template` forks it, and `restore` adopts
it: a process with an id of its own, its own group and its own mailbox.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from local_cloud.functions.cgroup import MB, Limits, Parent
from local_cloud.functions.guardian import Guardian
from local_cloud.functions.runtime_api import (
    MOST_BYTES,
    Call,
    Endpoint,
    Mailbox,
    RuntimeApi,
)

if TYPE_CHECKING:
    from local_cloud.functions.platform import Function
    from local_cloud.functions.snapshot import Template

INIT_LIMIT_S = 10.0  # of an init or a restore that a caller waits for
PATIENT_LIMIT_S = 130.0  # of one ahead of all callers, at least; see patience_s
LOG_BYTES = 2**20  # of one invocation's log that are kept: the end
LOG_FILE_BYTES = 8 * 2**20  # after which the file of a sandbox starts anew
ARN = "arn:aws:lambda:us-east-1:000000000000:function:"
PASSED_ON = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class Host:
    """What all sandboxes of a platform share."""

    api: RuntimeApi
    groups: Parent
    guardian: Guardian
    root: Path


@dataclass(frozen=True)
class Outcome:
    """How an init or an invocation ended; `status` and `error_type` as in REPORT."""

    payload: bytes = b""
    error: str | None = None
    duration_ms: float = 0.0
    status: str = "success"
    error_type: str | None = None


class Gone(Exception):
    """The sandbox died while it was idle: nothing was lost, take another."""


class Sandbox:
    """One execution environment; made by `start` or `restore`, ended by `end`."""

    def __init__(self, function: Function, host: Host):
        self.function, self.host = function, host
        self.id = uuid.uuid4().hex
        self.started = self.idle_since = time.monotonic()
        self.init_ms: float | None = None  # until the first REPORT line has told it
        self.restore_ms: float | None = None
        self.invocations = 0
        self.frozen = False
        self.pid = 0
        self.limits: Limits = host.groups.limits(self.id, function.memory_mb)
        self.folder = host.root / self.id
        self.tmp.mkdir(parents=True)
        self.log = os.open(self.log_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._told = 0
        self._process: subprocess.Popen | None = None
        self._template: Template | None = None
        self._endpoint: Endpoint | None = None
        self._mailbox = Mailbox()
        self._next: Call | None = None

    @property
    def log_path(self) -> Path:
        return self.folder / "log"

    @property
    def tmp(self) -> Path:
        return self.folder / "tmp"

    @property
    def alive(self) -> bool:
        if self._process:
            return self._process.poll() is None
        return Path(f"/proc/{self.pid}").exists()  # a clone: its template reaps it

    @property
    def kind(self) -> str:
        """What enforces the limits; see cgroup.py."""
        return self.limits.kind

    def start(self, how: str = "on-demand", again_s: float | None = None) -> Outcome:
        """The init phase; `again_s` are the seconds a second try within an invocation
        has, which gets no more CPU than the invocation."""
        if again_s is not None:
            self.limits.throttle()
        self._endpoint = self.host.api.open()
        self._mailbox = self._endpoint.mailbox
        argv = [sys.executable, "-m", "awslambdaric", self.function.handler]
        env = environment(self.function, self._endpoint.address, how)
        begin = time.perf_counter()
        self._process = launch(
            self.limits.command(argv), self.function, env, self.tmp, self.log
        )
        self._adopt(self._process.pid)
        first_s = INIT_LIMIT_S if how == "on-demand" else patience_s(self.function)
        outcome = self._ready(begin, first_s if again_s is None else again_s)
        if again_s is None:
            self.init_ms = outcome.duration_ms
        return outcome

    def restore(self, template: Template, again_s: float | None = None) -> Outcome:
        """Instead of the init phase: a fork of the template's process."""
        self._template = template
        template.endpoint.clones[self.id] = self._mailbox
        begin = time.perf_counter()
        try:
            self._adopt(template.clone(self))
        except OSError as gone:
            return failed("Sandbox.Failure", str(gone), "", 0.0)
        outcome = self._ready(begin, INIT_LIMIT_S if again_s is None else again_s)
        if again_s is None:
            self.restore_ms = outcome.duration_ms
        return outcome

    def invoke(
        self,
        request_id: str,
        payload: bytes,
        headers: Mapping[str, str],
        limit_s: float,
    ) -> Outcome:
        """One invocation; raises `Gone` if it never reached the function."""
        self.thaw()
        self.invocations += 1
        waiting = self._next or self._hear(limit_s)
        self._next = None
        if not waiting or not waiting.connection or not self.alive:
            raise Gone
        self._mailbox.request_id = request_id
        headers = {
            **headers,
            "Lambda-Runtime-Aws-Request-Id": request_id,
            "Lambda-Runtime-Deadline-Ms": str(int((time.time() + limit_s) * 1000)),
            "Lambda-Runtime-Invoked-Function-Arn": ARN + self.function.name,
        }
        begin = time.perf_counter()
        try:
            waiting.connection.answer(200, payload, headers)
        except OSError:
            raise Gone from None
        call = self._hear(limit_s)
        return self._outcome(call, request_id, begin, self.function.timeout_s)

    def freeze(self) -> None:
        """Stops the process if it waits for work; it uses no CPU until `thaw`."""
        if not self.frozen and (self._next or not self._mailbox.calls.empty()):
            self.limits.freeze()
            self.frozen = True

    def thaw(self) -> None:
        if self.frozen:
            self.limits.thaw()
            self.frozen = False

    def end(self) -> None:
        """Kills the process and all it started; removes everything it had."""
        self.kill()
        if self._process:
            self._process.wait()
        self.limits.close()
        if self._endpoint:
            self.host.api.shut(self._endpoint)
        if self._template:
            self._template.endpoint.clones.pop(self.id, None)
        if self.pid:
            self.host.guardian.forget(self.pid)
        os.close(self.log)
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """Kills the process; whoever waits for it learns that it ended."""
        if self.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def max_memory_mb(self) -> int:
        """The most memory it ever held, by the kernel's count."""
        return round(self.limits.peak_bytes() / MB)

    def new_log(self) -> str:
        """What was written to stdout and stderr since the last call of this."""
        size = os.fstat(self.log).st_size
        start = max(self._told, size - LOG_BYTES)
        text = os.pread(self.log, size - start, start).decode("utf-8", "replace")
        self._told = size
        if size > LOG_FILE_BYTES:
            os.ftruncate(self.log, 0)
            self._told = 0
        return text

    def _adopt(self, pid: int) -> None:
        self.pid = pid
        self.host.guardian.watch(pid)
        self.limits.begin(pid)
        self.host.api.watch(pid, self._mailbox)

    def _ready(self, begin: float, limit_s: float) -> Outcome:
        """Waits for the first `next`; anything else is a failed init."""
        call = self._hear(limit_s)
        if call and call.kind == "next":
            self._next = call
            self.limits.throttle()
            return Outcome(duration_ms=1000 * (call.at - begin))
        return self._outcome(call, "", begin, limit_s)

    def _hear(self, limit_s: float) -> Call | None:
        """The next thing the runtime says, or None at the deadline."""
        with suppress(queue.Empty):
            return self._mailbox.calls.get(timeout=limit_s)
        return None

    def _outcome(
        self, call: Call | None, request_id: str, begin: float, limit_s: float
    ) -> Outcome:
        """What a call, or its absence, means in Lambda's words."""
        took = 1000 * ((call.at if call else time.perf_counter()) - begin)
        if call is None:
            words = f"Task timed out after {limit_s:.2f} seconds"
            return failed("Sandbox.Timedout", words, request_id, took, "timeout")
        if call.kind == "response":
            return Outcome(call.body, None, took)
        if call.kind == "error":
            return Outcome(call.body, "Unhandled", took)
        if call.kind in ("init/error", "restore/error"):
            kind = call.error_type or "Runtime.Unknown"
            return Outcome(call.body, "Unhandled", took, "error", kind)
        if call.kind == "too large":
            words = "Response payload size exceeded maximum allowed payload size "
            words += f"({MOST_BYTES} bytes)."
            return failed("Function.ResponseSizeTooLarge", words, "", took)
        return self._exited(request_id, took)

    def _exited(self, request_id: str, took: float) -> Outcome:
        """The process ended in the middle: of itself, or for want of memory."""
        code = self._process.wait() if self._process else None
        if self._template:
            code = self._template.code_of(self.pid)
        kind, words = "Runtime.ExitError", "Runtime exited without providing a reason"
        if code and code < 0:
            name = signal.strsignal(-code) or str(-code)
            words = f"Runtime exited with error: signal: {name.lower()}"
        elif code:
            words = f"Runtime exited with error: exit status {code}"
        if self.limits.killed_for_memory():
            kind = "Runtime.OutOfMemory"
            words = "Runtime exited with error: signal: killed"
        return failed(kind, words, request_id, took)


def patience_s(function: Function) -> float:
    """What Lambda gives an init that no caller waits for: provisioned, or snapshot."""
    return max(PATIENT_LIMIT_S, function.timeout_s)


def failed(
    kind: str, words: str, request_id: str, duration_ms: float, status: str = "error"
) -> Outcome:
    """An outcome in the shape that Lambda gives to what the runtime could not say."""
    message = f"RequestId: {request_id} Error: {words}" if request_id else words
    payload = json.dumps({"errorType": kind, "errorMessage": message}).encode()
    return Outcome(payload, "Unhandled", duration_ms, status, kind)


def environment(function: Function, address: str, how: str) -> dict[str, str]:
    """The variables of a function's process: Lambda's, its own, few of ours."""
    # AWS_EXECUTION_ENV is not among them: from Python 3.12 on it would make the client
    # start a thread for each `next`, which a warm call would pay for.
    return {
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
        "TZ": ":UTC",
        "PYTHONPATH": str(function.code),
        **function.environment,
        "_HANDLER": function.handler,
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(function.memory_mb),
        "AWS_LAMBDA_FUNCTION_NAME": function.name,
        "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
        "AWS_LAMBDA_INITIALIZATION_TYPE": how,
        "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{function.name}",
        "AWS_LAMBDA_RUNTIME_API": address,
        "AWS_REGION": "us-east-1",
        "LAMBDA_TASK_ROOT": str(function.code),
    }


def launch(
    argv: Sequence[str],
    function: Function,
    env: Mapping[str, str],
    tmp: Path,
    log: int,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen:
    """Starts a function's process, in a process group of its own."""
    return subprocess.Popen(
        argv,
        cwd=function.code,
        env={**env, "TMPDIR": str(tmp)},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        process_group=0,
        pass_fds=pass_fds,
    )
