"""What is deployed: what it needs, and all files of `deploy/` that follow from that.

How many replicas there are, and how fast they come and go, is not said here: that are
the lesson's policies. Nothing of this was ever applied to a cluster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from local_cloud.scaling import kubernetes
from local_cloud.scaling.haproxy import HAProxy
from local_cloud.scaling.kubernetes import Manifest, Workload
from local_cloud.scaling.policies import Horizontal, Queued
from local_cloud.scaling.worker import LIMIT_S

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
NAMESPACE = "default"
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
WORKER = replace(  # the same model with the same rows, but it fetches its work
    API,
    name="model-worker",
    image="model-worker",
    port=None,
    drain_s=0,
    timeout_s=int(LIMIT_S),  # the jobs at hand are finished
    command=(
        *("python", "-m", "local_cloud.scaling.model_worker"),
        f"redis://{kubernetes.REDIS}/0",
    ),
)
IN_FLIGHT = ("engine_active_rows", "engine_queued_requests")  # as /metrics names them
STREAMS = ("{jobs}:priority:0",)  # as redis_jobs names them
NOTES = {
    "api.yaml": """\
Expects the image model-api:stable and a Secret `model-api-keys`, whose entry `api_keys`
holds a key a line.""",
    "adapter.yaml": """\
The API tells its metrics to a key with the scope `admin` alone, as soon as it has keys
at all: give Prometheus one, as docker-compose.yml does. Without it the metric is empty,
and the HorizontalPodAutoscaler leaves the number of replicas as it is.""",
    "canary.yaml": f"""\
The weights split requests, not users: one user meets both versions. Whoever knows the
user decides by releases.version_for and says so in the header `{kubernetes.TRACK}`:
canary or stable. It goes before the weights.""",
    "keda.yaml": """\
Scales the workers of the queue to zero, not the API, which reads no queue. Expects the
image model-worker:stable, which deploy/kubernetes/worker.Dockerfile builds, and a Redis
7 or newer at redis:6379. Jobs get there by RedisJobs.submit.

Jobs of priority 0 wake a worker. Those of 1 to 9 are done, and first, by workers that
are there, but wake none. Whoever uses them adds both triggers for the stream of each,
and submits one job: of a stream that never was KEDA cannot read the pending entries,
and with a reading that fails it does not go to zero.""",
}


def manifests(
    policy: Horizontal, queue: Queued, canary_percent: int
) -> dict[str, list[Manifest]]:
    """All files of deploy/kubernetes: name to documents."""
    new = replace(API, track="canary")
    return {
        "api.yaml": kubernetes.service(API, policy),
        "adapter.yaml": [kubernetes.adapter(API, policy, IN_FLIGHT)],
        "canary.yaml": kubernetes.canary(API, new, canary_percent),
        "keda.yaml": [
            kubernetes.deployment(WORKER),
            kubernetes.scaled_object(WORKER, queue, streams=STREAMS),
        ],
    }


def balancer(most: int) -> str:
    """deploy/haproxy/haproxy.cfg: one queue in front of up to so many replicas.

    What waits in the balancer goes to whoever is free first; a replica gets no more
    than it answers at a time.
    """
    rows = int(API.environment["ROWS"])
    fleet = HAProxy("queue", slots=rows, silence_s=API.timeout_s)
    pods = kubernetes.members(API)["metadata"]["name"]
    assert API.port
    return fleet.deployed(f"{pods}.{NAMESPACE}.svc.cluster.local", API.port, most)


def write(files: Mapping[str, list[Manifest]], most: int) -> list[Path]:
    """Write all of deploy/kubernetes and deploy/haproxy; gives back where."""
    config = DEPLOY / "haproxy" / "haproxy.cfg"
    config.parent.mkdir(exist_ok=True)
    config.write_text(balancer(most), encoding="utf-8")
    return [*kubernetes.write(DEPLOY / "kubernetes", files, NOTES), config]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The lesson's own option: it writes instead of running."""
    parser.add_argument("--manifests", action="store_true", help="write deploy/ again")


def command(
    manifests: Callable[[], Mapping[str, list[Manifest]]], most: int
) -> Callable[[argparse.Namespace], int | None]:
    """What `--manifests` does: write all files and say which; None without it."""

    def wrote(arguments: argparse.Namespace) -> int | None:
        if not arguments.manifests:
            return None
        for path in write(manifests(), most):
            print(path.relative_to(DEPLOY.parent))
        return 0

    return wrote
