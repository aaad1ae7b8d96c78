"""The manifests: on disk as generated, valid, consistent, and every slip is caught."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import redis
import yaml
from fastapi.testclient import TestClient

import model_api
import models
from course import process
from local_cloud.scaling import (
    deployment,
    haproxy,
    kubernetes,
    manifest_checks,
    model_worker,
    releases,
    worker,
)
from local_cloud.scaling.deployment import API, DEPLOY, STREAMS, WORKER
from local_cloud.scaling.manifest_checks import adapter_file, check, field_problems
from local_cloud.scaling.redis_jobs import RedisJobs, redis_server
from scaling_strategies import API_HPA, API_QUEUE, HPA, QueueLength, manifests
from serving import settings
from tests.job_fixtures import needs_redis

FILES = manifests()
MANIFESTS = DEPLOY / "kubernetes"
DOCUMENTS = [document for documents in FILES.values() for document in documents]


def named(document: Any) -> str:
    return f"{document['kind']}-{document['metadata']['name']}"


def key_paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key, at any depth."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in pairs:
        if isinstance(value, dict):
            yield (*path, key)
        if isinstance(below, dict | list):
            yield from key_paths(below, (*path, key))


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def test_the_files_are_the_generated_ones(tmp_path):
    on_disk = {path.name: path.read_text() for path in MANIFESTS.glob("*.yaml")}
    again = kubernetes.write(tmp_path, FILES, deployment.NOTES)
    assert on_disk == {path.name: path.read_text() for path in again}
    assert set(deployment.NOTES) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_files_hold_what_was_generated(name):
    text = (MANIFESTS / name).read_text()
    assert list(yaml.safe_load_all(text)) == FILES[name]


def test_nothing_is_wrong():
    assert check(DOCUMENTS) == []


def test_kubernetes_validate_itself_agrees():
    argv = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k"]
    argv += [manifest_checks.VERSION, *map(str, sorted(MANIFESTS.glob("*.yaml")))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.findall(r"passed for resource (\S+)", done.stdout)
    own = [d for d in DOCUMENTS if d["kind"] not in manifest_checks.CUSTOM]
    assert len(passed) == len(own)


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_mutated_key_is_caught(document):
    paths = list(key_paths(document))
    missed = []
    for path in paths:
        changed = copy.deepcopy(document)
        place = at(changed, path[:-1])
        place[f"{path[-1]}x"] = place.pop(path[-1])
        if not field_problems(changed):
            missed.append(path)
    assert len(paths) > 5
    assert missed == []


def test_every_mutated_key_of_the_adapters_file_is_caught():
    (document,) = FILES["adapter.yaml"]
    paths = list(key_paths(adapter_file(document)))
    assert len(paths) > 10
    for path in paths:
        changed, file = copy.deepcopy(document), adapter_file(document)
        place = at(file, path[:-1])
        place[f"{path[-1]}x"] = place.pop(path[-1])
        changed["data"]["config.yaml"] = yaml.safe_dump(file)
        assert field_problems(changed), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_additional_key_is_caught(document):
    places = {path[:-1] for path in key_paths(document)}
    for place in places:
        changed = copy.deepcopy(document)
        at(changed, place)["surprise"] = "x"
        assert field_problems(changed), place


CONTAINER = ("spec", "template", "spec", "containers", 0)
SLIPS = {
    "a service that selects nothing": (
        "Service",
        ("spec", "selector", "app"),
        "other",
        "selects no pod",
    ),
    "a service to a port that is not there": (
        "Service",
        ("spec", "ports", 0, "targetPort"),
        "https",
        "leads to port",
    ),
    "a deployment that selects others' pods": (
        "Deployment",
        ("spec", "selector", "matchLabels", "app"),
        "other",
        "other labels than its pods",
    ),
    "a probe of a port that is not there": (
        "Deployment",
        (*CONTAINER, "readinessProbe", "httpGet", "port"),
        "https",
        "readinessProbe asks port",
    ),
    "a mount of nothing": (
        "Deployment",
        ("spec", "template", "spec", "volumes", 0, "name"),
        "temp",
        "mounts",
    ),
    "killed before the answers have ended": (
        "Deployment",
        ("spec", "template", "spec", "terminationGracePeriodSeconds"),
        30,
        "is killed after 30 s",
    ),
    "an autoscaler of nothing": (
        "HorizontalPodAutoscaler",
        ("spec", "scaleTargetRef", "name"),
        "other",
        "scales 'other'",
    ),
    "a minimum above the maximum": (
        "HorizontalPodAutoscaler",
        ("spec", "minReplicas"),
        99,
        "expected minimum <= maximum",
    ),
    "a budget for nothing": (
        "PodDisruptionBudget",
        ("spec", "selector", "matchLabels", "app"),
        "other",
        "selects no pod",
    ),
    "a route to nowhere": (
        "HTTPRoute",
        ("spec", "rules", 2, "backendRefs", 1, "name"),
        "other",
        "leads to other",
    ),
    "a type that is wrong": (
        "HTTPRoute",
        ("spec", "rules", 2, "backendRefs", 1, "weight"),
        "10",
        "expected int",
    ),
    "a metric that nobody makes": (
        "HorizontalPodAutoscaler",
        ("spec", "metrics", 0, "pods", "metric", "name"),
        "requests_in_fligth",
        "which no rule of the adapter makes",
    ),
    "a number as text": (
        "Deployment",
        ("spec", "template", "spec", "terminationGracePeriodSeconds"),
        "130",
        "is not of type",
    ),
}


@pytest.mark.parametrize(("kind", "path", "value", "said"), SLIPS.values(), ids=SLIPS)
def test_slips_between_documents_are_caught(kind, path, value, said):
    documents = copy.deepcopy(DOCUMENTS)
    document = next(d for d in documents if d["kind"] == kind)
    at(document, path[:-1])[path[-1]] = value
    problems = check(documents)
    assert any(said in problem for problem in problems), problems


def test_two_autoscalers_of_one_deployment_are_caught():
    second = kubernetes.scaled_object(API, API_QUEUE, streams=STREAMS)
    problems = check([*FILES["api.yaml"], *FILES["adapter.yaml"], second])
    assert any("two autoscalers" in problem for problem in problems)


def test_replicas_that_fight_the_autoscaler_are_caught():
    documents = copy.deepcopy(DOCUMENTS)
    documents[0]["spec"]["replicas"] = 3
    assert any("sets its own replicas" in problem for problem in check(documents))


def test_a_kind_that_does_not_exist_is_caught():
    document = copy.deepcopy(FILES["api.yaml"][0])
    document["kind"] = "Deploiment"
    assert "expected a kind" in field_problems(document)[0]


# What the manifests say must be true of the server and of the policies.


def test_probes_ask_what_the_api_answers():
    paths = {getattr(route, "path", "") for route in model_api.create_app().routes}
    server = kubernetes.container(API)
    probes = [server[f"{name}Probe"] for name in ("startup", "liveness", "readiness")]
    asked = [probe["httpGet"]["path"] for probe in probes]
    assert asked == ["/health/startup", "/health/live", "/health/ready"]
    assert set(asked) <= paths
    assert server["ports"][0]["containerPort"] == API.port


def test_the_environment_is_made_of_settings_that_exist():
    given = {entry["name"].lower() for entry in kubernetes.container(API)["env"]}
    assert given <= set(settings.Settings.model_fields)


def test_the_pod_is_given_what_compose_gives():
    compose = yaml.safe_load((MANIFESTS.parents[1] / "docker-compose.yml").read_text())
    api = compose["services"]["api"]
    server = kubernetes.container(API)
    limits = server["resources"]["limits"]
    assert limits == {"cpu": str(api["cpus"]), "memory": f"{API.memory_mib}Mi"}
    assert f"{API.memory_mib}m" == api["mem_limit"]
    env = {entry["name"]: entry["value"] for entry in server["env"]}
    assert {name: api["environment"][name] for name in API.environment} == dict(
        API.environment
    )
    assert env["DRAIN_SECONDS"] == str(settings.Settings().drain_s("0.0.0.0").__int__())
    assert API.grace_s <= int(api["stop_grace_period"].removesuffix("s"))


def test_the_pod_is_as_little_trusted_as_the_container():
    pod = kubernetes.pod(API)
    (server,) = pod["containers"]
    assert pod["securityContext"]["runAsUser"] == 10001
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_autoscaler_is_the_policy():
    spec = kubernetes.horizontal(API, API_HPA)["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 8)
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"]["name"] == "requests_in_flight"
    assert metric["pods"]["target"]["averageValue"] == "12"
    down = spec["behavior"]["scaleDown"]
    assert down["stabilizationWindowSeconds"] == API_HPA.down.window_s == 300
    assert spec["behavior"]["scaleUp"]["policies"] == [
        {"type": "Percent", "value": 100, "periodSeconds": 15},
        {"type": "Pods", "value": 4, "periodSeconds": 15},
    ]


def test_the_adapter_asks_for_what_the_server_tells(model: models.Model):
    (document,) = FILES["adapter.yaml"]
    (rule,) = adapter_file(document)["rules"]
    assert rule["name"]["as"] == API_HPA.metric
    asked = set(re.findall(r"(\w+)\{", rule["seriesQuery"] + rule["metricsQuery"]))
    app, here = model_api.create_app(model=model), ("127.0.0.1", 50_000)
    with TestClient(app, client=here) as client:
        told = set(re.findall(r"^(\w+)", client.get("/metrics").text, re.MULTILINE))
    assert asked == {"engine_active_rows", "engine_queued_requests"} <= told


@pytest.mark.prometheus
@pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="needs promtool: apt-get install -y prometheus",
)
def test_prometheus_understands_the_adapters_question(tmp_path):
    (document,) = FILES["adapter.yaml"]
    (rule,) = adapter_file(document)["rules"]
    query = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'pod=~"a|b"')
    record = {"record": "x", "expr": query.replace("<<.GroupBy>>", "pod")}
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": [record]}]}))
    argv = ["promtool", "check", "rules", rules]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_resource_becomes_a_share_of_the_request():
    document = kubernetes.horizontal(API, HPA(0.7))
    (metric,) = document["spec"]["metrics"]
    assert metric["resource"]["target"]["averageUtilization"] == 70
    assert field_problems(document) == []


def test_the_scaled_object_is_the_policy():
    spec = kubernetes.scaled_object(WORKER, API_QUEUE, streams=STREAMS)["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 8)
    assert (spec["pollingInterval"], spec["cooldownPeriod"]) == (30, 300)
    waiting, begun = (trigger["metadata"] for trigger in spec["triggers"])
    assert waiting["lagCount"] == begun["pendingEntriesCount"] == "16"
    assert WORKER.environment["ROWS"] == "16"  # what a worker does at a time
    more = kubernetes.scaled_object(WORKER, API_QUEUE, streams=["a", "b"])
    assert len(more["spec"]["triggers"]) == 4


@pytest.mark.parametrize("jobs", [2.5, 0.5])
def test_a_threshold_that_keda_cannot_read_is_refused(jobs: float):
    with pytest.raises(ValueError, match=f"expected a whole number .* {jobs}"):
        kubernetes.scaled_object(WORKER, QueueLength(jobs), streams=STREAMS)


def test_nothing_scales_what_answers_http_to_zero():
    (scaled,) = (d for d in DOCUMENTS if d["kind"] == "ScaledObject")
    target = scaled["spec"]["scaleTargetRef"]["name"]
    (scaled,) = (
        document
        for document in DOCUMENTS
        if document["kind"] == "Deployment" and document["metadata"]["name"] == target
    )
    (program,) = scaled["spec"]["template"]["spec"]["containers"]
    assert program["command"][:3] == ["python", "-m", model_worker.__name__]
    assert "ports" not in program
    grace = scaled["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > worker.LIMIT_S  # the jobs at hand are finished


@needs_redis
def test_a_job_at_work_keeps_its_worker_and_one_that_waits_wakes_one(tmp_path):
    """What KEDA reads, read as it does (pkg/scalers/redis_streams_scaler.go)."""

    def active() -> list[bool]:
        found = []
        for trigger in FILES["keda.yaml"][1]["spec"]["triggers"]:
            told = trigger["metadata"]
            stream, group = told["stream"], told["consumerGroup"]
            if "lagCount" in told:
                groups = {one["name"]: one for one in server.xinfo_groups(stream)}
                count = groups[group]["lag"]
            else:
                count = server.xpending(stream, group)["pending"]
            found.append(count > int(told.get("activationLagCount", 0)))
        return found

    with (
        redis_server(tmp_path, fsync="no") as url,
        RedisJobs(url) as jobs,
        redis.Redis.from_url(url, decode_responses=True) as server,
    ):
        jobs.submit("work")
        assert active() == [True, False]
        job = jobs.lease("a", 30)
        assert job
        assert active() == [False, True]
        jobs.nack(job, delay_s=0.001)  # to be tried again
        assert active() == [False, True]
        job = process.wait_until(lambda: jobs.lease("a", 30), 10, "the second try")
        assert job
        jobs.ack(job)
        assert active() == [False, False]


@needs_redis
def test_the_worker_works_and_finishes_what_it_has_begun(tmp_path, shared_model):
    """The manifest's own command, beside a Redis of ours."""
    argv = [sys.executable, *WORKER.command[1:-1]]
    talk = {"prompt": "Tell me all about the sea.", "max_tokens": 60}
    with (
        redis_server(tmp_path, fsync="no") as url,
        RedisJobs(url) as jobs,
        process.child([*argv, url], env={"ROWS": "2", "CONTEXT": "512"}) as running,
    ):
        poison = jobs.submit("no request", max_tries=1)
        process.wait_until(lambda: jobs.dead(), 120, "the poison to be dead")
        ids = [jobs.submit(talk), jobs.submit(talk)]
        begun = partial(process.wait_until, lambda: jobs.counts()["leased"] == 2)
        begun(30, "both to be at work at once", every_s=0.01)
        running.process.terminate()
        assert running.process.wait(60) == 0
        left = jobs.submit(talk)
        states = [jobs.get(id).state for id in [*ids, left]]  # type: ignore[union-attr]
        result = jobs.get(ids[0]).result  # type: ignore[union-attr]
        error = jobs.get(poison).error  # type: ignore[union-attr]
    assert states == ["done", "done", "waiting"]
    assert len(result["text"]) > 100
    assert 'expected {"prompt": a text}' in str(error)


