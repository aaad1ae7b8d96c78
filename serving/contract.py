"""What `/openapi.json` promises: keys, answers, and the one shape of every error."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from pydantic import BaseModel

from serving.answers import Completed, ErrorEnvelope

ERRORS = {
    400: "Not JSON, too long for the model, or a form that cannot be guaranteed.",
    401: "No valid key.",
    403: "The key lacks the scope.",
    404: "No such path or model.",
    405: "The path has other methods.",
    408: "The body came too slowly.",
    409: "The same idempotency key is still being worked on.",
    413: "The body is too large.",
    422: "A field is unknown, missing or wrong.",
    429: "The caller's budget of requests or tokens is spent.",
    500: "The server failed.",
    503: "Overloaded, loading or going away. Retry-After says when to come back.",
    504: "The answer took longer than the server allows.",
}


Options = dict[str, Any]  # of one route


def work(answer: type[BaseModel], scope: str) -> Options:
    """A route that costs something; completions can also stream."""
    ok: Options = {"model": answer, "description": "The answer."}
    if issubclass(answer, Completed):
        ok["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return _keyed(scope, {200: ok, **_errors(*ERRORS)})


def read(answer: type[BaseModel], scope: str) -> Options:
    """A route that tells what is there already."""
    ok = {"model": answer, "description": "The answer."}
    return _keyed(scope, {200: ok, **_errors(401, 403, 405, 503)})


def text(content_type: str, scope: str) -> Options:
    """A route whose answer is text."""
    plain = {content_type.partition(";")[0]: {"schema": {"type": "string"}}}
    ok = {"content": plain, "description": "The answer."}
    options = _keyed(scope, {200: ok, **_errors(401, 403, 405)})
    return {**options, "response_class": Response}  # not JSON; its refusals are


def health(answer: type[BaseModel]) -> Options:
    """A route for orchestrators: open to all, 503 means no."""
    responses = {
        200: {"model": answer, "description": "Yes."},
        503: {"model": answer, "description": "No."},
        **_errors(405),
    }
    return {"responses": responses, "response_model": None, "tags": ["health"]}


def _keyed(scope: str, responses: dict[Any, Any]) -> Options:
    """The route enforces the scope it declares here."""
    return {
        "responses": responses,
        "response_model": None,
        "tags": [scope],
        "openapi_extra": {"security": [{"key": [scope]}]},
    }


def _errors(*statuses: int) -> dict[Any, Any]:
    return {
        status: {"model": ErrorEnvelope, "description": ERRORS[status]}
        for status in statuses
    }


def declared_scope(openapi_extra: dict[str, Any] | None) -> str | None:
    """Read the scope back."""
    security = (openapi_extra or {}).get("security")
    return security[0]["key"][0] if security else None


def describe(app: FastAPI) -> None:
    """Give the app its OpenAPI document, with the key as a security scheme."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            scheme = {"type": "http", "scheme": "bearer"}
            components = schema.setdefault("components", {})
            components["securitySchemes"] = {"key": scheme}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
