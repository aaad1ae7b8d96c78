"""Rules as Prometheus reads them, and the alerts on causes instead of promises."""

from __future__ import annotations

from typing import Any

from local_cloud.monitoring.objectives import INTERVAL_S, promql_time

MINUTE_S, HOUR_S = 60.0, 3600.0
MEMORY_BYTES = 2304 * 2**20  # what the API may take: its limit in docker-compose.yml
WHO = "{{ with $labels.job }}{{ . }}: {{ end }}"


def group(name: str, rules: list[dict[str, Any]], scale: float) -> dict[str, Any]:
    """A group of rules, all looked at in one go."""
    return {"name": name, "interval": promql_time(INTERVAL_S / scale), "rules": rules}


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


def causes(scale: float = 1.0) -> dict[str, Any]:
    """The group of alerts that are no burn rates; only times are scaled."""

    def over(seconds: float) -> str:
        return promql_time(seconds / scale)

    hour, minutes = over(HOUR_S), [over(m * MINUTE_S) for m in range(11)]
    later_s = f"{4 * HOUR_S / scale:g}"
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
            "engine_queued_requests > 1 * engine_rows",
            "{{ $value }} requests wait, more than are being answered",
            minutes[2],
        ),
        alert(
            "MemoryGrows",
            "ticket",
            f"predict_linear(process_resident_memory_bytes[{hour}], {later_s})"
            f" > {MEMORY_BYTES}",
            "{{ $value | humanize1024 }}B in four hours, which it may not take",
            minutes[10],
        ),
        alert(
            "InputDrift",
            "ticket",
            "model_input_drift_psi > model_input_drift_limit",
            "the input is not what the model was tried on, PSI {{ $value }}",
            minutes[10],
        ),
        alert(
            "NotificationsFail",
            "page",
            " or ".join(way.format(minutes[5]) for way in (failed, lost)),
            "a receiver does not take alerts",
        ),
        # A clock that was set wrongs every rate; a difference shows it on either side.
        alert(
            "ClockStep",
            "ticket",
            "abs(timestamp(host_clock_seconds) - host_clock_seconds) > 5",
            "its clock and Prometheus' are {{ $value }} s apart",
        ),
        alert("Watchdog", "none", "vector(1)", "fires always; silence is the alarm"),
    ]
    return group("causes", alerts, scale)
