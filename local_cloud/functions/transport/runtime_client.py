"""The transport of Lambda's runtime client in Python, where its own is not built.

awslambdaric does its HTTP in a compiled module, `runtime_client`, whose wheels are for
Linux. On other systems this one of the same name stands in: four functions, the same
behaviour, a tenth of a millisecond slower. It has a folder of its own because a folder
on the import path offers all its files.
"""

import http.client
import os

_api = http.client.HTTPConnection(os.environ["AWS_LAMBDA_RUNTIME_API"])
_headers = {}


def initialize_client(user_agent):
    _api.close()
    _headers["User-Agent"] = user_agent


def next():
    """The event's bytes and the headers it came with; waits until there is one."""
    return _call("GET", "next")


def post_invocation_result(request_id, body, content_type, invocation_id=None):
    _call("POST", f"{request_id}/response", body, {"Content-Type": content_type})


def post_error(request_id, error, xray_fault, invocation_id=None):
    _call("POST", f"{request_id}/error", error.encode())


def _call(method, path, body=None, headers=None):
    path = f"/2018-06-01/runtime/invocation/{path}"
    _api.request(method, path, body, {**_headers, **(headers or {})})
    answer = _api.getresponse()
    told = answer.read()
    if answer.status >= 300:
        raise RuntimeError(f"Expected the runtime API to take it, found {told!r}.")
    found = dict(answer.getheaders())
    deadline = "Lambda-Runtime-Deadline-Ms"
    return told, {**found, deadline: int(found.get(deadline, 0))}
