"""Files on their way in and out: signed URLs, each for one file and one hour.

Whoever has the URL may use it, so no API key travels with the file.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response

from local_cloud.fireworks.wire import INVALID_ARGUMENT, NOT_FOUND, Refusal

if TYPE_CHECKING:
    from local_cloud.fireworks.clock import Clock

VALID_S = 3600.0
LIMIT_BYTES = 1 << 30  # what one file may hold here


@dataclass(frozen=True)
class Ticket:
    """What a signed URL allows: to write, or else read, one file of a resource."""

    owner: str
    filename: str
    size: int  # bytes
    write: bool
    ends_s: float


class Uploads:
    """The files of models and datasets, in a folder each."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder, self._clock = folder, clock
        self._tickets: dict[str, Ticket] = {}
        self.expected: dict[str, dict[str, int]] = {}  # files of a resource, with sizes

    def path(self, owner: str, filename: str) -> Path:
        """Where a file of a resource lies, whether or not it is there yet."""
        folder = self._folder / owner.replace("/", "_")
        folder.mkdir(exist_ok=True)
        return folder / filename

    def expect(self, owner: str, sizes: dict[str, str]) -> dict[str, str]:
        """Register the files of a resource (all of them, anew); a token for each.

        Raises:
            Refusal: a name is not a plain file name, or a size not a number of bytes.
        """
        if not sizes:
            raise Refusal(INVALID_ARGUMENT, "Expected filenameToSize, found no file.")
        for name, size in sizes.items():
            plain(name)
            if not str(size).isdigit() or not 0 < int(size) <= LIMIT_BYTES:
                raise Refusal(
                    INVALID_ARGUMENT,
                    f"Size of {name!r}: expected bytes from 1 to {LIMIT_BYTES}, as a "
                    f"string, found {size!r}.",
                )
        self.expected[owner] = {name: int(size) for name, size in sizes.items()}
        return {
            name: self._issue(owner, name, size, write=True)
            for name, size in self.expected[owner].items()
        }

    def offer(self, owner: str) -> dict[str, str]:
        """A token to read each file of a resource."""
        return {
            name: self._issue(owner, name, size, write=False)
            for name, size in self.expected.get(owner, {}).items()
        }

    def put(self, owner: str, filename: str, content: bytes) -> None:
        """Add a file that needs no way in.

        Raises:
            Refusal: its name is not a plain file name.
        """
        self.expected.setdefault(owner, {})[plain(filename)] = len(content)
        self.path(owner, filename).write_bytes(content)

    def missing(self, owner: str) -> list[str]:
        """Files that were registered and have not arrived whole."""
        return [
            name
            for name, size in self.expected.get(owner, {}).items()
            if not (path := self.path(owner, name)).is_file()
            or path.stat().st_size != size
        ]

    def drop(self, owner: str) -> None:
        """Throw away the files of a resource."""
        for name in self.expected.pop(owner, {}):
            self.path(owner, name).unlink(missing_ok=True)

    def _issue(self, owner: str, name: str, size: int, *, write: bool) -> str:
        token = secrets.token_urlsafe(24)
        ends = self._clock.now() + VALID_S
        self._tickets[token] = Ticket(owner, name, size, write, ends)
        return token

    def ticket(self, token: str, *, write: bool) -> Ticket:
        """What this token allows.

        Raises:
            Refusal: it allows nothing, or not this, or no longer (code 5).
        """
        found = self._tickets.get(token)
        if found is None or found.write != write or found.ends_s < self._clock.now():
            raise Refusal(
                NOT_FOUND,
                "Expected a signed URL of the last hour, found one that is unknown, "
                "used up or too old. Ask for an endpoint again.",
            )
        return found


def plain(name: str) -> str:
    """The name, if it is one of a file and leads nowhere else.

    Raises:
        Refusal: it is not (code 3).
    """
    if not name.strip(".") or any(c in name for c in "/\\\0") or len(name) > 200:
        raise Refusal(INVALID_ARGUMENT, f"Expected a plain file name, found {name!r}.")
    return name


def router(uploads: Uploads) -> APIRouter:
    """The two routes that signed URLs lead to."""
    routes = APIRouter(prefix="/signed", include_in_schema=False)

    @routes.put("/{token}/{filename}")
    async def write(token: str, filename: str, request: Request) -> Response:
        ticket = uploads.ticket(token, write=True)
        target = uploads.path(ticket.owner, ticket.filename)
        size = 0
        # Straight to disk: models are larger than a server wants to hold.
        with target.open("wb") as file:
            async for piece in request.stream():
                size += len(piece)
                if size > ticket.size:
                    break
                file.write(piece)
        if size != ticket.size:
            target.unlink()
            raise Refusal(
                INVALID_ARGUMENT,
                f"Expected {ticket.size} bytes of {ticket.filename!r} as registered, "
                f"found {'more' if size > ticket.size else size}. Upload it again.",
            )
        return Response(status_code=200)

    @routes.get("/{token}/{filename}")
    async def read(token: str, filename: str) -> FileResponse:
        ticket = uploads.ticket(token, write=False)
        return FileResponse(uploads.path(ticket.owner, ticket.filename))

    return routes
