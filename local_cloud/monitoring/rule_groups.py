"""Rules as Prometheus reads them, and the alerts on causes instead of promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from local_cloud.monitoring.objectives import INTERVAL_S, SLO, Window, promql_time

MINUTE_S, HOUR_S = 60.0, 3600.0
MEMORY_BYTES = 2304 * 2**20  # what the API may take: its limit in docker-compose.yml
WHO = "{{ with $labels.job }}{{ . }}: {{ end }}"


def group(name: str, rules: list[dict[str, Any]], scale: float) -> dict[str, Any]:
    """A group of rules, all looked at in one go."""
    return {"name": name, "interval": promql_time(INTERVAL_S / scale), "rules": rules}


def recorded(slo: SLO, exprs: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rules that keep the answers to expressions under names, for one objective."""
    labels = {"slo": slo.name}
    return [{"record": n, "expr": e, "labels": labels} for n, e in exprs.items()]


def alert(
    name: str, severity: str, expr: str, summary: str, wait: str = "0s", **labels: str
) -> dict[str, Any]:
    """An alert as Prometheus reads it; `wait` is how long it must hold to fire."""
    return {
        "alert": name,
        "expr": expr,
        "for": wait,
        "labels": {"severity": severity, **labels},
        "annotations": {"summary": f"{WHO}{summary}"},
    }


def alert_name(slo: SLO) -> str:
    """The name of both of its alerts: the page and the ticket differ in severity."""
    return f"{slo.name.title().replace('_', '')}Burn"


def ratio_name(window_s: float) -> str:
    """What the share of bad events over a window is recorded as."""
    return f"slo:error_ratio:rate{promql_time(window_s)}"


def events_name(window_s: float) -> str:
    """What the number of events in a window is recorded as."""
    return f"slo:events:increase{promql_time(window_s)}"


def burn_alert(
    slo: SLO, severity: str, windows: Sequence[Window], least: int
) -> dict[str, Any]:
    """One alert for all windows of a severity: any pair of them, but both of a pair.

    And of more than `least` events: of a handful, one is a great share.
    """
    label = f'{{slo="{slo.name}"}}'

    def burning(window: Window) -> str:
        limit, spans = window.burn * slo.budget, (window.long_s, window.short_s)
        parts = [f"{ratio_name(s)}{label} > {limit:.6g}" for s in spans]
        parts.append(f"{events_name(window.long_s)}{label} > {least}")
        return f"({' and '.join(parts)})"

    return alert(
        alert_name(slo),
        severity,
        " or ".join(burning(w) for w in windows if w.severity == severity),
        f"promised: {slo.objective:.4g} of {slo.description}; "
        "{{ $value | humanizePercentage }} are not",
        slo=slo.name,
    )


def causes(scale: float = 1.0) -> dict[str, Any]:
    """The group of alerts that are no burn rates; only times are scaled."""

    def over(seconds: float) -> str:
        return promql_time(seconds / scale)

    def memory_ahead(window: str) -> str:
        used = f'process_resident_memory_bytes{{job=~"api.*"}}[{window}]'
        return f"predict_linear({used}, {4 * HOUR_S / scale:g}) > {MEMORY_BYTES}"

    hour, minutes = over(HOUR_S), [over(m * MINUTE_S) for m in range(11)]
    offset = f"host_clock_offset_seconds[{minutes[5]}]"
    failed = "rate(alertmanager_notifications_failed_total[{0}]) > 0"
    lost = "rate(prometheus_notifications_errors_total[{0}]) > 0"
    alerts = [
        alert("TargetDown", "page", "up == 0", "gives no metrics", minutes[2]),
        alert(
            "EngineStalled",
            "page",
            "engine_stalled_seconds > 10",
            "work is there, and no step for {{ $value }} s",
            minutes[2],
        ),
        # A queue is not yet a broken promise, but it grows before one: latency is
        # known when the first token is out, which under overload is too late.
        alert(
            "QueueGrows",
            "ticket",
            "engine_queued_requests > engine_rows",
            "{{ $value }} requests wait, more than are being answered",
            minutes[2],
        ),
        # An hour's line still rises long after a step, of a model that was loaded, say;
        # that of the last minutes does so only while there is growth.
        alert(
            "MemoryGrows",
            "ticket",
            f"{memory_ahead(hour)} and {memory_ahead(minutes[10])}",
            "{{ $value | humanize1024 }}B in four hours, which it may not take",
            minutes[10],
        ),
        *(
            alert(
                f"{of.title()}Drift",
                "ticket",
                f"model_{of}_drift_psi > model_{of}_drift_limit",
                f"the {of} is not what it was when the model was tried, PSI "
                "{{ $value }}",
                minutes[10],
            )
            for of in ("input", "output")
        ),
        alert(
            "NotificationsFail",
            "page",
            " or ".join(way.format(minutes[5]) for way in (failed, lost)),
            "a receiver does not take alerts",
        ),
        # A clock that was set wrongs every rate. Where Prometheus reads the same clock
        # nothing differs, but the one that cannot be set tells; where it reads another,
        # the difference does, as long as it lasts.
        alert(
            "ClockStep",
            "ticket",
            f"max_over_time({offset}) - min_over_time({offset}) > 5",
            "its clock was set, by {{ $value }} s",
        ),
        alert(
            "ClockSkew",
            "ticket",
            "abs(timestamp(host_clock_seconds) - host_clock_seconds) > 5",
            "its clock and Prometheus' are {{ $value }} s apart",
        ),
        alert("Watchdog", "none", "vector(1)", "fires always; silence is the alarm"),
    ]
    return group("causes", alerts, scale)