def test_the_workers_image_has_all_that_it_imports():
    root = MANIFESTS.parents[1]
    dockerfile = (MANIFESTS / "worker.Dockerfile").read_text()
    assert f"CMD {json.dumps(list(WORKER.command))}" in dockerfile
    locks = [root / "requirements-serve.lock", MANIFESTS / "worker-requirements.txt"]
    pins = [
        set(re.findall(r"(?m)^[\w-]+==[^\s;]+", lock.read_text())) for lock in locks
    ]
    assert pins[1] <= set((root / "requirements.txt").read_text().splitlines())
    image = {pin.partition("==")[0] for pin in pins[0] | pins[1]}
    absent = {
        name
        for name, found in importlib.metadata.packages_distributions().items()
        if image.isdisjoint(one.lower().replace("_", "-") for one in found)
    }
    absent |= {path.name.removesuffix(".py") for path in root.iterdir()}
    absent -= {"local_cloud", "course", "models", "serving", "model_api"}
    code = f"""
import sys
for name in {absent}:
    sys.modules.setdefault(name)  # None: it cannot be imported
import local_cloud.scaling.model_worker, local_cloud.scaling.redis_jobs
import models.model, serving.settings
"""
    argv = [sys.executable, "-c", code]
    told = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
    assert "httpx" in absent
    assert told.returncode == 0, told.stderr


