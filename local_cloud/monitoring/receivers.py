"""Who is told: a webhook and a mailbox, which write down what arrived and when.

    with Webhook() as webhook, Mailbox() as mailbox:
        with Stack(groups, targets, [webhook, mailbox]): ...

    python -m local_cloud.monitoring.receivers --port 9099     a webhook that prints

The webhook listens for the watchdog too. Nothing else can tell that Prometheus is gone,
because whoever is gone sends no alert.
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast

WATCHDOG = "Watchdog"  # the alert that always fires
SILENCE_S = 300.0  # of the watchdog, which comes every minute
# One alert a line, so that a program can read the mail as well as people.
MAIL = (
    "{{ range .Alerts }}{{ .Status }} {{ .Labels.alertname }} {{ .Labels.severity }} "
    '{{ or .Labels.job "-" }} {{ .Annotations.summary }}\n{{ end }}'
)
SUBJECT = "[{{ .Status }}] {{ .GroupLabels.alertname }}"


@dataclass(frozen=True)
class Notification:
    """One alert as somebody was told of it."""

    at: float  # seconds since 1970
    status: str  # firing or resolved
    alert: str
    severity: str
    by: str  # webhook or mail
    job: str
    summary: str


def _ignore(notification: Notification) -> None:
    """For who looks at `notifications` later."""


class Webhook:
    """An HTTP server that takes Alertmanager's notifications."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        tell: Callable[[Notification], None] = _ignore,
    ):
        self.notifications: list[Notification] = []
        self._tell = tell
        self._heard = time.monotonic()
        handler = type("Handler", (_Handler,), {"to": self})
        self._server = ThreadingHTTPServer((host, port), handler)
        self.url = f"http://{host}:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes no more; who calls then is refused."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def config(self) -> dict[str, Any]:
        """Its part of Alertmanager's configuration."""
        return {"webhook_configs": [{"url": self.url, "send_resolved": True}]}

    @property
    def silent_s(self) -> float:
        """Seconds since the watchdog was last heard, or since the start."""
        return time.monotonic() - self._heard

    def receive(self, body: bytes) -> None:
        """Takes one notification, of one alert or several."""
        for alert in json.loads(body)["alerts"]:
            labels = alert["labels"]
            if labels["alertname"] == WATCHDOG:
                self._heard = time.monotonic()
                continue
            notification = Notification(
                time.time(),
                alert["status"],
                labels["alertname"],
                labels.get("severity", ""),
                "webhook",
                labels.get("job", "-"),
                alert["annotations"].get("summary", ""),
            )
            self.notifications.append(notification)
            self._tell(notification)


class _Handler(BaseHTTPRequestHandler):
    to: Webhook
    timeout = 10  # for who connects and says nothing

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            self.to.receive(body)
        except (ValueError, KeyError, TypeError):
            self.send_error(400, "Expected the JSON of Alertmanager's webhook")
            return
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: what arrived is in `notifications`."""


class Mailbox:
    """An SMTP server on 127.0.0.1 that takes every mail and delivers none."""

    def __init__(self) -> None:
        from aiosmtpd.controller import Controller

        self.notifications: list[Notification] = []
        self.mails: list[EmailMessage] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._server = Controller(self, hostname="127.0.0.1", port=self.port)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes no more; who calls then is refused."""
        self._server.stop(no_assert=True)

    def config(self) -> dict[str, Any]:
        """Its part of Alertmanager's configuration."""
        mail = {
            "to": "on-call@localhost",
            "from": "alertmanager@localhost",
            "smarthost": f"127.0.0.1:{self.port}",
            "require_tls": False,  # it stays on this machine
            "headers": {"Subject": SUBJECT},
            "html": "",
            "text": MAIL,
            "send_resolved": True,
        }
        return {"email_configs": [mail]}

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        """Called by aiosmtpd with each mail."""
        content = message_from_bytes(envelope.content, policy=cast(Any, default))
        mail = cast(EmailMessage, content)
        body = mail.get_body(("plain",))
        self.mails.append(mail)
        for line in body.get_content().splitlines() if body else []:
            status, alert, severity, job, *rest = line.split(" ", 4) + [""] * 4
            if status in ("firing", "resolved"):
                told = (time.time(), status, alert, severity, "mail", job, rest[0])
                self.notifications.append(Notification(*told))
        return "250 Message accepted"


def main(argv: list[str] | None = None) -> None:
    """Prints what arrives, and when the watchdog was not heard for too long."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9099)
    arguments = parser.parse_args(argv)

    def tell(one: Notification) -> None:
        print(f"{one.status} {one.severity} {one.alert} {one.summary}", flush=True)

    with Webhook(arguments.host, arguments.port, tell) as webhook:
        while True:
            time.sleep(max(1.0, SILENCE_S - webhook.silent_s))
            if webhook.silent_s >= SILENCE_S:
                print(f"no watchdog for {webhook.silent_s:.0f} s", flush=True)
                time.sleep(SILENCE_S)


if __name__ == "__main__":
    main()
