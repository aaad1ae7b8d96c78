"""Drift between the SDK and the stand-in: no field comes or goes unnoticed.

`fireworks_fields.json` holds every field of every SDK type that the stand-in uses, what
each call can send, and which fields the stand-in really answers. After an upgrade of
the SDK, read what changed, follow it in the stand-in, and record anew:

    python -m tests.test_fireworks_fields
"""

from __future__ import annotations

import json
import re
import sys
import types as python_types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import httpx
import pytest
from fireworks import Fireworks, types
from fireworks.types import chat
from pydantic import BaseModel

import models
from local_cloud.fireworks import deployments, model_routes
from local_cloud.fireworks.app import Served, serve
from local_cloud.fireworks.catalogue import SMOLLM2
from local_cloud.fireworks.clock import Clock
from local_cloud.fireworks.wire import names
from tests.test_fireworks_management import BOOT, FILES, ROWS, connect, run_job, use

RECORD = Path(__file__).with_name("fireworks_fields.json")
ANSWERS: tuple[type[BaseModel], ...] = (
    types.APIKey,
    types.Account,
    types.BatchInferenceJob,
    types.CompletionChunk,
    types.CompletionCreateResponse,
    types.Dataset,
    types.DatasetGetDownloadEndpointResponse,
    types.DatasetGetUploadEndpointResponse,
    types.DatasetUploadResponse,
    types.Deployment,
    types.DeploymentShape,
    types.DeploymentShapeVersionMatchResponse,
    types.Model,
    types.ModelGetDownloadEndpointResponse,
    types.ModelGetUploadEndpointResponse,
    types.ModelValidateUploadResponse,
    types.User,
    chat.ChatCompletionChunk,
    chat.CompletionCreateResponse,
)
CALLS: tuple[type, ...] = (
    types.api_key_create_params.APIKeyCreateParams,
    types.batch_inference_job_create_params.BatchInferenceJobCreateParams,
    types.dataset_create_params.DatasetCreateParams,
    types.dataset_update_params.DatasetUpdateParams,
    types.deployment_create_params.DeploymentCreateParams,
    types.deployment_delete_params.DeploymentDeleteParams,
    types.deployment_list_params.DeploymentListParams,
    types.deployment_scale_params.DeploymentScaleParams,
    types.deployment_update_params.DeploymentUpdateParams,
    types.model_create_params.ModelCreateParams,
    types.model_update_params.ModelUpdateParams,
    types.model_validate_upload_params.ModelValidateUploadParams,
    types.user_create_params.UserCreateParams,
    types.user_update_params.UserUpdateParams,
)


def fields_of_the_sdk() -> dict[str, Any]:
    """Every type the stand-in uses, nested ones too, and what each call can send."""
    found: dict[str, dict[str, str]] = {}
    for kind in ANSWERS:
        _walk(kind, found)
    sent = {_name(kind): dict(sorted(names(kind).items())) for kind in CALLS}
    return {"types": dict(sorted(found.items())), "calls": sent}


def _walk(kind: Any, found: dict[str, dict[str, str]]) -> None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if _name(kind) in found:
            return
        found[_name(kind)] = {}
        for name, field in kind.model_fields.items():
            found[_name(kind)][field.alias or name] = _words(field.annotation)
            _walk(field.annotation, found)
    for part in get_args(kind):
        _walk(part, found)


def _name(kind: type) -> str:
    return f"{kind.__module__.removeprefix('fireworks.types.')}.{kind.__name__}"


