"""The sandboxes of one function: taken, started, given back, frozen, ended.

One request a sandbox. A caller gets the idle sandbox that was used last, so that the
others can grow old; if none is idle, a new one, which is the cold start.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from local_cloud.functions.errors import TooManyRequests
from local_cloud.functions.report import Report
from local_cloud.functions.sandbox import (
    Gone,
    Host,
    Outcome,
    Sandbox,
    failed,
)

if TYPE_CHECKING:
    from local_cloud.functions.platform import Function

FREEZE_AFTER_S = 0.05  # idle before it is frozen: calls in a row pay nothing for it
PROVISION_S = 1.0  # between tries to replace provisioned sandboxes
END_S = 5.0  # until those at work have noticed that they were killed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What one invocation gave.

    Attributes:
        payload: the result as JSON, or the error: errorType, errorMessage.
        error: None or "Unhandled", as in the header X-Amz-Function-Error.
        log: what the function wrote, between the platform's START and REPORT lines.
        cold: whether a sandbox was started for it.
    """

    request_id: str
    payload: bytes
    error: str | None
    report: Report
    log: str
    cold: bool


class Retired(Exception):
    """This pool takes no work any more: the function was deployed anew, or all ends."""


class Room:
    """How many invocations may run at once: of a function, or of what shares it."""

    def __init__(self, limit: int, reason: str):
        self.limit, self.reason = limit, reason
        self.used = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self.used >= self.limit:
                raise TooManyRequests("Rate Exceeded.", self.reason)
            self.used += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.used -= 1


