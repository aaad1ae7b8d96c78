"""The Lambda Runtime API: how a function's process asks for work and hands it back.

The process is the client. It asks for `invocation/next`, and the answer is the event;
it posts the result to `invocation/<id>/response` or `/error`, and asks again. While it
waits for that answer nothing in it runs, which is the moment to freeze it.

One thread reads everything (HTTP/1.1 over kept connections; no library is as quick as
the forty lines a known client needs). A sandbox's calls go into its `Mailbox`, where
whoever invokes it waits, and `next` is answered from there: a warm invocation costs two
messages on a socket and one change of threads.

A process is told one address and known by it. Clones of a snapshot cannot be: the
client fixes the address when it is loaded, before the fork. They share the address of
their template and say in the User-Agent who they are: `sandbox/<id>`.
"""

from __future__ import annotations

import os
import queue
import re
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

PREFIX = "/2018-06-01/runtime/"
MOST_BYTES = 6 * 2**20 + 100  # of a result; Lambda's own odd limit, 6,291,556
ACCEPTED = b'{"status":"OK"}'
REASONS = {200: "OK", 202: "Accepted", 400: "Bad Request", 404: "Not Found"}
REASONS[413] = "Payload Too Large"
CLONE = re.compile(r"sandbox/(\S+)")


class Mailbox:
    """What the runtime of one sandbox has said and nobody has heard yet."""

    def __init__(self):
        self.calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self.request_id: str | None = None  # of the invocation it works on


@dataclass(frozen=True)
class Call:
    """One call of a runtime: `kind` is "next", "response", "error", "init/error",
    "restore/error", "too large", or "exit" where the process has ended."""

    kind: str
    body: bytes = b""
    error_type: str | None = None
    connection: Connection | None = None
    at: float = field(default_factory=time.perf_counter)


class Connection:
    """One kept connection of a runtime."""

    def __init__(self, sock: socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(10.0)  # of a runtime that does not read; reads never wait
        self.sock = sock
        self.buffer = bytearray()

    def answer(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        """Sends a whole answer. Raises OSError if nobody takes it."""
        head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n"
        for name, value in (headers or {}).items():
            head += f"{name}: {value}\r\n"
        self.sock.sendall(head.encode("latin-1") + b"\r\n" + body)

    def requests(self):
        """Takes the complete requests out of the buffer: (path, headers, body)."""
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
            pairs = (line.partition(":") for line in lines)
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            length = int(headers.get("content-length", 0))
            if length > MOST_BYTES:
                yield first.split()[1], headers, None
                return
            if len(self.buffer) < end + 4 + length:
                return
            body = bytes(self.buffer[end + 4 : end + 4 + length])
            del self.buffer[: end + 4 + length]
            yield first.split()[1], headers, body


class Endpoint:
    """One address of the API, for one process and the clones it may have."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = "{}:{}".format(*self.listener.getsockname())
        self.mailbox = Mailbox()
        self.clones: dict[str, Mailbox] = {}

    def mailbox_of(self, user_agent: str) -> Mailbox | None:
        named = CLONE.search(user_agent)
        return self.clones.get(named[1]) if named else self.mailbox


class RuntimeApi:
    """The server: one thread for all sandboxes of a platform."""

    def __init__(self):
        self._selector = selectors.DefaultSelector()
        self._bell, self._ring = os.pipe()
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        self._thread = threading.Thread(
            target=self._serve, name="runtime-api", daemon=True
        )
        self._thread.start()

    def open(self) -> Endpoint:
        """A new address."""
        endpoint = Endpoint()
        self._on_read(endpoint.listener, partial(self._accept, endpoint))
        return endpoint

    def shut(self, endpoint: Endpoint) -> None:
        """Ends an address; connections end with the processes that made them."""
        with suppress(KeyError, ValueError):
            self._selector.unregister(endpoint.listener)
        endpoint.listener.close()

    def watch(self, pid: int, mailbox: Mailbox) -> None:
        """Puts "exit" into the mailbox when the process has ended (Linux only)."""
        if hasattr(os, "pidfd_open"):
            handle = os.pidfd_open(pid)
            self._on_read(handle, partial(self._exited, handle, mailbox))

    def close(self) -> None:
        os.write(self._ring, b".")
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            close = getattr(key.fileobj, "close", partial(os.close, key.fd))
            close()
        self._selector.close()
        os.close(self._ring)

    def _on_read(self, what: socket.socket | int, act: Callable[[], None]) -> None:
        self._selector.register(what, selectors.EVENT_READ, act)

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                with suppress(OSError):  # closed meanwhile by its owner
                    key.data()

    def _accept(self, endpoint: Endpoint) -> None:
        connection = Connection(endpoint.listener.accept()[0])
        self._on_read(connection.sock, partial(self._read, endpoint, connection))

    def _exited(self, handle: int, mailbox: Mailbox) -> None:
        self._selector.unregister(handle)
        os.close(handle)
        mailbox.calls.put(Call("exit"))

    def _read(self, endpoint: Endpoint, connection: Connection) -> None:
        try:
            piece = connection.sock.recv(1 << 18)
            connection.buffer += piece
            for path, headers, body in connection.requests():
                mailbox = endpoint.mailbox_of(headers.get("user-agent", ""))
                hear(connection, mailbox, path, headers, body)
                if body is None:
                    piece = b""  # what is too large is not read to its end
        except (OSError, ValueError, IndexError):  # reset, or not HTTP
            piece = b""
        if not piece:
            self._selector.unregister(connection.sock)
            connection.sock.close()


def hear(
    connection: Connection,
    mailbox: Mailbox | None,
    path: str,
    headers: Mapping[str, str],
    body: bytes | None,
) -> None:
    """Answers one call of a runtime, or leaves that to the mailbox's reader."""
    what = path.removeprefix(PREFIX)
    request_id, _, verb = what.removeprefix("invocation/").partition("/")
    if what == "restore/next":  # whoever was not forked here is restored already
        connection.answer(200)
    elif mailbox is None or path == what:
        connection.answer(404)
    elif what == "invocation/next":
        mailbox.calls.put(Call("next", connection=connection))
    elif what in ("init/error", "restore/error"):
        _take(connection, mailbox, what, headers, body)
    elif verb not in ("response", "error"):
        connection.answer(404)
    elif request_id != mailbox.request_id:
        told = b'{"errorMessage":"Invalid request ID","errorType":"InvalidRequestID"}'
        connection.answer(400, told)
    else:
        mailbox.request_id = None  # one result an invocation
        _take(connection, mailbox, verb, headers, body)


def _take(
    connection: Connection,
    mailbox: Mailbox,
    kind: str,
    headers: Mapping[str, str],
    body: bytes | None,
) -> None:
    """Accepts what a runtime posts; first the runtime, which then asks for more."""
    if body is None:
        told = b'{"errorMessage":"Exceeded maximum allowed payload size","errorType":'
        connection.answer(413, told + b'"RequestEntityTooLarge"}')
        mailbox.calls.put(Call("too large", headers["content-length"].encode()))
        return
    call = Call(kind, body, headers.get("lambda-runtime-function-error-type"))
    with suppress(OSError):  # it may have died since; what it said stands
        connection.answer(202, ACCEPTED)
    mailbox.calls.put(call)
