"""Prometheus and Alertmanager as child processes, for the length of a `with` block.

    with Stack(groups, {"api": "127.0.0.1:8000"}, [webhook, mailbox]) as stack:
        stack.query("up")

Both listen on free ports of 127.0.0.1 alone, keep their data in a folder that goes with
them, and know nothing of a Prometheus that the system may run. A configuration is
checked by `promtool` and `amtool` before anything starts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import urllib.error
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import urlencode
from urllib.request import Request

from course.process import Child, ChildError, child, free_port, wait_until
from local_cloud.monitoring.objectives import INTERVAL_S, promql_time
from local_cloud.monitoring.receivers import WATCHDOG
from local_cloud.monitoring.scrape import direct

INSTALL = "apt-get install -y prometheus prometheus-alertmanager"
# Debian's name first: on other systems the program is called as its project.
PROGRAMS = {
    "prometheus": ("prometheus",),
    "promtool": ("promtool",),
    "alertmanager": ("prometheus-alertmanager", "alertmanager"),
    "amtool": ("amtool",),
}
DEADLINE_S = 20.0
RESEND_S = 5.0  # how often Prometheus tells Alertmanager again what fires
GROUP_WAIT_S = 30.0  # for alerts of one cause to come in one notification
GROUP_INTERVAL_S = 300.0
REPEAT_S = 4 * 3600.0
BEAT_S = 60.0  # between two notifications of the watchdog

Config = dict[str, Any]
Group = Mapping[str, Any]


class StackError(RuntimeError):
    """Prometheus or Alertmanager is not here, refused its files, or is gone."""


class Receiver(Protocol):
    """Where notifications go; `config` is its part of Alertmanager's configuration."""

    def config(self) -> Config: ...


def found() -> str | None:
    """None if everything is installed, else what is missing and how to get it."""
    missing = [name for name in PROGRAMS if not _program(name)]
    return f"{', '.join(missing)} not found; run: {INSTALL}" if missing else None


def _program(name: str) -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS[name])), None)


def need(name: str) -> str:
    """The path of a program. Raises StackError if it is not installed."""
    path = _program(name)
    if path is None:
        raise StackError(f"Expected {name} to be installed, found: not. Run: {INSTALL}")
    return path


def prometheus_config(
    targets: Mapping[str, str],
    alertmanager: str,
    rule_files: Sequence[str],
    *,
    scale: float = 1.0,
    keys: Mapping[str, str] | None = None,
) -> Config:
    """What Prometheus reads: whom to ask how often, and whom to tell.

    Args:
        targets: a job's name -> host:port that answers `/metrics`.
        alertmanager: its host:port.
        rule_files: paths of the rules.
        scale: 1 in production, 60 where a minute passes in a second.
        keys: a job's name -> path of a file with the key that it asks for.
    """
    interval = promql_time(INTERVAL_S / scale)
    jobs = [_job(name, at, (keys or {}).get(name)) for name, at in targets.items()]
    return {
        "global": {
            "scrape_interval": interval,
            # A process that is stopped still takes connections: only time tells.
            "scrape_timeout": promql_time(min(10.0, INTERVAL_S / scale)),
            "evaluation_interval": interval,
        },
        "rule_files": list(rule_files),
        "alerting": {
            "alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]
        },
        "scrape_configs": jobs,
    }


def _job(name: str, address: str, key_file: str | None) -> Config:
    job: Config = {"job_name": name, "static_configs": [{"targets": [address]}]}
    if key_file:
        job["authorization"] = {"credentials_file": key_file}
    return job


