"""What is deployed: the API's needs, and all files of `deploy/` that follow from them.

How many replicas there are, and how fast they come and go, is not said here: that are
the lesson's policies. Nothing of this was ever applied to a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from local_cloud.scaling import kubernetes
from local_cloud.scaling.haproxy import HAProxy
from local_cloud.scaling.kubernetes import Manifest, Workload
from local_cloud.scaling.policies import Horizontal, Queued

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
API = Workload(
    name="model-api",
    image="model-api",
    port=8000,
    cpus=2,
    memory_mib=2304,  # as docker_deployment.py measures and docker-compose.yml says
    environment={"ROWS": "16", "CONTEXT": "1024"},
    drain_s=5,
    timeout_s=120,
)
IN_FLIGHT = ("engine_active_rows", "engine_queued_requests")  # as /metrics names them
STREAM = "{jobs}:priority:0"  # as redis_jobs names it


def manifests(
    policy: Horizontal, queue: Queued, canary_percent: int
) -> dict[str, list[Manifest]]:
    """All files of deploy/kubernetes: name to documents."""
    new = replace(API, track="canary")
    return {
        "api.yaml": kubernetes.service(API, policy),
        "adapter.yaml": [kubernetes.adapter(API, policy, IN_FLIGHT)],
        "canary.yaml": kubernetes.canary(API, new, canary_percent),
        "keda.yaml": [kubernetes.scaled_object(API, queue, stream=STREAM)],
    }


def balancer(most: int) -> str:
    """deploy/haproxy/haproxy.cfg: one queue in front of up to so many replicas.

    What waits in the balancer goes to whoever is free first; a replica gets no more
    than it answers at a time.
    """
    rows = int(API.environment["ROWS"])
    fleet = HAProxy("queue", slots=rows, silence_s=API.timeout_s)
    return fleet.deployed(API.name, API.port, most)


def write(files: Mapping[str, list[Manifest]], most: int) -> list[Path]:
    """Write all of deploy/kubernetes and deploy/haproxy; gives back where."""
    config = DEPLOY / "haproxy" / "haproxy.cfg"
    config.parent.mkdir(exist_ok=True)
    config.write_text(balancer(most), encoding="utf-8")
    return [*kubernetes.write(DEPLOY / "kubernetes", files), config]
