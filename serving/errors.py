"""A refusal or a failure, with everything its one envelope needs."""

from __future__ import annotations

from serving.answers import error_body


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