def alertmanager_config(receivers: Iterable[Config], *, scale: float = 1.0) -> Config:
    """What Alertmanager reads: what comes together, what is left out, where it goes.

    Alerts of one name, job and severity come in one notification. While a page of an
    objective fires, its ticket is withheld: whoever is awake already need not be told
    in the morning. The watchdog goes to the webhooks, which notice when it stops.
    """
    everyone: Config = {}
    for receiver in receivers:
        for kind, configs in receiver.items():
            everyone.setdefault(kind, []).extend(configs)
    beats = [
        {**hook, "send_resolved": False} for hook in everyone.get("webhook_configs", [])
    ]
    return {
        "route": {
            "receiver": "everyone",
            # Not by name alone: a page would wait for `group_interval`, five minutes,
            # if a ticket or another job's alert of its name had just been told.
            "group_by": ["alertname", "job", "severity"],
            "group_wait": promql_time(GROUP_WAIT_S / scale),
            "group_interval": promql_time(GROUP_INTERVAL_S / scale),
            "repeat_interval": promql_time(REPEAT_S / scale),
            "routes": [
                {
                    "matchers": [f'alertname="{WATCHDOG}"'],
                    "receiver": "watchdog",
                    "group_wait": "0s",
                    # At each interval it repeats what was told longer ago than the
                    # other, counted from when it was taken: with a minute in both,
                    # the second would always be a moment too early.
                    "group_interval": promql_time(BEAT_S / 2 / scale),
                    "repeat_interval": promql_time(0.9 * BEAT_S / scale),
                }
            ],
        },
        "inhibit_rules": [
            {
                "source_matchers": ['severity="page"'],
                "target_matchers": ['severity="ticket"'],
                "equal": ["alertname", "job"],
            }
        ],
        "receivers": [
            {"name": "everyone", **everyone},
            {"name": "watchdog", **({"webhook_configs": beats} if beats else {})},
        ],
    }


