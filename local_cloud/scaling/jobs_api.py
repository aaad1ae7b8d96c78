"""`/v1/jobs`: work that is accepted now and done when there is time.

    uvicorn.run(create_app(SQLiteJobs(path)))

    POST   /v1/jobs        202 and where to ask (Location). 429 when too many wait, 503
                           when the queue is gone, both with Retry-After.
    GET    /v1/jobs/{id}   what became of it; Retry-After while it is unfinished.
                           404 unknown or forgotten, 410 cancelled.
    DELETE /v1/jobs/{id}   cancels it: 204. 409 when it has finished.

With an `Idempotency-Key` a POST may be sent again: it gives the first one's job. Errors
come in the envelope of the model's API. The workers are elsewhere: see `worker`.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from local_cloud.scaling.jobs import (
    MAX_BYTES,
    MAX_DEADLINE_S,
    MAX_PRIORITY,
    BadJob,
    Jobs,
    JobsDown,
    JobsError,
    KeyTaken,
    QueueFull,
    Status,
)
from serving.answers import compact
from serving.asgi import Edge
from serving.errors import ApiError, http_error, invalid_request
from serving.idempotency import MAX_KEY_CHARS

# Seconds a client should wait: until a job may be done, until a full queue has room,
# until a back end that was started again has loaded its log.
ASK_AGAIN_S, FULL_S, DOWN_S = 1, 5, 2
BODY_BYTES = MAX_BYTES + 4096  # the payload, and what surrounds it
BODY_S = 10.0

log = logging.getLogger(__name__)

Key = Annotated[str | None, Header(min_length=1, max_length=MAX_KEY_CHARS)]


class Submission(BaseModel):
    """The body of a POST."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    payload: Any = Field(description="What the worker is given: any JSON.")
    priority: int = Field(0, ge=0, le=MAX_PRIORITY, strict=True)
    deadline_s: float | None = Field(
        None,
        gt=0,
        le=MAX_DEADLINE_S,
        description="No try begins later: what then waits for one is expired.",
    )


def router(jobs: Jobs) -> APIRouter:
    """The three routes, for an application that explains JobsError (see `explain`).

    Where `request.state.tenant` is set, each tenant's keys are its own. Ids cannot be
    guessed, so whoever has one may ask.
    """
    routes = APIRouter(prefix="/v1/jobs", tags=["jobs"])

    # Plain functions: the framework runs them in threads, which may wait for a disk.
    @routes.post("", status_code=202)
    def submit(
        body: Submission, request: Request, idempotency_key: Key = None
    ) -> Response:
        """Accepts a job; once it is answered, the job is kept."""
        key = None
        if idempotency_key:
            key = f"{getattr(request.state, 'tenant', '')}/{idempotency_key}"
        id = jobs.submit(
            body.payload, key=key, priority=body.priority, deadline_s=body.deadline_s
        )
        headers = {"location": f"/v1/jobs/{id}", "retry-after": str(ASK_AGAIN_S)}
        told = {"id": id, "object": "job", "status": "accepted"}
        return Response(compact(told), 202, headers, "application/json")

    @routes.get("/{id}")
    def status(id: str) -> Response:
        """What became of a job."""
        found = known(jobs.get(id), id)
        if found.state == "cancelled":
            raise ApiError(410, f"The job {id} was cancelled.", "cancelled")
        unfinished = found.state in ("waiting", "leased")
        headers = {"retry-after": str(ASK_AGAIN_S)} if unfinished else {}
        return Response(compact(shown(found)), 200, headers, "application/json")

    @routes.delete("/{id}", status_code=204)
    def cancel(id: str) -> None:
        """Nobody will begin it; a worker that has may not answer any more."""
        if jobs.cancel(id):
            return
        found = known(jobs.get(id), id)
        if found.state != "cancelled":  # twice is no error
            text = f"Expected an unfinished job, found {id} {found.state}. Keep it."
            raise ApiError(409, text, "finished")

    return routes


def known(found: Status | None, id: str) -> Status:
    """The status, or 404."""
    if found is None:
        text = f"Expected the id of a job, found none of {id!r:.80}. Old ones are "
        raise ApiError(404, text + "forgotten; submit it again.", "job_not_found")
    return found


def shown(found: Status) -> dict[str, Any]:
    """A status as a client sees it."""
    names = {"waiting": "queued", "leased": "running", "dead": "failed"}
    return {
        "id": found.id,
        "object": "job",
        "status": names.get(found.state, found.state),
        "tries": found.tries,
        "result": found.result,
        "error": found.error,
    }


def explain(error: Exception) -> ApiError:
    """What each error means to the caller. 429 and 503 mean: the same again, later."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return invalid_request(error)
        case HTTPException():
            return http_error(error)
        case QueueFull():
            after = {"retry-after": str(FULL_S)}
            return ApiError(429, str(error), "queue_full", headers=after)
        case JobsDown():  # its own words name files and addresses: not for strangers
            text = "The queue cannot be reached. Nothing was stored: come later."
            after = {"retry-after": str(DOWN_S)}
            return ApiError(503, text, "queue_unavailable", headers=after)
        case KeyTaken():
            return ApiError(422, str(error), "idempotency_key_reused")
        case BadJob():
            return ApiError(422, str(error), "invalid_value", param="payload")
        case JobsError():  # no waiting mends it: its words are for who runs the queue
            log.error("%s", error)
            text = (
                "The queue is not set up right. Nothing was stored: tell who runs it."
            )
            return ApiError(500, text, "queue_broken")
    raise error


async def on_error(request: Request, error: Exception) -> Response:
    """Puts any of them into the envelope."""
    told = explain(error)
    body = told.body(request.state.request_id)
    return Response(body, told.status, told.headers, "application/json")


def create_app(jobs: Jobs) -> FastAPI:
    """An application of nothing but the jobs."""
    app = FastAPI(title="Jobs")
    for kind in (ApiError, RequestValidationError, HTTPException, JobsError):
        app.add_exception_handler(kind, on_error)
    app.include_router(router(jobs))
    app.add_middleware(
        Edge,
        max_body_bytes=BODY_BYTES,
        body_timeout_s=BODY_S,
        on_finish=lambda *_: None,
    )
    return app