def _words(kind: Any) -> str:
    """A type in words that are the same on every Python."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(repr(part) for part in parts)
    if origin in (Union, python_types.UnionType):
        return " | ".join(_words(part) for part in parts)
    inner = f"[{', '.join(map(_words, parts))}]" if parts else ""
    return getattr(origin or kind, "__name__", str(kind)) + inner


# What the stand-in answers.


def answered(model: models.Model) -> dict[str, list[str]]:
    """Call, to the paths of all fields that came in its raw answers."""
    seen: dict[str, set[str]] = {}

    def note(response: httpx.Response) -> None:
        response.read()
        if response.is_success and "json" in response.headers["content-type"]:
            body = response.json()
            seen.setdefault(_call(response), set()).update(_paths(body))

    with serve(model, clock=Clock.manual(1.8e9)) as cloud:
        http = httpx.Client(event_hooks={"response": [note]})
        with connect(cloud, Fireworks, http_client=http) as client:
            walk_through(client, cloud)
    return {call: sorted(paths) for call, paths in sorted(seen.items())}


def _call(response: httpx.Response) -> str:
    path = re.sub(
        r"/(course|fireworks|learner|job|in|out)(?=[/:]|$)", "/*", response.url.path
    )
    path = re.sub(r"/(triage|smollm2-135m-instruct|fast)(?=[/:]|$)", "/*", path)
    return f"{response.request.method} {path}"


def _paths(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            # Names of files and of load targets are data, not fields.
            data = path.endswith(("SignedUrls.", "loadTargets."))
            yield from _paths(inner, f"{path}{'*' if data else key}.")
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner, f"{path}[].")
    else:
        yield path.removesuffix(".")


def walk_through(client: Fireworks, cloud: Served) -> None:
    """Call everything whose answer has fields."""
    client.accounts.list()
    client.accounts.get()
    client.users.list()
    client.users.get("learner")
    client.api_keys.list("learner")
    client.api_keys.create("learner", api_key={"expire_time": "2028-01-01T00:00:00Z"})
    client.models.list(account_id="fireworks", page_size=1)
    details: Any = {"kind": "HF_BASE_MODEL", "base_model_details": {"world_size": 1}}
    client.models.create(model_id="triage", model=details)
    sizes = {name: str(len(content)) for name, content in FILES.items()}
    asked = client.models.get_upload_endpoint("triage", filename_to_size=sizes)
    for name, url in (asked.filename_to_signed_urls or {}).items():
        httpx.put(url, content=FILES[name])
    client.models.validate_upload("triage")
    client.models.get_download_endpoint("triage")
    client.deployment_shapes.list(account_id="fireworks")
    client.deployment_shapes.get("fast", account_id="fireworks")
    client.deployment_shape_versions.match_for_model(SMOLLM2)
    mine = "accounts/course/models/triage"
    client.deployments.create(
        base_model=mine, deployment_id="triage", deployment_shape="default"
    )
    client.models.get("triage")
    cloud.clock.advance(BOOT.ready_s + BOOT.route_s)
    use(cloud)
    client.deployments.list()
    client.deployments.get("triage")
    run_job(client, ROWS)
    client.batch_inference_jobs.list()
    client.datasets.get("out")
    client.datasets.list()
    client.datasets.get_download_endpoint("out")
    client.chat.completions.create(
        model=SMOLLM2, messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )
    client.completions.create(model=SMOLLM2, prompt="Hello", max_tokens=4)
    client.deployments.delete("triage", ignore_checks=True)
    client.deployments.get("triage")


def current(model: models.Model) -> dict[str, Any]:
    """What the record should hold."""
    return {
        "sdk": version("fireworks-ai"),
        **fields_of_the_sdk(),
        "answers": answered(model),
    }


def differences(recorded: Any, found: Any, path: str = "") -> list[str]:
    """What changed, each in one line."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        return [
            line
            for key in sorted(recorded.keys() | found.keys())
            for line in differences(recorded.get(key), found.get(key), f"{path}/{key}")
        ]
    if isinstance(recorded, list) and isinstance(found, list):
        gone = [f"{path}: {x} is gone" for x in recorded if x not in found]
        return gone + [f"{path}: {x} is new" for x in found if x not in recorded]
    return [] if recorded == found else [f"{path}: was {recorded}, is {found}"]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def test_the_sdk_has_the_fields_it_had(recorded: dict[str, Any]):
    assert recorded["sdk"] == version("fireworks-ai")
    found = fields_of_the_sdk()
    expected = {part: recorded[part] for part in found}
    assert differences(expected, found) == []


def test_the_stand_in_answers_the_fields_it_answered(
    model: models.Model, recorded: dict[str, Any]
):
    assert differences(recorded["answers"], answered(model)) == []


# Whether these tests would notice.


def without(field: str) -> Callable[[Any], Any]:
    """A change to a function: its answer lacks a field."""

    def change(function: Any) -> Any:
        def less(*args: Any, **kwargs: Any) -> Any:
            made = function(*args, **kwargs)
            made.pop(field)
            return made

        return less

    return change


@pytest.mark.parametrize("field", ["replicaStats", "state", "region", "createTime"])
def test_a_field_the_stand_in_no_longer_answers_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
    model: models.Model,
    recorded: dict[str, Any],
    field: str,
):
    whole = deployments.Deployment.resource
    monkeypatch.setattr(deployments.Deployment, "resource", without(field)(whole))
    lost = differences(recorded["answers"], answered(model))
    assert lost
    assert all("is gone" in line and field in line for line in lost)


def test_an_answer_that_lost_all_its_fields_is_noticed(
    monkeypatch: pytest.MonkeyPatch, model: models.Model, recorded: dict[str, Any]
):
    monkeypatch.setattr(model_routes, "check_upload", lambda *_, **__: [])
    lost = differences(recorded["answers"], answered(model))
    assert lost == ["/GET /v1/accounts/*/models/*:validateUpload: warnings.[] is gone"]


def test_a_field_the_sdk_gained_is_noticed(
    monkeypatch: pytest.MonkeyPatch, recorded: dict[str, Any]
):
    class Later(types.Account):
        tier: str | None = None

    Later.__module__, Later.__name__ = types.Account.__module__, "Account"
    kinds = tuple(Later if kind is types.Account else kind for kind in ANSWERS)
    monkeypatch.setattr(sys.modules[__name__], "ANSWERS", kinds)
    changed = differences(recorded["types"], fields_of_the_sdk()["types"])
    assert changed == ["/account.Account/tier: was None, is str | NoneType"]


if __name__ == "__main__":
    with models.load() as opened:
        text = json.dumps(current(opened), indent=1)
    RECORD.write_text(text + "\n")
    print(f"Recorded {RECORD}.")
