"""A FaaS platform as Lambda is one: the real runtime client in real processes.

    from local_cloud.functions import Function, Platform

    with Platform() as cloud:
        cloud.deploy(Function("echo", "module.handler", code=folder))
        result = cloud.invoke("echo", {"hello": "world"})
        print(result.payload, result.report)

The rooms: `platform` (functions, invocations, concurrency), `pool` (the sandboxes of
one function), `sandbox` (one execution environment and its phases), `runtime_api` (what
a function's process talks to), `cgroup` (what it may use), `snapshot` (start by fork),
`asynchronous` (events, retries, dead letters), `report` (the REPORT line), `invoke_url`
(the API that boto3 speaks), `guardian` (the end of everything when the platform is
killed), `queue` and `events` (what sets functions off), `costs` (what it would cost).

Importing any of them starts nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from local_cloud.functions.errors import (
    FunctionError,
    InvalidRequestContent,
    NotFound,
    PlatformClosed,
    PlatformError,
    RequestTooLarge,
    TooManyRequests,
)

if TYPE_CHECKING:
    from local_cloud.functions.platform import Function, Platform
    from local_cloud.functions.pool import Result
    from local_cloud.functions.report import Report

__all__ = [
    "Function",
    "FunctionError",
    "InvalidRequestContent",
    "NotFound",
    "Platform",
    "PlatformClosed",
    "PlatformError",
    "Report",
    "RequestTooLarge",
    "Result",
    "TooManyRequests",
]


def __getattr__(name: str):
    # A process that needs one room, such as the guardian, does not load them all.
    if name in _ROOMS:
        room = importlib.import_module(f"local_cloud.functions.{_ROOMS[name]}")
        return getattr(room, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_ROOMS = {
    "Function": "platform",
    "Platform": "platform",
    "Report": "report",
    "Result": "pool",
}
