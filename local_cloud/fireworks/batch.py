"""Batch jobs: the lines of a dataset, answered by the shared model at half price."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from fireworks import pagination, types

from local_cloud.fireworks import datasets, inference, listing
from local_cloud.fireworks.clock import moment
from local_cloud.fireworks.listing import body, one, page, query
from local_cloud.fireworks.plane import Route, Use
from local_cloud.fireworks.wire import (
    INVALID_ARGUMENT,
    UNIMPLEMENTED,
    Refusal,
    answer,
    read,
)

if TYPE_CHECKING:
    from local_cloud.fireworks.state import State

AT_ONCE = 8  # requests of one job in the engine
DONE = ("JOB_STATE_COMPLETED", "JOB_STATE_FAILED")
GOOD = {"code": "OK", "message": "Emulated: half of the serverless price."}
RESULTS, ERRORS = "results.jsonl", "errors.jsonl"


@dataclass
class Job:
    """One batch job: what was asked for, how far it is, and what came of it."""

    state: State
    owner: str  # the id of its account
    fields: dict[str, Any]
    phase: str = "JOB_STATE_CREATING"
    status: dict[str, str] = field(default_factory=lambda: dict(GOOD))
    counts: dict[str, int] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    # A `Plane` of its own: always served, and billed at half price.

    def __post_init__(self) -> None:
        self.engine, self.faults = self.state.engine, self.state.faults
        self.generations = 0

    def account(self, key: str) -> str | None:
        return self.state.account(key)

    def route(self, name: str, account: str) -> Route:
        return Route(self.fields["model"])

    def began(self, route: Route) -> None:
        self.state.began(route)

    def ended(self, route: Route, use: Use) -> None:
        self.state.batched(route, use)
        self._count("inputTokens", use.prompt_tokens)
        self._count("outputTokens", use.completion_tokens)
        self._count("cachedInputTokenCount", use.cached_tokens)

    def refused(self, route: Route | None, status: int) -> None: ...

    def _count(self, name: str, amount: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount

    # Its work.

    async def run(self) -> None:
        """Answer every line; what goes wrong with one is told in the error file."""
        try:
            self._turn("VALIDATING")
            rows = self._rows()
            self.counts["totalInputRequests"] = len(rows)
            self._turn("RUNNING")
            room = asyncio.Semaphore(AT_ONCE)
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(self._answer(row, room)) for row in rows]
            self._turn("WRITING_RESULTS")
            self._write([task.result() for task in asked])
            self._turn("COMPLETED")
        except Refusal as refusal:
            self.status = {"code": "INVALID_ARGUMENT", "message": refusal.message}
            self._turn("FAILED")
        finally:
            if self.phase not in DONE:  # a mistake of the stand-in, or its end
                self.status = {"code": "INTERNAL", "message": "The job was ended."}
                self._turn("FAILED")

    def _turn(self, phase: str) -> None:
        self.phase = f"JOB_STATE_{phase}"
        self.fields["updateTime"] = moment(self.state.clock.now())

    def _rows(self) -> list[dict[str, Any]]:
        rows = datasets.lines(self.state, self.fields["inputDatasetId"])
        ids = [row.get("custom_id") for row in rows]
        for number, row in enumerate(rows, 1):
            known = isinstance(row.get("custom_id"), str)
            if not known or not isinstance(row.get("body"), dict):
                raise Refusal(
                    INVALID_ARGUMENT,
                    f"Line {number}: expected custom_id and body, found {sorted(row)}.",
                )
        if len(set(ids)) != len(ids):
            raise Refusal(INVALID_ARGUMENT, "Expected every custom_id once.")
        return rows

    async def _answer(
        self, row: dict[str, Any], room: asyncio.Semaphore
    ) -> dict[str, Any]:
        asked = {**self._defaults(), **row["body"], "model": self.fields["model"]}
        told: dict[str, Any] = {"custom_id": row["custom_id"]}
        async with room:
            try:
                told["response"] = await inference.answer(self, asked, self.owner)
                self._count("successfullyProcessedRequests")
            except (Refusal, inference.Broken) as problem:
                told["error"] = {"message": str(problem)}
                self._count("failedRequests")
        self._count("totalProcessedRequests")
        done = self.counts["totalProcessedRequests"]
        self.counts["percent"] = 100 * done // self.counts["totalInputRequests"]
        return told

    def _defaults(self) -> dict[str, Any]:
        given: dict[str, Any] = self.fields.get("inferenceParameters") or {}
        names = {"maxTokens": "max_tokens", "topP": "top_p", "topK": "top_k"}
        plain = {names.get(k, k): v for k, v in given.items() if k != "extraBody"}
        return {**plain, **json.loads(given.get("extraBody") or "{}")}

    def _write(self, told: list[dict[str, Any]]) -> None:
        name = self.fields["outputDatasetId"]
        for file, part in ((RESULTS, "response"), (ERRORS, "error")):
            rows = [json.dumps(row) for row in told if part in row]
            content = "".join(f"{row}\n" for row in rows).encode()
            self.state.uploads.put(name, file, content)
        self.counts["outputRows"] = len(told) - self.counts.get("failedRequests", 0)
        datasets.finish(self.state, name)

    def resource(self) -> dict[str, Any]:
        """The job as its owner sees it."""
        return {
            **self.fields,
            "state": self.phase,
            "status": self.status,
            "jobProgress": self.counts,
        }


def add_jobs(routes: APIRouter, state: State) -> None:
    """Create, watch and delete jobs."""
    path = "/{account}/batchInferenceJobs"

    @routes.get(path)
    async def jobs(account: str, request: Request) -> JSONResponse:
        rows = [job.resource() for job in state.jobs.values()]
        kind = pagination.SyncCursorBatchInferenceJobs[types.BatchInferenceJob]
        return page(request, kind, "batchInferenceJobs", rows)

    @routes.post(path)
    async def create(account: str, request: Request) -> JSONResponse:
        given = query(request, "batchInferenceJobId")
        fields = read(types.BatchInferenceJob, await body(request), "job")
        chosen = listing.new_id(given.get("batchInferenceJobId"), "batchInferenceJobId")
        name = listing.free(
            state.jobs, f"accounts/{account}/batchInferenceJobs/{chosen}"
        )
        job = Job(state, account, prepare(state, account, name, fields))
        output = job.fields["outputDatasetId"]
        datasets.add(
            state, listing.free(state.datasets, output), {"sourceJobName": name}
        )
        state.jobs[name] = job
        made = answer(types.BatchInferenceJob, job.resource())
        job.task = asyncio.create_task(job.run())
        return made

    @routes.get(path + "/{job}")
    async def get(account: str, job: str, request: Request) -> JSONResponse:
        query(request)
        found = one(state.jobs, f"accounts/{account}/batchInferenceJobs/{job}")
        return answer(types.BatchInferenceJob, found.resource())

    @routes.delete(path + "/{job}")
    async def delete(account: str, job: str, request: Request) -> JSONResponse:
        name = f"accounts/{account}/batchInferenceJobs/{job}"
        await stop(one(state.jobs, name))
        del state.jobs[name]
        return JSONResponse({})


def prepare(
    state: State, account: str, name: str, fields: dict[str, Any]
) -> dict[str, Any]:
    """The job's fields, checked and complete.

    Raises:
        Refusal: the model or the dataset is not there, or cannot be used.
    """
    if state.engine is None or "continuedFromJobName" in fields:
        raise Refusal(
            UNIMPLEMENTED,
            "Expected a stand-in with a model, and a job from its beginning: "
            "continuedFromJobName is not emulated.",
        )
    source = datasets.dataset_name(account, fields.get("inputDatasetId", ""))
    if one(state.datasets, source)["state"] != "READY":
        raise Refusal(INVALID_ARGUMENT, f"Expected {source} to be READY.")
    if one(state.models, fields.get("model"))["state"] != "READY":
        raise Refusal(INVALID_ARGUMENT, f"Expected {fields['model']} to be READY.")
    extra = (fields.get("inferenceParameters") or {}).get("extraBody") or "{}"
    try:
        json.loads(extra)
    except ValueError as wrong:
        raise Refusal(INVALID_ARGUMENT, f"extraBody: expected JSON: {wrong}.") from None
    output = fields.get("outputDatasetId") or f"{name.rpartition('/')[2]}-output"
    return {
        **fields,
        "name": name,
        "inputDatasetId": source,
        "outputDatasetId": datasets.dataset_name(account, output),
        "createTime": moment(state.clock.now()),
    }


async def stop(job: Job) -> None:
    """End its work, if it still runs."""
    if job.task is not None and not job.task.done():
        job.task.cancel()
        await asyncio.gather(job.task, return_exceptions=True)
