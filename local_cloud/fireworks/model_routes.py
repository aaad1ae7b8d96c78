"""The routes of models: the catalogue, and one's own to create, upload and validate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from fireworks import pagination, types

from local_cloud.fireworks import listing
from local_cloud.fireworks.catalogue import EMULATED, PRECISIONS
from local_cloud.fireworks.clock import moment
from local_cloud.fireworks.listing import body, flag, one, page, part, query
from local_cloud.fireworks.wire import (
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    Refusal,
    answer,
    read,
)

if TYPE_CHECKING:
    from local_cloud.fireworks.state import State

MODEL_FIELDS = listing.mutable(types.model_update_params.ModelUpdateParams)


def add_models(routes: APIRouter, state: State) -> None:
    """Verbs first: `/{model}` would take them for part of an id."""

    def shown(name: str) -> dict[str, Any]:
        refs = [
            {"deployment": deployment, "state": "DEPLOYED", "default": not place}
            for place, deployment in enumerate(state.serving(name))
        ]
        return {
            **one(state.models, name),
            **({"deployedModelRefs": refs} if refs else {}),
        }

    @routes.get("/{account}/models")
    async def models(account: str, request: Request) -> JSONResponse:
        own = [n for n in sorted(state.models) if n.split("/")[1] == account]
        kind = pagination.SyncCursorModels[types.Model]
        return page(request, kind, "models", [shown(name) for name in own])

    @routes.post("/{account}/models")
    async def create(account: str, request: Request) -> JSONResponse:
        given = await body(request)
        fields = read(types.Model, part(given, "model"), "model")
        model = listing.new_id(given.get("modelId"), "modelId")
        name = listing.free(state.models, f"accounts/{account}/models/{model}")
        if fields.get("kind") != "HF_BASE_MODEL" or "baseModelDetails" not in fields:
            raise Refusal(
                INVALID_ARGUMENT,
                "The stand-in takes base models: expected kind HF_BASE_MODEL and "
                f"baseModelDetails, found kind {fields.get('kind', 'HF_PEFT_ADDON')}.",
            )
        now = moment(state.clock.now())
        state.models[name] = {
            "description": EMULATED,
            **{k: v for k, v in fields.items() if k in MODEL_FIELDS},
            "name": name,
            "state": "UPLOADING",
            "supportsServerless": False,
            "supportedPrecisions": PRECISIONS,
            "createTime": now,
            "updateTime": now,
        }
        return answer(types.Model, state.models[name])

    @routes.post("/{account}/models/{model}:getUploadEndpoint")
    async def upload(account: str, model: str, request: Request) -> JSONResponse:
        name = f"accounts/{account}/models/{model}"
        if one(state.models, name)["state"] != "UPLOADING":
            raise Refusal(FAILED_PRECONDITION, f"{name} is complete. Create another.")
        sizes = part(await body(request), "filenameToSize")
        urls = signed(request, state.uploads.expect(name, sizes))
        kind = types.ModelGetUploadEndpointResponse
        return answer(kind, {"filenameToSignedUrls": urls})

    @routes.get("/{account}/models/{model}:validateUpload")
    async def validate(account: str, model: str, request: Request) -> JSONResponse:
        given = query(
            request, "configOnly", "skipHfConfigValidation", "trustRemoteCode"
        )
        name = f"accounts/{account}/models/{model}"
        fields = one(state.models, name)
        warnings = check_upload(state, name, config=not flag(given, "configOnly"))
        now = moment(state.clock.now())
        state.models[name] = {**fields, "state": "READY", "updateTime": now}
        return answer(types.ModelValidateUploadResponse, {"warnings": warnings})

    @routes.get("/{account}/models/{model}:getDownloadEndpoint")
    async def download(account: str, model: str, request: Request) -> JSONResponse:
        query(request)
        name = f"accounts/{account}/models/{model}"
        if one(state.models, name)["state"] != "READY":
            raise Refusal(FAILED_PRECONDITION, f"{name} is not complete yet.")
        urls = signed(request, state.uploads.offer(name))
        kind = types.ModelGetDownloadEndpointResponse
        return answer(kind, {"filenameToSignedUrls": urls})

    @routes.get("/{account}/models/{model}")
    async def get(account: str, model: str, request: Request) -> JSONResponse:
        query(request)
        return answer(types.Model, shown(f"accounts/{account}/models/{model}"))

    @routes.patch("/{account}/models/{model}")
    async def update(account: str, model: str, request: Request) -> JSONResponse:
        name = f"accounts/{account}/models/{model}"
        new = read(types.Model, await body(request), "model")
        mask = query(request, "updateMask").get("updateMask", "")
        now = moment(state.clock.now())
        fields = listing.merged(one(state.models, name), new, MODEL_FIELDS, mask)
        state.models[name] = {**fields, "updateTime": now}
        return answer(types.Model, shown(name))

    @routes.delete("/{account}/models/{model}")
    async def delete(account: str, model: str, request: Request) -> JSONResponse:
        name = f"accounts/{account}/models/{model}"
        one(state.models, name)
        if users := state.serving(name):
            raise Refusal(FAILED_PRECONDITION, f"{name} is deployed to {users}.")
        state.uploads.drop(name)
        del state.models[name]
        return JSONResponse({})


def signed(request: Request, tokens: Mapping[str, str]) -> dict[str, str]:
    """The URL of each file for who has its token."""
    base = str(request.base_url)
    return {name: f"{base}signed/{token}/{name}" for name, token in tokens.items()}


def check_upload(state: State, name: str, *, config: bool) -> list[str]:
    """Look at what was uploaded; what else should be known.

    Raises:
        Refusal: something is missing or is not what its name says (code 9).
    """
    registered = state.uploads.expected.get(name, {})
    missing = state.uploads.missing(name)
    tensors = [f for f in registered if f.endswith((".safetensors", ".onnx"))]
    if not tensors:
        missing.append("*.safetensors")
    missing += [f for f in ("config.json", "tokenizer.json") if f not in registered]
    if not config:
        missing = [f for f in missing if f != "tokenizer.json"]
    if missing:
        raise Refusal(
            FAILED_PRECONDITION,
            f"Expected all files of {name}, found these missing or cut off: {missing}. "
            "Upload them to the URLs of getUploadEndpoint.",
        )
    for file in (f for f in registered if f.endswith(".json")):
        try:
            json.loads(state.uploads.path(name, file).read_bytes())
        except ValueError as wrong:
            raise Refusal(
                FAILED_PRECONDITION, f"Expected JSON in {file!r}, found: {wrong}."
            ) from None
    warnings = [EMULATED]
    if any(f.endswith(".onnx") for f in tensors):
        warnings.append(
            "ONNX is taken by this stand-in alone: the service takes Hugging Face "
            "safetensors."
        )
    return warnings
