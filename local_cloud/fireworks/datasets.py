"""Datasets: files of JSON lines, to upload, check, use and download."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from fireworks import pagination, types
from starlette.datastructures import UploadFile

from local_cloud.fireworks import listing
from local_cloud.fireworks.clock import moment
from local_cloud.fireworks.listing import body, one, page, part, query
from local_cloud.fireworks.model_routes import signed
from local_cloud.fireworks.wire import (
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    Refusal,
    answer,
    read,
)

if TYPE_CHECKING:
    from local_cloud.fireworks.state import State

UPLOAD_BYTES = 150_000_000  # what the upload in one request takes
FIELDS = listing.mutable(types.dataset_update_params.DatasetUpdateParams)


def add_datasets(routes: APIRouter, state: State) -> None:
    """Verbs first: `/{dataset}` would take them for part of an id."""
    path = "/{account}/datasets"

    @routes.get(path)
    async def datasets(account: str, request: Request) -> JSONResponse:
        rows = [state.datasets[name] for name in sorted(state.datasets)]
        kind = pagination.SyncCursorDatasets[types.Dataset]
        return page(request, kind, "datasets", rows)

    @routes.post(path)
    async def create(account: str, request: Request) -> JSONResponse:
        given = await body(request)
        fields = read(types.Dataset, part(given, "dataset"), "dataset")
        name = dataset_name(
            account, listing.new_id(given.get("datasetId"), "datasetId")
        )
        kept = {key: value for key, value in fields.items() if key in FIELDS}
        made = add(state, listing.free(state.datasets, name), kept)
        return answer(types.Dataset, made)

    @routes.post(path + "/{dataset}:upload")
    async def upload(account: str, dataset: str, request: Request) -> JSONResponse:
        name = dataset_name(account, dataset)
        one(state.datasets, name)
        async with request.form() as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise Refusal(
                    INVALID_ARGUMENT, "Expected a form field `file` with a file."
                )
            content = await file.read(UPLOAD_BYTES + 1)
            filename = file.filename or "data.jsonl"
        if not 0 < len(content) <= UPLOAD_BYTES:
            raise Refusal(
                INVALID_ARGUMENT,
                f"Expected up to {UPLOAD_BYTES:,} bytes, found {len(content):,}. Use "
                "getUploadEndpoint for larger files.",
            )
        state.uploads.put(name, filename, content)
        finish(state, name)
        fields = {
            "id": dataset,
            "object": "file",
            "bytes": len(content),
            "filename": filename,
            "created_at": int(state.clock.now()),
        }
        return answer(types.DatasetUploadResponse, fields)

    @routes.post(path + "/{dataset}:getUploadEndpoint")
    async def endpoint(account: str, dataset: str, request: Request) -> JSONResponse:
        name = dataset_name(account, dataset)
        one(state.datasets, name)
        sizes = part(await body(request), "filenameToSize")
        urls = signed(request, state.uploads.expect(name, sizes))
        kind = types.DatasetGetUploadEndpointResponse
        return answer(kind, {"filenameToSignedUrls": urls})

    @routes.post(path + "/{dataset}:validateUpload")
    async def validate(account: str, dataset: str, request: Request) -> JSONResponse:
        one(state.datasets, dataset_name(account, dataset))
        finish(state, dataset_name(account, dataset))
        return JSONResponse({})

    @routes.get(path + "/{dataset}:getDownloadEndpoint")
    async def download(account: str, dataset: str, request: Request) -> JSONResponse:
        query(request)
        name = dataset_name(account, dataset)
        if one(state.datasets, name)["state"] != "READY":
            raise Refusal(FAILED_PRECONDITION, f"{name} is not ready yet.")
        urls = signed(request, state.uploads.offer(name))
        kind = types.DatasetGetDownloadEndpointResponse
        return answer(kind, {"filenameToSignedUrls": urls})

    @routes.get(path + "/{dataset}")
    async def get(account: str, dataset: str, request: Request) -> JSONResponse:
        query(request)
        return answer(
            types.Dataset, one(state.datasets, dataset_name(account, dataset))
        )

    @routes.patch(path + "/{dataset}")
    async def update(account: str, dataset: str, request: Request) -> JSONResponse:
        name = dataset_name(account, dataset)
        new = read(types.Dataset, await body(request), "dataset")
        mask = query(request, "updateMask").get("updateMask", "")
        fields = listing.merged(one(state.datasets, name), new, FIELDS, mask)
        now = moment(state.clock.now())
        state.datasets[name] = {**fields, "updateTime": now}
        return answer(types.Dataset, state.datasets[name])

    @routes.delete(path + "/{dataset}")
    async def delete(account: str, dataset: str, request: Request) -> JSONResponse:
        name = dataset_name(account, dataset)
        one(state.datasets, name)
        state.uploads.drop(name)
        del state.datasets[name]
        return JSONResponse({})


def dataset_name(account: str, dataset: str) -> str:
    """The full name of a dataset, from that or from its id."""
    return f"accounts/{account}/datasets/{dataset.rpartition('/')[2]}"


def add(state: State, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A new dataset without files."""
    now = moment(state.clock.now())
    times = {"createTime": now, "updateTime": now}
    made = {"format": "CHAT", **fields, "name": name, "state": "UPLOADING", **times}
    state.datasets[name] = made
    return made


def finish(state: State, name: str) -> None:
    """Check the files of a dataset; from here on it is ready.

    Raises:
        Refusal: one did not arrive, or a line is not JSON (code 9 or 3).
    """
    if not state.uploads.expected.get(name) or state.uploads.missing(name):
        raise Refusal(
            FAILED_PRECONDITION,
            f"Expected the files of {name}, found these missing or cut off: "
            f"{state.uploads.missing(name) or 'all'}.",
        )
    count = len(lines(state, name))
    state.datasets[name] = {
        **state.datasets[name],
        "state": "READY",
        "exampleCount": str(count),
        "updateTime": moment(state.clock.now()),
    }


def lines(state: State, name: str) -> list[dict[str, Any]]:
    """The examples of a dataset, all its files together.

    Raises:
        Refusal: a line is not a JSON object (code 3).
    """
    rows = []
    for file in state.uploads.expected.get(name, {}):
        content = state.uploads.path(name, file).read_bytes()
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as wrong:
                row = wrong
            if not isinstance(row, dict):
                raise Refusal(
                    INVALID_ARGUMENT,
                    f"{file}, line {number}: expected a JSON object, found {row!r}.",
                )
            rows.append(row)
    return rows