class Stack:
    """A Prometheus and an Alertmanager of one's own."""

    def __init__(
        self,
        groups: Sequence[Group],
        targets: Mapping[str, str],
        receivers: Sequence[Receiver] = (),
        *,
        scale: float = 60.0,
    ):
        self.groups, self.targets, self.receivers = groups, targets, receivers
        self.scale = scale
        self._prometheus: Child | None = None
        self._alertmanager: Child | None = None
        self._inside = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as inside:
            folder = tempfile.TemporaryDirectory(prefix="prometheus-")
            self.folder = Path(inside.enter_context(folder))
            prometheus, alertmanager = free_port(), free_port()
            self.prometheus_url = f"http://127.0.0.1:{prometheus}"
            self.alertmanager_url = f"http://127.0.0.1:{alertmanager}"
            self.write()
            self._alertmanager = self._start_alertmanager(inside, alertmanager)
            self._prometheus = self._start_prometheus(inside, prometheus)
            self._inside = inside.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._inside.close()

    def write(self) -> None:
        """Writes the configuration. Raises StackError with the checkers' words."""
        addresses = [
            url.removeprefix("http://")
            for url in (self.prometheus_url, self.alertmanager_url)
        ]
        own = dict(zip(("prometheus", "alertmanager"), addresses, strict=True))
        rules = self.folder / "rules.json"  # JSON is YAML too
        files = {
            rules: {"groups": list(self.groups)},
            self.folder / "prometheus.json": prometheus_config(
                {**self.targets, **own}, addresses[1], [str(rules)], scale=self.scale
            ),
            self.folder / "alertmanager.json": alertmanager_config(
                [receiver.config() for receiver in self.receivers], scale=self.scale
            ),
        }
        for path, content in files.items():
            path.write_text(json.dumps(content, indent=1))
        check("promtool", "check", "config", str(self.folder / "prometheus.json"))
        check("amtool", "check-config", str(self.folder / "alertmanager.json"))

    def _start_alertmanager(self, inside: ExitStack, port: int) -> Child:
        argv = [
            need("alertmanager"),
            f"--config.file={self.folder / 'alertmanager.json'}",
            f"--storage.path={self.folder / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",  # else it listens for other Alertmanagers
        ]
        return self._start(inside, argv, f"{self.alertmanager_url}/-/ready")

    def _start_prometheus(self, inside: ExitStack, port: int) -> Child:
        argv = [
            need("prometheus"),
            f"--config.file={self.folder / 'prometheus.json'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            f"--rules.alert.resend-delay={promql_time(RESEND_S)}",
            "--storage.tsdb.retention.time=1d",
            "--enable-feature=exemplar-storage",  # trace ids beside the counts
            "--web.enable-lifecycle",  # for reload()
        ]
        return self._start(inside, argv, f"{self.prometheus_url}/-/ready")

    def _start(self, inside: ExitStack, argv: list[str], ready: str) -> Child:
        try:
            return inside.enter_context(child(argv, ready=ready, deadline_s=DEADLINE_S))
        except ChildError as error:
            raise StackError(str(error)) from None

    def pids(self) -> list[int]:
        """The processes of this stack."""
        children = (self._prometheus, self._alertmanager)
        return [running.pid for running in children if running]

    def await_scraped(self, deadline_s: float = DEADLINE_S) -> None:
        """Waits until every target was asked once: about 5 s after the start."""

        def scraped() -> bool:
            jobs = {series["metric"]["job"] for series in self.query("up")}
            return set(self.targets) <= jobs

        wait_until(scraped, deadline_s, f"scrapes of {', '.join(self.targets)}")

    def reload(self) -> None:
        """Takes over changed `groups`, `targets` and `receivers`; history is kept."""
        self.write()
        for url in (self.prometheus_url, self.alertmanager_url):
            self._ask(f"{url}/-/reload", method="POST")

    def query(self, expr: str, at: float | None = None) -> list[dict[str, Any]]:
        """Series and their value now: `[{"metric": {...}, "value": [at, "1"]}]`."""
        asked = {"query": expr} | ({"time": at} if at is not None else {})
        return self._api("query", asked)["result"]

    def query_range(
        self, expr: str, start: float, end: float, step_s: float
    ) -> list[dict[str, Any]]:
        """Series and their values from start to end, in seconds since 1970."""
        asked = {"query": expr, "start": start, "end": end, "step": step_s}
        return self._api("query_range", asked)["result"]

    def alerts(self) -> list[dict[str, Any]]:
        """What is pending or firing in Prometheus, the watchdog left out."""
        alerts = self._api("alerts", {})["alerts"]
        return [a for a in alerts if a["labels"]["alertname"] != WATCHDOG]

    def _api(self, what: str, asked: Mapping[str, Any]) -> Any:
        url = f"{self.prometheus_url}/api/v1/{what}?{urlencode(asked)}"
        return json.loads(self._ask(url))["data"]

    def _ask(self, url: str, method: str = "GET") -> bytes:
        try:
            with direct().open(Request(url, method=method), timeout=10) as answer:
                return answer.read()
        except urllib.error.HTTPError as refused:
            words = refused.read().decode("utf-8", "replace").strip()
            raise StackError(f"Expected an answer to {url}, found: {words}") from None
        except OSError as gone:
            raise StackError(self._who_is_gone(url, gone)) from None

    def _who_is_gone(self, url: str, error: OSError) -> str:
        children = {"Prometheus": self._prometheus, "Alertmanager": self._alertmanager}
        for name, running in children.items():
            if running and _ended(running):
                return (
                    f"Expected {name} to run, found that it ended with exit code "
                    f"{running.process.returncode}: nothing is watched, and whoever "
                    f"hears the watchdog will miss it. Leave the block and start anew."
                    f"\n{running.last_lines()}"
                )
        return f"Expected an answer to {url}, found: {error}."


def _ended(running: Child) -> bool:
    """Whether it is gone, or going: its sockets are closed a moment before it is."""
    with suppress(subprocess.TimeoutExpired):
        running.process.wait(2.0)
    return not running.alive


def check(program: str, *arguments: str) -> str:
    """Runs a checker and gives its words. Raises StackError with them if it objects."""
    done = subprocess.run(
        [need(program), *arguments], capture_output=True, text=True, timeout=60
    )
    words = f"{done.stdout}{done.stderr}".strip()
    if done.returncode:
        raise StackError(
            f"Expected {program} to accept the configuration, found:\n{words}\n"
            "Correct the rules, targets or receivers that it names."
        )
    return words
