"""The routes of deployments, and of the shapes they come in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from fireworks import pagination, types

from local_cloud.fireworks import listing
from local_cloud.fireworks.catalogue import shapes, version
from local_cloud.fireworks.deployments import PURGE_S, Deployment, complete
from local_cloud.fireworks.listing import body, flag, one, page, part, query
from local_cloud.fireworks.wire import (
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    NOT_FOUND,
    Refusal,
    answer,
    read,
)

if TYPE_CHECKING:
    from local_cloud.fireworks.state import State

GUARDED_S = 3600.0  # who served within this is not deleted by accident
HARDWARE = ("acceleratorType", "acceleratorCount", "precision")
FIELDS = listing.mutable(types.deployment_update_params.DeploymentUpdateParams)
CREATE_QUERY = (
    "deploymentId",
    "disableAutoDeploy",
    "disableSpeculativeDecoding",
    "skipImageTagValidation",
    "skipShapeValidation",
    "acceptShapelessRisk",
    "validateOnly",
)


def add_shapes(routes: APIRouter, state: State) -> None:
    """Shapes are offered by the public account, and matched to a model."""
    known = shapes()

    @routes.post("/{account}/deploymentShapeVersions:match")
    async def match(account: str, request: Request) -> JSONResponse:
        asked = part(await body(request), "createDeploymentRequest")
        one(state.models, part(asked, "deployment").get("baseModel"))
        rows = [version(shape) for shape in known.values()]
        kind = types.DeploymentShapeVersionMatchResponse
        return answer(kind, {"deploymentShapeVersions": rows, "totalSize": len(rows)})

    @routes.get("/{account}/deploymentShapes")
    async def list_shapes(account: str, request: Request) -> JSONResponse:
        kind = pagination.SyncCursorDeploymentShapes[types.DeploymentShape]
        rows = [s for s in known.values() if s["name"].split("/")[1] == account]
        return page(request, kind, "deploymentShapes", rows, "targetModel")

    @routes.get("/{account}/deploymentShapes/{shape}")
    async def get(account: str, shape: str, request: Request) -> JSONResponse:
        query(request)
        name = f"accounts/{account}/deploymentShapes/{shape}"
        return answer(types.DeploymentShape, one(known, name))


def add_deployments(routes: APIRouter, state: State) -> None:
    """Verbs first: `/{deployment}` would take them for part of an id."""
    path = "/{account}/deployments"

    def find(account: str, deployment: str, *, deleted: bool = False) -> Deployment:
        sweep(state)
        found = one(state.deployments, f"accounts/{account}/deployments/{deployment}")
        if deleted != (found.deleted_s is not None):
            problem = "is not deleted" if deleted else "is deleted: undelete it first"
            raise Refusal(FAILED_PRECONDITION, f"{found.name} {problem}.")
        return found

    def shown(found: Deployment) -> JSONResponse:
        return answer(types.Deployment, found.resource(state.clock.now()))

    @routes.get(path)
    async def deployments(account: str, request: Request) -> JSONResponse:
        sweep(state)
        deleted = flag(dict(request.query_params), "showDeleted")
        now = state.clock.now()
        with state.lock:
            rows = [
                d.resource(now)
                for d in state.deployments.values()
                if deleted or d.deleted_s is None
            ]
        kind = pagination.SyncCursorDeployments[types.Deployment]
        return page(request, kind, "deployments", rows, "showDeleted")

    @routes.post(path)
    async def create(account: str, request: Request) -> JSONResponse:
        given = query(request, *CREATE_QUERY)
        fields = read(types.Deployment, await body(request), "deployment")
        shapeless = flag(given, "acceptShapelessRisk")
        if shapeless and "deploymentShape" in fields:
            raise Refusal(
                INVALID_ARGUMENT,
                "Expected deploymentShape or acceptShapelessRisk, found both.",
            )
        sweep(state)
        name = listing.new_id(given.get("deploymentId"), "deploymentId")
        made = Deployment(
            listing.free(state.deployments, f"accounts/{account}/deployments/{name}"),
            settings(state, fields),
            state.clock.now(),
            state.boot,
        )
        if not flag(given, "validateOnly"):
            with state.lock:
                state.deployments[made.name] = made
        return shown(made)

    @routes.patch(path + "/{deployment}:scale")
    async def scale(account: str, deployment: str, request: Request) -> JSONResponse:
        query(request)
        count = (await body(request)).get("replicaCount", 0)
        if not isinstance(count, int) or isinstance(count, bool):
            raise Refusal(
                INVALID_ARGUMENT, f"replicaCount: expected a number, found {count!r}."
            )
        with state.lock:
            find(account, deployment).scale_to(count, state.clock.now())
        return JSONResponse({})

    @routes.post(path + "/{deployment}:undelete")
    async def undelete(account: str, deployment: str, request: Request) -> JSONResponse:
        query(request)
        with state.lock:
            found = find(account, deployment, deleted=True)
            found.undelete(state.clock.now())
        return shown(found)

    @routes.get(path + "/{deployment}")
    async def get(account: str, deployment: str, request: Request) -> JSONResponse:
        query(request)
        sweep(state)
        name = f"accounts/{account}/deployments/{deployment}"
        with state.lock:
            return shown(one(state.deployments, name))

    @routes.patch(path + "/{deployment}")
    async def update(account: str, deployment: str, request: Request) -> JSONResponse:
        given = query(request, "updateMask", "skipShapeValidation")
        new = read(types.Deployment, await body(request), "deployment")
        with state.lock:
            found = find(account, deployment)
            mask = given.get("updateMask", "")
            fields = listing.merged(unshaped(found.fields), new, FIELDS, mask)
            found.update(settings(state, fields), state.clock.now())
        return shown(found)

    @routes.delete(path + "/{deployment}")
    async def delete(account: str, deployment: str, request: Request) -> JSONResponse:
        given = query(request, "hard", "ignoreChecks")
        with state.lock:
            found = find(account, deployment)
            check_idle(state, found, request, forced=flag(given, "ignoreChecks"))
            found.delete(state.clock.now())
            if flag(given, "hard"):
                state.forget(found.name)
        return JSONResponse({})


def sweep(state: State) -> None:
    """Purge what was deleted long ago."""
    with state.lock:
        before = state.clock.now() - PURGE_S
        for name, deployment in list(state.deployments.items()):
            if deployment.deleted_s is not None and deployment.deleted_s < before:
                state.forget(name)


def check_idle(
    state: State, found: Deployment, request: Request, *, forced: bool
) -> None:
    """Let nobody delete what is in use, unless they insist.

    Raises:
        Refusal: it served within the hour (code 9).
    """
    served = state.clock.now() - found.last_served_s < GUARDED_S
    refused = state.faults.strike("delete_refused", headers=request.headers)
    if refused or (served and not forced):
        raise Refusal(
            FAILED_PRECONDITION,
            f"{found.name} served requests within the last hour. To delete it all the "
            "same, set ignoreChecks.",
        )


def settings(state: State, fields: dict[str, Any]) -> dict[str, Any]:
    """What an owner set, checked, with everything filled in that was left open.

    Raises:
        Refusal: the model is not there or not ready, or parts do not go together.
    """
    fields = {name: value for name, value in fields.items() if name in FIELDS}
    model = state.models.get(fields["baseModel"])
    if model is None:
        raise Refusal(NOT_FOUND, f"Base model {fields['baseModel']} not found.")
    if model["state"] != "READY":
        raise Refusal(
            FAILED_PRECONDITION,
            f"{model['name']} is not ready. Upload its files and call validateUpload.",
        )
    fields = shaped(fields)
    details = model.get("baseModelDetails") or {}
    fields.setdefault("acceleratorType", "NVIDIA_H100_80GB")
    fields.setdefault("acceleratorCount", details.get("worldSize", 1))
    fields.setdefault("precision", details.get("defaultPrecision", "BF16"))
    fields.setdefault("placement", {"multiRegion": "GLOBAL"})
    choices = {
        "acceleratorType": list(state.prices.gpu_hour),
        "precision": model["supportedPrecisions"],
    }
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            raise Refusal(
                INVALID_ARGUMENT, f"{name}: expected {allowed}, found {fields[name]}."
            )
    if len(fields["placement"]) != 1 or fields["acceleratorCount"] < 1:
        raise Refusal(
            INVALID_ARGUMENT,
            "Expected a placement of one field and at least one accelerator, found "
            f"{fields['placement']} and {fields['acceleratorCount']}.",
        )
    return complete(fields)


def unshaped(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without what their shape, if there is one, had filled in."""
    filled = HARDWARE if fields.get("deploymentShape") else ()
    return {name: value for name, value in fields.items() if name not in filled}


def shaped(fields: dict[str, Any]) -> dict[str, Any]:
    """Take hardware and precision from the shape, if there is one.

    Raises:
        Refusal: there is no such shape, or other hardware was asked for as well.
    """
    asked = fields.get("deploymentShape")
    if not asked:
        return dict(fields)
    known = shapes()
    default = next(iter(known))
    name = default if asked == "default" else asked.partition("/versions/")[0]
    shape = one(known, name)
    for name in HARDWARE:
        if fields.get(name, shape[name]) != shape[name]:
            raise Refusal(
                INVALID_ARGUMENT,
                f"{name}: the shape has {shape[name]}, found {fields[name]}. Leave it "
                "out, or choose another shape.",
            )
    hardware = {name: shape[name] for name in HARDWARE}
    return {**fields, **hardware, "deploymentShape": version(shape)["name"]}
