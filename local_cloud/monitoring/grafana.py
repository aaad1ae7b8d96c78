"""The dashboard for Grafana: its JSON, and the files that bring it in.

    provisioning/datasources/prometheus.yaml    where Prometheus is
    provisioning/dashboards/files.yaml          where dashboards are
    dashboards/model-api.json                   the panels

They go to `/etc/grafana/provisioning` and `/var/lib/grafana/dashboards` of a container.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from local_cloud.monitoring.panels import Panel

PROMETHEUS = "http://prometheus:9090"  # its name in the compose file
ACROSS, HEIGHT = 3, 7  # panels a row; Grafana's grid is 24 wide
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {  # ours to Grafana's; what it does not know is a suffix
    "req/s": "reqps",
    "s": "s",
    "%": "percentunit",
    "B": "decbytes",
    "x": "suffix: ×",  # noqa: RUF001  (the sign, as on the page)
}


def dashboard(panels: Sequence[Panel]) -> dict[str, Any]:
    """Grafana's model of the dashboard, as it is imported or provisioned."""
    variable = {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
    }
    return {
        "uid": "model-api",
        "title": "Model API",
        "tags": ["model-api"],
        "editable": True,
        "graphTooltip": 1,  # one cursor for all panels
        "refresh": "10s",
        "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [variable]},
        "panels": [_panel(panel, place) for place, panel in enumerate(panels)],
    }


def _panel(panel: Panel, place: int) -> dict[str, Any]:
    row, column = divmod(place, ACROSS)
    width = 24 // ACROSS
    unit = UNITS.get(panel.unit, f"suffix: {panel.unit}")
    limits = {"max": 1} if panel.kind == "gauge" else {"min": 0}
    return {
        "id": place + 1,
        "title": panel.title,
        "description": panel.answers,
        "type": "timeseries",
        "datasource": SOURCE,
        "gridPos": {"x": column * width, "y": row * HEIGHT, "w": width, "h": HEIGHT},
        "fieldConfig": {
            "defaults": {"unit": unit, **limits},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "calcs": ["last"]},
            "tooltip": {"mode": "multi"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": expression,
                "legendFormat": legend,
            }
            for index, (legend, expression) in enumerate(panel.series.items())
        ],
    }


def files(panels: Sequence[Panel]) -> dict[str, str]:
    """What belongs under `deploy/grafana`: relative paths and texts."""
    datasource = {
        "name": "Prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": PROMETHEUS,
        "isDefault": True,
    }
    provider = {
        "name": "files",
        "type": "file",
        "disableDeletion": True,
        "options": {"path": "/var/lib/grafana/dashboards"},
    }
    return {
        "provisioning/datasources/prometheus.yaml": _text(
            {"apiVersion": 1, "datasources": [datasource]}
        ),
        "provisioning/dashboards/files.yaml": _text(
            {"apiVersion": 1, "providers": [provider]}
        ),
        "dashboards/model-api.json": _text(dashboard(panels)),
    }


def _text(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"  # JSON is YAML too
