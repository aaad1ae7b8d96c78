"""A real Prometheus and Alertmanager: told in time, on loopback alone, leaving nothing.

At scale 60 half a second passes between two scrapes, and two minutes in two seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import monitoring_setup as lesson
from course.process import free_port, wait_until
from local_cloud.monitoring import deployed, stack
from local_cloud.monitoring.receivers import Mailbox, Webhook
from local_cloud.monitoring.stack import Stack, StackError

pytestmark = pytest.mark.prometheus
ROOT = Path(__file__).parent.parent
GROUPS = lesson.groups(60)


@pytest.fixture(autouse=True)
def _installed() -> None:
    if missing := stack.found():
        pytest.skip(missing)


class Shown(threading.Thread):
    """A target whose metrics are what `text` says; the clock is `skew_s` off."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.skew_s = 0.0
        shown = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = f"host_clock_seconds {time.time() + shown.skew_s:.3f}\n".encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"

    def run(self) -> None:
        self.server.serve_forever()

    def stop(self) -> None:
        if self.is_alive():
            self.server.shutdown()
            self.join()
        self.server.server_close()


@pytest.fixture
def target() -> Iterator[Shown]:
    shown = Shown()
    shown.start()
    yield shown
    shown.stop()


def told(receiver: Webhook | Mailbox, alert: str, status: str) -> bool:
    return any((n.alert, n.status) == (alert, status) for n in receiver.notifications)


def listening(pid: int) -> set[str]:
    """The addresses on which a process listens, read from the kernel's tables."""
    inodes, found = set(), set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            inodes.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            bound = fields[3] == "0A" or (table[:3] == "udp" and fields[3] == "07")
            if fields[9] in inodes and bound:
                found.add(fields[1].split(":")[0])
    return found


def test_a_silent_target_is_told_to_both_receivers_and_so_is_its_return(
    target: Shown,
):
    with (
        Webhook() as webhook,
        Mailbox() as mailbox,
        Stack(GROUPS, {"api": target.address}, [webhook, mailbox]) as running,
    ):
        running.await_scraped()
        target.skew_s = 30.0  # a clock that was set, as the other side sees it
        for receiver in (webhook, mailbox):
            wait_until(lambda r=receiver: told(r, "ClockSkew", "firing"), 20, "it")
        target.skew_s = 0.0
        for receiver in (webhook, mailbox):
            wait_until(lambda r=receiver: told(r, "ClockSkew", "resolved"), 30, "it")
        target.stop()
        for receiver in (webhook, mailbox):
            wait_until(lambda r=receiver: told(r, "TargetDown", "firing"), 20, "it")
        first = next(n for n in webhook.notifications if n.alert == "TargetDown")
        assert (first.severity, first.job) == ("page", "api")
        assert first.summary == "api: gives no metrics"
        assert mailbox.mails[0]["Subject"] == "[firing] ClockSkew"
        assert webhook.silent_s < 10
        assert {a["labels"]["alertname"] for a in running.alerts()} == {"TargetDown"}


def test_it_listens_on_loopback_alone_and_leaves_neither_process_nor_folder():
    with Stack(GROUPS, {}) as running:
        pids = running.pids()
        assert [listening(pid) for pid in pids] == [{"0100007F"}, {"0100007F"}]
        folder = running.folder
        assert folder.stat().st_mode & 0o077 == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not folder.exists()