def test_the_canary_is_for_whoever_asks_for_it_and_else_by_lot():
    (route,) = (d for d in DOCUMENTS if d["kind"] == "HTTPRoute")
    *named_ones, by_lot = route["spec"]["rules"]
    leads = {
        rule["matches"][0]["headers"][0]["value"]: rule["backendRefs"]
        for rule in named_ones
    }
    tracks = {releases.version_for(str(user), 0.5, "x") for user in range(50)}
    assert tracks == set(leads) == {"stable", "canary"}
    names = {
        one["metadata"]["name"]: one for one in DOCUMENTS if one["kind"] == "Service"
    }
    for track, backends in leads.items():
        (found,) = backends
        assert names[found["name"]]["spec"]["selector"]["track"] == track
    assert [one["weight"] for one in by_lot["backendRefs"]] == [90, 10]


@pytest.mark.parametrize("percent", [-1, 101])
def test_a_share_that_is_none_is_refused(percent):
    with pytest.raises(ValueError, match="0 to 100 percent"):
        kubernetes.canary(API, API, percent)


# The balancer's own file.


def test_haproxy_takes_the_file_that_is_deployed(tmp_path):
    path = DEPLOY / "haproxy" / "haproxy.cfg"
    text = path.read_text()
    assert text == deployment.balancer(API_HPA.maximum)
    assert f"server-template replica {API_HPA.maximum} " in text
    assert f"maxconn {API.environment['ROWS']} " in text
    try:
        binary = haproxy.find()
    except haproxy.NoHAProxy as missing:
        pytest.skip(str(missing))
    argv = [binary, "-c", "-f", path]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "[WARNING]" not in done.stderr
    wrong = tmp_path / "wrong.cfg"
    wrong.write_text(text.replace("option redispatch", "option redispath"))
    argv[-1] = wrong
    assert subprocess.run(argv, capture_output=True, timeout=30, check=False).returncode


def test_haproxy_looks_up_the_pods_of_a_service_that_is_deployed():
    text = (DEPLOY / "haproxy" / "haproxy.cfg").read_text()
    found = re.search(r"server-template \S+ \d+ ([\w-]+)\.(\S+):(\d+) ", text)
    assert found
    name, domain, port = found.groups()
    assert domain == "default.svc.cluster.local"  # it knows no search list
    (service,) = (
        document
        for document in FILES["api.yaml"]
        if document["kind"] == "Service" and document["metadata"]["name"] == name
    )
    assert service["spec"]["clusterIP"] == "None"  # the name is the pods' addresses
    assert service["spec"]["ports"][0]["port"] == int(port)
    (server,) = FILES["api.yaml"][0]["spec"]["template"]["spec"]["containers"]
    assert server["ports"][0]["containerPort"] == int(port)


def test_writing_twice_is_the_same(tmp_path):
    first = kubernetes.write(tmp_path / "new", FILES, {})
    texts = [path.read_text() for path in first]
    assert kubernetes.write(tmp_path / "new", FILES, {}) == first
    assert [path.read_text() for path in first] == texts