class Pool:
    """All sandboxes of one deployed function."""

    def __init__(self, function: Function, host: Host, room: Room):
        self.function, self.host, self.room = function, host, room
        self.idle: list[Sandbox] = []  # the last one was used last
        self.all: set[Sandbox] = set()
        self.closed = self._killed = False
        self._provision_at = 0.0
        self._starting: list[threading.Thread] = []
        self._change = threading.Condition()
        self._template = None
        if function.snapshot:
            from local_cloud.functions.snapshot import Template

            self._template = Template(function, host)

    def invoke(
        self, request_id: str, payload: bytes, headers: Mapping[str, str]
    ) -> Result:
        """Runs one invocation; raises TooManyRequests, Retired."""
        with self.room:
            while sandbox := self._take():
                try:
                    limit = self.function.timeout_s
                    outcome = sandbox.invoke(request_id, payload, headers, limit)
                except Gone:
                    self._end(sandbox)
                except BaseException:  # Ctrl-C while it works: nobody will hear it
                    self._end(sandbox)
                    raise
                else:
                    return self._finish(sandbox, request_id, outcome)
            return self._cold(request_id, payload, headers)

    def provision(self) -> list[threading.Thread]:
        """Starts what is missing of the provisioned sandboxes, all at once.

        Returns the threads that do: an init that hangs holds up nobody but who joins.
        """
        missing = self.function.provisioned - len(self.all)
        under_way = any(thread.is_alive() for thread in self._starting)
        too_soon = under_way or time.monotonic() < self._provision_at
        if missing <= 0 or self.closed or too_soon:
            return []
        self._provision_at = time.monotonic() + PROVISION_S
        self._starting = [
            threading.Thread(target=self._provision_one, name="provision", daemon=True)
            for _ in range(missing)
        ]
        for thread in self._starting:
            thread.start()
        return self._starting

    def _provision_one(self) -> None:
        try:
            sandbox, outcome = self._new("provisioned-concurrency")
        except Retired:
            return
        except Exception:  # no room, for instance: tried again, so it must be told
            log.exception("%s: no provisioned sandbox", self.function.name)
            return
        if outcome.error:
            self._end(sandbox)
        else:
            self._put(sandbox)

    def keep(self) -> None:
        """Freezes what is idle; ends what is idle for too long, or dead."""
        now, over = time.monotonic(), []
        with self._change:
            for sandbox in list(self.idle):
                idle_s = now - sandbox.idle_since
                spare = len(self.all) - len(over) > self.function.provisioned
                aged = idle_s > self.function.keep_alive_s and spare
                if aged or not sandbox.alive:
                    self.idle.remove(sandbox)
                    over.append(sandbox)
                elif idle_s > FREEZE_AFTER_S:
                    sandbox.freeze()
        for sandbox in over:
            self._end(sandbox)

    def retire(self) -> None:
        """Takes no more work; what is under way ends, and its sandbox with it."""
        with self._change:
            self.closed = True
            idle, self.idle = self.idle, []
        for sandbox in idle:
            self._end(sandbox)
        self._end_template()

    def end(self) -> None:
        """Kills all sandboxes; an invocation under way raises `Retired`."""
        self._killed = True
        self.retire()
        deadline = time.monotonic() + END_S
        while self.all and time.monotonic() < deadline:
            for sandbox in list(self.all):
                sandbox.kill()
            with self._change:
                self._change.wait_for(lambda: not self.all, 0.05)
        for thread in self._starting:
            if thread.is_alive():
                thread.join(END_S)
        self._end_template()

    def _take(self) -> Sandbox | None:
        with self._change:
            return self.idle.pop() if self.idle else None

    def _put(self, sandbox: Sandbox) -> None:
        with self._change:
            sandbox.idle_since = time.monotonic()
            if not self.closed:
                self.idle.append(sandbox)
                return
        self._end(sandbox)

    def _end(self, sandbox: Sandbox) -> None:
        try:
            sandbox.end()
        finally:  # whatever is left of it, it counts no longer
            with self._change:
                self.all.discard(sandbox)
                self._change.notify_all()
        self._end_template()

    def _end_template(self) -> None:
        """Ends the snapshot when nothing can be restored from it any more."""
        with self._change:
            template, done = self._template, self.closed and not self.all
            if done:
                self._template = None
        if done and template:
            template.end()

    def _new(
        self, how: str = "on-demand", again_s: float | None = None
    ) -> tuple[Sandbox, Outcome]:
        """A new sandbox and how its init, or its restore, ended."""
        sandbox = Sandbox(self.function, self.host)
        with self._change:
            self.all.add(sandbox)
        try:
            if self.closed:
                raise Retired
            if self._template:
                return sandbox, sandbox.restore(self._template, again_s)
            return sandbox, sandbox.start(how, again_s)
        except BaseException:
            self._end(sandbox)
            raise

    def _cold(
        self, request_id: str, payload: bytes, headers: Mapping[str, str]
    ) -> Result:
        """The first invocation of a new sandbox.

        If the init fails, Lambda tries it once more, now within the invocation: at
        its CPU share, on its time, and with its timeout. So is a restore here.
        """
        log, lost_ms, again_ms = "", 0.0, 0.0
        sandbox, outcome = self._new()
        if outcome.error:
            log = sandbox.new_log() + init_report(outcome)
            lost_ms = outcome.duration_ms
            self._end(sandbox)
            sandbox, outcome = self._new(again_s=self.function.timeout_s)
            again_ms = outcome.duration_ms
        try:
            if not outcome.error:
                left_s = max(0.001, self.function.timeout_s - again_ms / 1000)
                outcome = sandbox.invoke(request_id, payload, headers, left_s)
                outcome = replace(outcome, duration_ms=outcome.duration_ms + again_ms)
        except Gone:
            words = "Runtime exited without providing a reason"
            outcome = failed("Runtime.ExitError", words, request_id, again_ms)
        except BaseException:
            self._end(sandbox)
            raise
        return self._finish(sandbox, request_id, outcome, log, lost_ms)

    def _finish(
        self,
        sandbox: Sandbox,
        request_id: str,
        outcome: Outcome,
        log: str | None = None,
        lost_ms: float = 0.0,
    ) -> Result:
        """The REPORT line and the log; the sandbox goes back, or ends if it failed."""
        cold = log is not None
        report = self._report(sandbox, request_id, outcome, cold, lost_ms)
        text = (log or "") + whole_log(sandbox.new_log(), report, self.function)
        if outcome.status == "success":
            self._put(sandbox)
        else:
            self._end(sandbox)
        if self._killed and outcome.error:
            raise Retired
        return Result(request_id, outcome.payload, outcome.error, report, text, cold)

    def _report(
        self,
        sandbox: Sandbox,
        request_id: str,
        outcome: Outcome,
        cold: bool,
        lost_ms: float,
    ) -> Report:
        """What it took; since 2025-08-01 the init phase is billed as well.

        A restore is billed whole here: see report.py.
        """
        took = outcome.duration_ms
        init_ms = sandbox.init_ms if cold else None
        restore_ms = sandbox.restore_ms if cold else None
        return Report(
            request_id,
            took,
            math.ceil(took + lost_ms + (init_ms or 0) + (restore_ms or 0)),
            self.function.memory_mb,
            sandbox.max_memory_mb(),
            init_ms,
            restore_ms,
            outcome.status,
            outcome.error_type if outcome.status == "error" else None,
        )


def whole_log(written: str, report: Report, function: Function) -> str:
    """What the function wrote, between the lines that the platform writes."""
    lines = [f"START RequestId: {report.request_id} Version: $LATEST\n", written]
    if written and not written.endswith("\n"):
        lines.append("\n")
    if report.status == "timeout":
        words = f"Task timed out after {function.timeout_s:.2f} seconds"
        lines.append(f"{timestamp()} {report.request_id} {words}\n\n")
    lines += [f"END RequestId: {report.request_id}\n", f"{report}\t\n"]
    return "".join(lines)


def init_report(outcome: Outcome) -> str:
    """The line that tells of an init phase that failed."""
    line = f"INIT_REPORT Init Duration: {outcome.duration_ms:.2f} ms\tPhase: init\t"
    line += f"Status: {outcome.status}"
    if outcome.status == "error":
        line += f"\tError Type: {outcome.error_type}"
    return line + "\n"


def timestamp() -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return now.replace("+00:00", "Z")