def test_a_killed_prometheus_is_missed_by_the_receiver_and_named_by_the_stack(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(stack, "RESEND_S", 1.0)  # its alerts hold for four of these
    with Webhook() as webhook, Stack(GROUPS, {}, [webhook]) as running:
        wait_until(lambda: webhook.silent_s < 0.2, 20, "the watchdog")
        os.kill(running.pids()[0], signal.SIGKILL)
        with pytest.raises(StackError, match=r"Prometheus to run.*exit code -9"):
            wait_until(lambda: running.query("up") and False, 5, "an error")
        wait_until(lambda: webhook.silent_s > 4, 40, "silence")


def test_the_watchdog_beats_every_minute():
    """Not every second one; at scale 60 a minute is a second."""
    with Webhook() as webhook, Stack(GROUPS, {}, [webhook]):
        beats: list[float] = []

        def steady() -> bool:
            if webhook._heard not in beats:
                beats.append(webhook._heard)
            gaps = [b - a for a, b in pairwise(beats[-4:])]
            return len(gaps) == 3 and median(gaps) < 1.5

        wait_until(steady, 40, "three gaps of a second")


def test_a_dead_receiver_is_alarmed_by_the_one_that_lives():
    with Webhook() as webhook, Mailbox() as mailbox:
        with Stack(
            GROUPS, {"api": f"127.0.0.1:{free_port()}"}, [webhook, mailbox]
        ) as s:
            webhook.stop()
            wait_until(lambda: told(mailbox, "NotificationsFail", "firing"), 40, "it")
            (alert,) = s.query('ALERTS{alertname="NotificationsFail"}')
            assert alert["metric"]["integration"] == "webhook"
        assert told(mailbox, "TargetDown", "firing")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_a_lesson_that_is_stopped(number: signal.Signals):
    program = (
        "import time; from course import lesson; from course.lesson import Section\n"
        "from local_cloud.monitoring.stack import Stack\n"
        "def demo(run):\n"
        "    with Stack([], {}) as running:\n"
        "        print('pids', *running.pids(), running.folder, flush=True)\n"
        "        time.sleep(60)\n"
        "lesson.run(doc='Waits.', sections=[Section('Waiting', demo)], argv=[])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as parent:
        assert parent.stdout
        line = next(line for line in parent.stdout if line.startswith("pids "))
        _, *pids, folder = line.split()
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        parent.send_signal(number)
        parent.wait(20)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not Path(folder).exists()


def test_broken_rules_start_nothing_and_promtool_says_what_is_wrong():
    broken = {"name": "mine", "rules": [{"alert": "Odd", "expr": "rate(up) > 1"}]}
    with pytest.raises(StackError, match=r"(?s)promtool.*expected type range vector"):
        Stack([broken], {}).__enter__()


def test_a_change_is_taken_over_and_a_broken_one_is_not(target: Shown):
    with Stack(GROUPS, {"api": target.address}) as running:
        good = {"name": "mine", "rules": [{"record": "two", "expr": "vector(2)"}]}
        running.groups = [{**good, "interval": "500ms"}]
        running.reload()
        assert wait_until(lambda: running.query("two"), 10, "the new rule")
        running.groups = [{"name": "mine", "rules": [{"record": "two", "expr": "("}]}]
        with pytest.raises(StackError, match="parse error"):
            running.reload()
        assert running.query("two")


def test_a_query_that_is_none_comes_back_with_prometheus_words():
    with Stack(GROUPS, {}) as running, pytest.raises(StackError, match="parse error"):
        running.query("rate(")


def test_a_port_that_is_taken_meanwhile_is_named(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = iter([port, free_port()])
        monkeypatch.setattr(stack, "free_port", lambda: next(ports))
        with pytest.raises(StackError, match=r"(?s)ended.*address already in use"):
            Stack(GROUPS, {}).__enter__()


@pytest.mark.parametrize("drift", [False, True])
def test_what_is_deployed_is_what_its_readers_accept(tmp_path: Path, drift: bool):
    made = deployed.files(lesson.groups(), lesson.rule_tests(), drift=drift)
    for name, text in made.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    config, rules = tmp_path / "prometheus.yml", tmp_path / "rules.yml"
    # The key's file is there in the container alone, so the syntax must do.
    stack.check("promtool", "check", "config", "--syntax-only", str(config))
    stack.check("amtool", "check-config", str(tmp_path / "alertmanager.yml"))
    words = stack.check("promtool", "check", "rules", str(rules))
    count = sum(len(group["rules"]) for group in lesson.groups())
    assert f"{count if drift else count - 2} rules found" in words
    assert ("Drift" in "".join(made.values())) == drift


def test_without_prometheus_the_command_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert stack.INSTALL in (stack.found() or "")
    with pytest.raises(StackError, match="apt-get install -y prometheus"):
        Stack(GROUPS, {}).__enter__()
