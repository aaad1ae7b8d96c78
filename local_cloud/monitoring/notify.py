"""Telling receivers what Alertmanager would tell them, until they take it."""

from __future__ import annotations

import hashlib
import json
import smtplib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import EmailMessage
from functools import partial
from typing import Any
from urllib.request import Request

from local_cloud.monitoring.alerting import Alert
from local_cloud.monitoring.scrape import direct
from local_cloud.monitoring.stack import Receiver

Payload = dict[str, Any]  # of a notification
Deliver = Callable[[Payload], None]  # OSError if it is not taken

MOST_WAITING = 100  # notifications kept for a receiver that is down
DELIVER_S = 5.0  # that a receiver may take


@dataclass
class Outbox:
    """What one receiver is to be told, and what waits because it does not listen."""

    deliver: Deliver
    beats: bool  # whether it hears the watchdog
    waiting: deque[Payload] = field(default_factory=lambda: deque(maxlen=MOST_WAITING))
    failures: int = 0  # attempts; the oldest notification is tried again first
    last_error: str = ""


def outboxes(receivers: Iterable[Receiver]) -> list[Outbox]:
    """Those that an Alertmanager with these receivers would have."""
    configs = [receiver.config() for receiver in receivers]
    hooks = [one["url"] for c in configs for one in c.get("webhook_configs", ())]
    mails = [one for c in configs for one in c.get("email_configs", ())]
    return [
        *(Outbox(partial(post, url), True) for url in hooks),
        *(Outbox(partial(mail, config), False) for config in mails),
    ]


def post(url: str, payload: Payload) -> None:
    """Tells a webhook. Raises OSError if it does not take it."""
    body, kind = json.dumps(payload).encode(), {"Content-Type": "application/json"}
    direct().open(Request(url, body, kind), timeout=DELIVER_S).close()


def mail(config: Mapping[str, Any], payload: Payload) -> None:
    """Sends a mail, an alert a line. Raises OSError if it is not taken."""
    message = EmailMessage()
    message["Subject"] = f"[{payload['status']}] {payload['groupLabels']['alertname']}"
    message["From"], message["To"] = config["from"], config["to"]
    told: list[str] = []
    for alert in payload["alerts"]:
        labels = alert["labels"]
        words = [alert["status"], labels["alertname"], labels.get("severity", "")]
        words += [labels.get("job", "-"), alert["annotations"].get("summary", "")]
        told.append(" ".join(words))
    message.set_content("\n".join(told) + "\n")
    host, _, port = config["smarthost"].rpartition(":")
    with smtplib.SMTP(host, int(port), timeout=DELIVER_S) as server:
        server.send_message(message)


def payload(alert: Alert) -> Payload:
    """One alert as Alertmanager's webhook tells it (version 4)."""
    ended = alert.resolved_at
    status = "firing" if ended is None else "resolved"
    one = {
        "status": status,
        "labels": dict(alert.labels),
        "annotations": dict(alert.annotations),
        "startsAt": utc(alert.active_at),
        "endsAt": "0001-01-01T00:00:00Z" if ended is None else utc(ended),
        "generatorURL": "",
        "fingerprint": fingerprint(alert.labels),
    }
    return {
        "version": "4",
        "groupKey": f'{{}}:{{alertname="{alert.name}"}}',
        "truncatedAlerts": 0,
        "status": status,
        "receiver": "everyone",
        "groupLabels": {"alertname": alert.name},
        "commonLabels": one["labels"],
        "commonAnnotations": one["annotations"],
        "externalURL": "",
        "alerts": [one],
    }


def fingerprint(labels: Mapping[str, str]) -> str:
    """The same for the same alert, firing or resolved."""
    text = json.dumps(sorted(labels.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def utc(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()
