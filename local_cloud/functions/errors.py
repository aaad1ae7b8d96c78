"""What a platform refuses, each under the name and status that Lambda gives it."""

from __future__ import annotations


class FunctionError(ValueError):
    """A function that cannot be deployed as it is described."""


class PlatformError(Exception):
    """A request the platform refuses; `code` and `status` are those of Lambda's API."""

    code = "ServiceException"
    status = 500
    reason: str | None = None


class NotFound(PlatformError):
    code = "ResourceNotFoundException"
    status = 404


class RequestTooLarge(PlatformError):
    code = "RequestTooLargeException"
    status = 413


class InvalidRequestContent(PlatformError):
    code = "InvalidRequestContentException"
    status = 400


class TooManyRequests(PlatformError):
    """All sandboxes the function may have are at work: throttled."""

    code = "TooManyRequestsException"
    status = 429

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class PlatformClosed(PlatformError):
    """The platform's `with` block has ended."""
