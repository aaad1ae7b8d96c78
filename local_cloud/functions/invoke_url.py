"""The address where functions are invoked, in the dialect of Lambda's own Invoke API.

    with Platform() as cloud, invoke_url.serve(cloud) as url:
        client = boto3.client("lambda", endpoint_url=url, ...)
        client.invoke(FunctionName="echo", Payload=b"{}")

Every AWS SDK and the CLI take an `endpoint_url`, so what runs here runs there. Only
Invoke is spoken; signatures are not checked: this listens on loopback.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from local_cloud.functions.errors import (
    InvalidRequestContent,
    NotFound,
    PlatformError,
)
from local_cloud.functions.platform import SYNC_BYTES, Platform, encode
from local_cloud.functions.sandbox import ARN

PATH = re.compile(r"/2015-03-31/functions/([^/]+)/invocations/?")
# A name, a partial ARN (account:function:name) or a whole one, each with a qualifier.
NAME = re.compile(
    r"(?:(?:arn:[\w-]+:lambda:[\w-]+:)?\d{12}:function:)?([\w-]+)(?::([\w$-]+))?"
)
LOG_TAIL_BYTES = 4096
PIECE_BYTES = 2**20

log = logging.getLogger(__name__)


@contextmanager
def serve(cloud: Platform) -> Iterator[str]:
    """Serves a platform on a free port of 127.0.0.1; gives the endpoint's URL."""

    class ForCloud(InvokeHandler):
        platform = cloud

    server = ThreadingHTTPServer(("127.0.0.1", 0), ForCloud)
    thread = threading.Thread(
        target=server.serve_forever, args=(0.05,), name="invoke-url", daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class InvokeHandler(BaseHTTPRequestHandler):
    """One connection of a caller."""

    platform: Platform
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60  # of a connection on which nothing is said

    def handle(self) -> None:
        with suppress(ConnectionError):  # a caller may leave at any time
            super().handle()

    def do_POST(self) -> None:
        """POST /2015-03-31/functions/<name>/invocations."""
        try:
            self._invoke()
        except PlatformError as error:
            self._refuse(error)
        except (ConnectionError, TimeoutError):  # the caller's, who is gone
            raise
        except Exception:
            log.exception("POST %s", self.path)
            self._refuse(PlatformError("Internal error: the platform's log tells it."))

    def _invoke(self) -> None:
        body = self._body()
        name = self._function_name()
        kind = self.headers.get("X-Amz-Invocation-Type", "RequestResponse")
        if kind == "DryRun":
            encode(body, SYNC_BYTES, kind)
            self._answer(204, b"", {"x-amzn-RequestId": str(uuid.uuid4())})
        elif kind == "Event":
            request_id = self.platform.send(name, body)
            self._answer(202, b"", {"x-amzn-RequestId": request_id})
        elif kind == "RequestResponse":
            self._wait_for(name, body)
        else:
            raise InvalidParameter(
                "Expected InvocationType to be RequestResponse, Event or DryRun, "
                f"found {kind}."
            )

    def _wait_for(self, name: str, body: bytes) -> None:
        context = self.headers.get("X-Amz-Client-Context")
        result = self.platform.invoke(
            name, body, client_context=_decoded(context) if context else None
        )
        headers = {
            "x-amzn-RequestId": result.request_id,
            "X-Amz-Executed-Version": "$LATEST",
        }
        if result.error:
            headers["X-Amz-Function-Error"] = result.error
        if self.headers.get("X-Amz-Log-Type") == "Tail":
            tail = result.log.encode()[-LOG_TAIL_BYTES:]
            headers["X-Amz-Log-Result"] = base64.b64encode(tail).decode()
        self._answer(200, result.payload, headers)

    def _function_name(self) -> str:
        """The function that the path names; it must exist, in its latest version."""
        url = urlsplit(self.path)
        found = PATH.fullmatch(url.path)
        if not found:
            raise NotFound(f"Expected {PATH.pattern}, found {url.path}")
        named = NAME.fullmatch(unquote(found[1]))
        if not named:
            raise NotFound(f"Function not found: {ARN}{unquote(found[1])}")
        name, qualifier = named[1], named[2] or parse_qs(url.query).get("Qualifier")
        if qualifier and qualifier not in ("$LATEST", ["$LATEST"]):
            raise NotFound(f"Function not found: {ARN}{name}:{qualifier}")
        return self.platform.function(name).name

    def _body(self) -> bytes:
        told = self.headers.get("Content-Length") or "0"
        if not re.fullmatch(r"[0-9]{1,18}", told):
            self.close_connection = True  # nobody knows where this request ends
            raise InvalidRequestContent(
                f"Expected Content-Length to be a number of bytes, found {told!r:.40}"
            )
        left, body = int(told), bytearray()
        while left and (piece := self.rfile.read(min(left, PIECE_BYTES))):
            left -= len(piece)
            if len(body) <= SYNC_BYTES:  # one that is too large is not kept whole
                body += piece
        return bytes(body)

    def _refuse(self, error: PlatformError) -> None:
        told = {"Type": "User" if error.status < 500 else "Service"}
        told["Message"] = told["message"] = str(error)
        if error.reason:
            told["Reason"] = error.reason
        headers = {"x-amzn-ErrorType": error.code}
        if error.status == 429:
            headers["Retry-After"] = "1"
        self._answer(error.status, json.dumps(told).encode(), headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: each invocation has a log of its own."""


class InvalidParameter(PlatformError):
    code = "InvalidParameterValueException"
    status = 400


def _decoded(context: str) -> dict:
    try:
        decoded = json.loads(base64.b64decode(context, validate=True))
    except (ValueError, RecursionError) as error:
        raise InvalidRequestContent(
            f"Client context must be a valid Base64-encoded JSON object: {error}"
        ) from None
    return decoded
