"""Answers and errors as the SDK expects them.

Every answer passes through the SDK's own type, strictly: a field that the SDK does not
know, or a value it would refuse, fails here and not at the caller. Request bodies are
read through the same types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

T = TypeVar("T", bound=BaseModel)

INVALID_ARGUMENT = 3
NOT_FOUND = 5
ALREADY_EXISTS = 6
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
UNIMPLEMENTED = 12
UNAVAILABLE = 14
UNAUTHENTICATED = 16

STATUS = {  # what HTTP makes of a gRPC code
    INVALID_ARGUMENT: 400,
    NOT_FOUND: 404,
    ALREADY_EXISTS: 409,
    PERMISSION_DENIED: 403,
    RESOURCE_EXHAUSTED: 429,
    FAILED_PRECONDITION: 400,
    UNIMPLEMENTED: 501,
    UNAVAILABLE: 503,
    UNAUTHENTICATED: 401,
}


class Refusal(Exception):
    """A request the API refuses: a gRPC code, and words for people.

    The routes of an account answer it as {code, message, details}. Those of the models
    answer {"error": {message, type, code}}, with `reason` as the code if there is one.
    """

    def __init__(self, code: int, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.reason = code, message, reason

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.code]


def inference_error(refusal: Refusal) -> JSONResponse:
    """The error as the routes of the models give it."""
    kinds = {503: "error", 401: "authentication_error", 404: "not_found_error"}
    kind = kinds.get(refusal.status, "invalid_request_error")
    error = {"message": refusal.message, "type": kind, "code": refusal.reason or kind}
    return JSONResponse({"error": error}, refusal.status)


def management_error(refusal: Refusal) -> JSONResponse:
    """The error as the routes of an account give it."""
    body = {"code": refusal.code, "message": refusal.message, "details": []}
    return JSONResponse(body, refusal.status)


def answer(kind: type[BaseModel], fields: Mapping[str, Any]) -> JSONResponse:
    """An answer of one SDK type.

    Raises:
        ValueError: the SDK would refuse it, or does not know a field of it.
    """
    checked = kind.model_validate(fields)
    if unknown := extras(checked):
        raise ValueError(f"Expected fields that {kind.__name__} has, found {unknown}.")
    dumped = checked.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return JSONResponse(dumped)


def read(kind: type[T], body: Any, what: str) -> dict[str, Any]:
    """The fields of a request body, by the names of the API, as JSON values.

    Raises:
        Refusal: a value is of the wrong type, or a name is unknown (code 3).
    """
    if not isinstance(body, dict):
        raise Refusal(
            INVALID_ARGUMENT,
            f"Expected {what} as a JSON object, found {type(body).__name__}.",
        )
    try:
        checked = kind.model_validate(body)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        raise Refusal(
            INVALID_ARGUMENT, f"{what}, field {path!r}: {first['msg']}."
        ) from None
    if unknown := extras(checked):
        raise Refusal(
            INVALID_ARGUMENT,
            f"Expected fields of {what}, found unknown {unknown}. Names are in "
            "camelCase, as in the reference of the REST API.",
        )
    return checked.model_dump(mode="json", by_alias=True, exclude_unset=True)


def extras(value: Any, path: str = "") -> list[str]:
    """Paths of all fields that no type of the SDK declares, at any depth."""
    if isinstance(value, BaseModel):
        found = [f"{path}{name}" for name in value.model_extra or {}]
        for name in type(value).model_fields:
            found += extras(getattr(value, name), f"{path}{name}.")
        return found
    if isinstance(value, Mapping):
        return [e for key, v in value.items() for e in extras(v, f"{path}{key}.")]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [e for i, v in enumerate(value) for e in extras(v, f"{path}{i}.")]
    return []


@cache
def names(params: type) -> dict[str, str]:
    """Python name to API name, of everything one of the SDK's calls can send."""
    hints = get_type_hints(params, include_extras=True)
    return {name: _alias(hint) or name for name, hint in hints.items()}


def _alias(hint: Any) -> str | None:
    """The alias in Required[Annotated[str, PropertyInfo(alias=...)]]."""
    if get_origin(hint) is Annotated:
        return next((a.alias for a in hint.__metadata__ if hasattr(a, "alias")), None)
    return next(filter(None, map(_alias, get_args(hint))), None)
