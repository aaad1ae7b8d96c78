"""The manifests: on disk as generated, valid, consistent, and every slip is caught."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

import model_api
import models
from local_cloud.scaling import deployment, haproxy, kubernetes, manifest_checks
from local_cloud.scaling.deployment import API, DEPLOY
from local_cloud.scaling.manifest_checks import adapter_file, check, field_problems
from scaling_strategies import API_HPA, API_QUEUE, HPA, QueueLength, manifests
from serving import settings

FILES = manifests()
MANIFESTS = DEPLOY / "kubernetes"
DOCUMENTS = [document for documents in FILES.values() for document in documents]
# What is applied together: KEDA takes the HPA's place.
WITH_HPA = [*FILES["api.yaml"], *FILES["adapter.yaml"], *FILES["canary.yaml"]]
WITH_KEDA = [
    *(d for d in FILES["api.yaml"] if d["kind"] != "HorizontalPodAutoscaler"),
    *FILES["keda.yaml"],
]


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


def test_the_files_are_the_generated_ones():
    on_disk = {path.name: path.read_text() for path in MANIFESTS.glob("*.yaml")}
    assert on_disk == {name: kubernetes.text(docs) for name, docs in FILES.items()}


@pytest.mark.parametrize("name", FILES)
def test_the_files_hold_what_was_generated(name):
    text = (MANIFESTS / name).read_text()
    assert list(yaml.safe_load_all(text)) == FILES[name]


@pytest.mark.parametrize("together", [WITH_HPA, WITH_KEDA], ids=["HPA", "KEDA"])
def test_nothing_is_wrong(together):
    assert check(together) == []


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
        ("spec", "rules", 0, "backendRefs", 1, "name"),
        "other",
        "leads to other",
    ),
    "a type that is wrong": (
        "HTTPRoute",
        ("spec", "rules", 0, "backendRefs", 1, "weight"),
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
    documents = copy.deepcopy(WITH_HPA)
    document = next(d for d in documents if d["kind"] == kind)
    at(document, path[:-1])[path[-1]] = value
    problems = check(documents)
    assert any(said in problem for problem in problems), problems


def test_two_autoscalers_of_one_deployment_are_caught():
    problems = check([*FILES["api.yaml"], *FILES["keda.yaml"]])
    assert any("two autoscalers" in problem for problem in problems)


def test_replicas_that_fight_the_autoscaler_are_caught():
    documents = copy.deepcopy(WITH_HPA)
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
    spec = kubernetes.scaled_object(API, API_QUEUE, stream="jobs")["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 8)
    assert (spec["pollingInterval"], spec["cooldownPeriod"]) == (30, 300)
    assert spec["triggers"][0]["metadata"]["lagCount"] == "16"
    other = kubernetes.scaled_object(API, QueueLength(2.5), stream="jobs")
    assert other["spec"]["triggers"][0]["metadata"]["lagCount"] == "2.5"


@pytest.mark.parametrize("percent", [-1, 101])
def test_a_share_that_is_none_is_refused(percent):
    with pytest.raises(ValueError, match="0 to 100 percent"):
        kubernetes.canary(API, API, percent)


# The balancer's own file.


def test_haproxy_takes_the_file_that_is_deployed(tmp_path):
    path = DEPLOY / "haproxy" / "haproxy.cfg"
    text = path.read_text()
    assert text == deployment.balancer(API_HPA.maximum)
    assert f"replica {API_HPA.maximum} {API.name}:{API.port} check" in text
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


def test_writing_twice_is_the_same(tmp_path):
    first = kubernetes.write(tmp_path / "new", FILES)
    texts = [path.read_text() for path in first]
    assert kubernetes.write(tmp_path / "new", FILES) == first
    assert [path.read_text() for path in first] == texts
