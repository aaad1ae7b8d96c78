"""A refusal or a failure, with everything its one envelope needs."""

from __future__ import annotations

import math

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serving.answers import error_body
from serving.limits import OverBudget
from serving.protocol import explain


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        named = {
            401: "authentication_error",
            403: "permission_error",
            429: "rate_limit_error",
            503: "overloaded_error",
            504: "timeout_error",
        }
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return named.get(self.status, fallback)

    def body(self, request_id: str) -> bytes:
        """The envelope."""
        return error_body(
            self.message,
            self.kind,
            param=self.param,
            code=self.code,
            request_id=request_id,
        )


def failed_answer(reason: str) -> ApiError:
    """What the engine's finish reason means to the caller."""
    if reason == "deadline":
        text = "The answer took longer than this server allows. Lower max_tokens."
        return ApiError(504, text, "timeout")
    if reason == "cancelled":
        text = "The server is going away. Retry."
        return ApiError(503, text, "shutting_down", headers={"retry-after": "1"})
    return ApiError(500, "The engine failed on this answer. Retry.", "engine_failed")


def over_budget(error: OverBudget) -> ApiError:
    """429, and for clients that retry by themselves: not before the budget allows."""
    text = (
        f"Expected at most {error.limit:,} {error.kind} a minute from one key, found "
        f"more with the {error.cost:,} of this request."
    )
    if error.retry_after_s is None:
        text += " It can never fit: lower max_tokens or split it."
        return ApiError(429, text, "request_too_large", headers=DO_NOT_RETRY)
    after = {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
    code = f"{error.kind}_per_minute"
    return ApiError(429, f"{text} Wait.", code, headers={**after, **DO_NOT_RETRY})


DO_NOT_RETRY = {"x-should-retry": "false"}  # OpenAI's clients obey it


def invalid_request(error: RequestValidationError) -> ApiError:
    """400 for what is no JSON, 422 for JSON that says something else than we take."""
    found = list(error.errors())
    message, param = explain(found)
    if found[0]["type"] == "json_invalid":
        return ApiError(400, message, "invalid_json", param=param)
    return ApiError(422, message, "invalid_value", param=param)


def http_error(error: HTTPException) -> ApiError:
    """What the framework refuses by itself: paths, methods, sizes."""
    code, message = HTTP_ERRORS.get(error.status_code, (None, None))
    headers = dict(error.headers or {})
    return ApiError(error.status_code, message or error.detail, code, headers=headers)


HTTP_ERRORS = {
    404: ("not_found", "There is nothing at this path. The paths are listed at /docs."),
    405: ("method_not_allowed", "Expected another method: Allow says which."),
    408: ("body_timeout", None),
    413: ("body_too_large", None),
}
