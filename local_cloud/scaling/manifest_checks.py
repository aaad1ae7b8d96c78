"""What can be said of Kubernetes manifests without a cluster.

`check` finds what `kubectl apply` would refuse or, worse, silently drop: fields that do
not exist, against Kubernetes' own schemas; keys that a free map would take; names,
labels, ports and times that do not fit together across documents.

The two custom resources, KEDA's and the Gateway API's, are compared with our own idea
of their shape (`CUSTOM`), written by hand: exactly the fields used here. It finds a
slip of the generator, not what a new version of theirs would refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from local_cloud.scaling.kubernetes import QUESTIONS, Manifest

VERSION = "1.37"  # of Kubernetes, whose schemas kubernetes-validate 1.37.0 holds

# What Kubernetes takes as a free map is closed here to what the course uses.

LABELS = {"app", "track"}
AMOUNTS = {"cpu", "memory"}
FREE = {  # the last keys of a path: what may stand below it
    ("labels",): LABELS,
    ("matchLabels",): LABELS,
    ("limits",): AMOUNTS,
    ("requests",): AMOUNTS,
    ("Service", "spec", "selector"): LABELS,
    ("ConfigMap", "data"): {"config.yaml"},
}
RULES = {
    "stabilizationWindowSeconds": int,
    "selectPolicy": str,
    "policies": [{"type": str, "value": int, "periodSeconds": int}],
}
STREAM = {"address": str, "stream": str, "consumerGroup": str}  # what KEDA reads
WAITING = {**STREAM, "lagCount": str, "activationLagCount": str}
BEGUN = {**STREAM, "pendingEntriesCount": str}
BACKENDS = [{"name": str, "port": int, "weight": int}]
CUSTOM: dict[str, Any] = {  # of a list, each item has one of the shapes in it
    "ScaledObject": {
        "scaleTargetRef": {"apiVersion": str, "kind": str, "name": str},
        "pollingInterval": int,
        "cooldownPeriod": int,
        "minReplicaCount": int,
        "maxReplicaCount": int,
        "advanced": {
            "horizontalPodAutoscalerConfig": {
                "behavior": {"scaleUp": RULES, "scaleDown": RULES}
            }
        },
        "triggers": [
            {"type": str, "metadata": WAITING},
            {"type": str, "metadata": BEGUN},
        ],
    },
    "HTTPRoute": {
        "parentRefs": [{"name": str}],
        "rules": [
            {"backendRefs": BACKENDS},
            {
                "matches": [{"headers": [{"name": str, "value": str}]}],
                "backendRefs": BACKENDS,
            },
        ],
    },
}
RESOURCES = {"namespace": {"resource": str}, "pod": {"resource": str}}
ADAPTER = {  # prometheus-adapter's own file, in a ConfigMap
    "rules": [
        {
            "seriesQuery": str,
            "resources": {"overrides": RESOURCES},
            "name": {"matches": str, "as": str},
            "metricsQuery": str,
        }
    ]
}


def check(documents: Sequence[Manifest]) -> list[str]:
    """What is wrong with documents that are applied together; empty if nothing.

    Raises:
        ModuleNotFoundError: kubernetes-validate is not installed.
    """
    problems = [
        f"{document.get('kind', '?')}: {problem}"
        for document in documents
        for problem in field_problems(document)
    ]
    # What does not even have the right fields cannot be compared.
    return problems or list(reference_problems(documents))


def field_problems(document: Manifest) -> list[str]:
    """What is wrong with one document by itself."""
    kind = str(document.get("kind"))
    problems = [*schema_problems(document), *free_problems(document, (kind,))]
    if kind == "ConfigMap" and not problems:
        problems += shape_problems(adapter_file(document), ADAPTER, "config.yaml")
    return problems


def adapter_file(document: Manifest) -> Any:
    """prometheus-adapter's file within its ConfigMap."""
    import yaml

    return yaml.safe_load(document["data"]["config.yaml"])


def schema_problems(document: Manifest) -> Iterator[str]:
    """Fields that are unknown, missing, or of the wrong type."""
    kind = document.get("kind")
    if kind in CUSTOM:
        rest = {"apiVersion": str, "kind": str, "metadata": {"name": str}}
        rest["metadata"]["labels"] = dict.fromkeys(LABELS, str)
        yield from shape_problems(document, {**rest, "spec": CUSTOM[kind]}, "")
        return
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path)) or 'document'}: {error.message}"
    except (
        kubernetes_validate.SchemaNotFoundError,
        kubernetes_validate.InvalidSchemaError,
        KeyError,
    ) as error:
        yield f"expected a kind of Kubernetes {VERSION}, found none: {error}"


def shape_problems(found: Any, expected: Any, place: str) -> Iterator[str]:
    """Where a value departs from a shape of nested dicts, lists, and types.

    Of several shapes in a list, the nearest to an item counts.
    """
    where = place or "document"
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            yield f"{where}: expected a map, found {found!r}"
            return
        for key in expected.keys() ^ found.keys():
            said = "missing" if key in expected else "unknown"
            yield f"{where}: {said} field {key!r}"
        for key in expected.keys() & found.keys():
            yield from shape_problems(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        if not isinstance(found, list) or not found:
            yield f"{where}: expected a list, found {found!r}"
            return
        for i, item in enumerate(found):
            here = f"{place}[{i}]"
            yield from min(
                (list(shape_problems(item, e, here)) for e in expected), key=len
            )
    elif type(found) is not expected:
        yield f"{where}: expected {expected.__name__}, found {found!r}"


def free_problems(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Keys in free maps that the course does not use: Kubernetes would take them."""
    if isinstance(value, list):
        for item in value:
            yield from free_problems(item, path)
    elif isinstance(value, dict):
        for end, known in FREE.items():
            if path[-len(end) :] == end and value.keys() != known:
                place = ".".join(path)
                yield f"{place}: expected {sorted(known)}, found {sorted(value)}"
        for key, below in value.items():
            yield from free_problems(below, (*path, key))


def reference_problems(documents: Sequence[Manifest]) -> Iterator[str]:
    """Names, labels, ports and times that do not fit together."""
    kinds: dict[str, list[Manifest]] = {}
    for document in documents:
        kinds.setdefault(document["kind"], []).append(document)
    deployments = {d["metadata"]["name"]: d for d in kinds.get("Deployment", [])}
    pods = [d["spec"]["template"] for d in deployments.values()]
    for name, one in deployments.items():
        spec = one["spec"]
        yield from pod_problems(name, spec["template"]["spec"])
        if spec["selector"]["matchLabels"] != spec["template"]["metadata"]["labels"]:
            yield f"Deployment {name}: selects other labels than its pods have"
    selecting = [(s, s["spec"]["selector"]) for s in kinds.get("Service", [])]
    for one in kinds.get("PodDisruptionBudget", []):
        selecting.append((one, one["spec"]["selector"]["matchLabels"]))
    for one, labels in selecting:
        if not any(labels.items() <= p["metadata"]["labels"].items() for p in pods):
            yield f"{one['kind']} {one['metadata']['name']}: selects no pod: {labels}"
    yield from scaling_problems(kinds, deployments)
    yield from route_problems(kinds, pods)


def pod_problems(name: str, spec: Mapping[str, Any]) -> Iterator[str]:
    """Within one kind of pod: volumes, ports, probes, and time to leave."""
    volumes = {volume["name"] for volume in spec["volumes"]}
    for server in spec["containers"]:
        mounted = {mount["name"] for mount in server["volumeMounts"]}
        if mounted != volumes:
            yield f"{name}: has volumes {sorted(volumes)}, mounts {sorted(mounted)}"
        if "ports" not in server:  # a worker is asked nothing
            continue
        ports = {port["name"] for port in server["ports"]}
        for question in (f"{one}Probe" for one in QUESTIONS):
            port = server[question]["httpGet"]["port"]
            if port not in ports:
                yield f"{name}: {question} asks port {port!r}, found {sorted(ports)}"
        given = {entry["name"]: entry["value"] for entry in server["env"]}
        needs = float(given["DRAIN_SECONDS"]) + float(given["REQUEST_TIMEOUT_S"])
        grace = spec["terminationGracePeriodSeconds"]
        if grace <= needs:
            yield f"{name}: may take {needs:g} s to leave, is killed after {grace} s"


def scaling_problems(
    kinds: Mapping[str, list[Manifest]], deployments: Mapping[str, Manifest]
) -> Iterator[str]:
    """Each replica count has one owner, and bounds that can be met."""
    owned: set[str] = set()
    files = [adapter_file(one) for one in kinds.get("ConfigMap", [])]
    made = {rule["name"]["as"] for file in files for rule in file["rules"]}
    scalers = [
        *kinds.get("HorizontalPodAutoscaler", []),
        *kinds.get("ScaledObject", []),
    ]
    for scaler in scalers:
        spec, kind = scaler["spec"], scaler["kind"]
        target = spec["scaleTargetRef"]["name"]
        if target not in deployments:
            yield f"{kind}: scales {target!r}, found {sorted(deployments)}"
        elif "replicas" in deployments[target]["spec"]:
            yield f"{kind}: {target} sets its own replicas at each apply"
        if target in owned:
            yield f"{kind}: {target} has two autoscalers; keep one"
        owned.add(target)
        for metric in spec.get("metrics", []):
            name = metric.get("pods", {}).get("metric", {}).get("name")
            if name and name not in made:
                yield f"{kind}: reads {name}, which no rule of the adapter makes"
        low = spec.get("minReplicas", spec.get("minReplicaCount"))
        high = spec.get("maxReplicas", spec.get("maxReplicaCount"))
        if not low <= high:
            yield f"{kind}: expected minimum <= maximum, found {low} and {high}"


def route_problems(
    kinds: Mapping[str, list[Manifest]], pods: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Routes lead to services, services to ports."""
    ports = {
        port["name"]
        for one in pods
        for server in one["spec"]["containers"]
        for port in server.get("ports", [])
    }
    services = {}
    for one in kinds.get("Service", []):
        services[one["metadata"]["name"]] = {x["port"] for x in one["spec"]["ports"]}
        for port in one["spec"]["ports"]:
            if port["targetPort"] not in ports:
                yield f"Service: leads to port {port['targetPort']!r}, found {ports}"
    for route in kinds.get("HTTPRoute", []):
        for rule in route["spec"]["rules"]:
            backends = rule["backendRefs"]
            for backend in backends:
                if backend["port"] not in services.get(backend["name"], set()):
                    yield f"HTTPRoute: leads to {backend['name']}, which is not here"
            if not sum(backend["weight"] for backend in backends):
                yield "HTTPRoute: all weights are 0"
