"""What the routes of all resources share: keys, ids, queries, pages and updates."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from local_cloud.fireworks.wire import (
    ALREADY_EXISTS,
    INVALID_ARGUMENT,
    NOT_FOUND,
    PERMISSION_DENIED,
    UNAUTHENTICATED,
    UNIMPLEMENTED,
    Refusal,
    answer,
    names,
)

if TYPE_CHECKING:
    from local_cloud.fireworks.state import State

T = TypeVar("T")

PAGE, LONGEST_PAGE = 50, 200
NOT_EMULATED = ("filter", "orderBy", "readMask")


def guard(state: State, public: str) -> Callable[..., Awaitable[None]]:
    """A dependency: the key opens this account, or reads what a public one offers.

    Raises (the dependency):
        Refusal: no key or a wrong one (code 16), another's account (code 7).
    """

    async def check(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        own = state.account(key) if scheme.lower() == "bearer" else None
        if own is None:
            raise Refusal(
                UNAUTHENTICATED,
                "The API key you provided is invalid. This is a stand-in on loopback: "
                "it takes only fake keys that it made itself, never a real one.",
            )
        account = request.path_params.get("account", own)
        offered = tuple(
            f"/v1/accounts/{public}/{kind}" for kind in ("models", "deploymentShapes")
        )
        reads = request.method == "GET" and request.url.path.startswith(offered)
        if account != own and not reads:
            raise Refusal(
                PERMISSION_DENIED, f"This key does not open accounts/{account}."
            )

    return check


async def body(request: Request) -> dict[str, Any]:
    """The JSON object of a request, {} if it has none.

    Raises:
        Refusal: it is not one (code 3).
    """
    if not await request.body():
        return {}
    try:
        return part({"body": await request.json()}, "body")
    except ValueError as wrong:
        raise Refusal(INVALID_ARGUMENT, f"Expected JSON, found: {wrong}.") from None


def part(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside a request, {} if it is not there.

    Raises:
        Refusal: it is something else than an object (code 3).
    """
    found = fields.get(name, {})
    if not isinstance(found, dict):
        raise Refusal(
            INVALID_ARGUMENT, f"{name}: expected a JSON object, found {found!r}."
        )
    return found


def query(request: Request, *allowed: str) -> dict[str, str]:
    """The query parameters, all of them known ones.

    Raises:
        Refusal: one is unknown (code 3), or not emulated (code 12).
    """
    given = dict(request.query_params)
    for name in given:
        if name in NOT_EMULATED:
            raise Refusal(
                UNIMPLEMENTED, f"The stand-in does not emulate {name!r}: leave it out."
            )
        if name not in allowed:
            raise Refusal(
                INVALID_ARGUMENT,
                f"Expected query parameters of {sorted(allowed)}, found {name!r}.",
            )
    return given


def flag(given: Mapping[str, str], name: str) -> bool:
    """A boolean query parameter; absent is false."""
    return given.get(name, "false").lower() == "true"


def page(
    request: Request,
    kind: type[BaseModel],
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *allowed: str,
) -> JSONResponse:
    """One page of a list, and the token of the next.

    Raises:
        Refusal: the size or the token is none of ours (code 3).
    """
    given = query(request, "pageSize", "pageToken", *allowed)
    size = given.get("pageSize", "0")
    if not size.isdigit():
        raise Refusal(
            INVALID_ARGUMENT, f"pageSize: expected 0 or more, found {size!r}."
        )
    start = _offset(given.get("pageToken", ""))
    end = start + min(int(size) or PAGE, LONGEST_PAGE)
    fields: dict[str, Any] = {name: rows[start:end]}
    if end < len(rows):
        fields["nextPageToken"] = base64.urlsafe_b64encode(b"%d" % end).decode()
    return answer(kind, fields)


def _offset(token: str) -> int:
    if not token:
        return 0
    try:
        text = base64.urlsafe_b64decode(token)
    except binascii.Error:
        text = b""
    if not text.isdigit():
        raise Refusal(
            INVALID_ARGUMENT,
            f"pageToken: expected nextPageToken of the page before, found {token!r}.",
        )
    return int(text)


def one(store: Mapping[str, T], key: Any) -> T:
    """What a name stands for.

    Raises:
        Refusal: nothing (code 5).
    """
    if not isinstance(key, str) or key not in store:
        raise Refusal(
            NOT_FOUND,
            f"{key} not found. Expected the id alone, the last part of a name.",
        )
    return store[key]


def new_id(given: str | None, what: str) -> str:
    """The id of something new: the one asked for, or a random one.

    Raises:
        Refusal: it is not of the form that ids have (code 3).
    """
    if given is None:
        return secrets.token_hex(6)
    if not isinstance(given, str) or not re.fullmatch(
        r"[a-z0-9][a-z0-9-]{0,62}", given
    ):
        raise Refusal(
            INVALID_ARGUMENT,
            f"{what}: expected up to 63 of a-z, 0-9 and '-', found {given!r}.",
        )
    return given


def free(store: Mapping[str, Any], key: str) -> str:
    """The name, if nothing has it yet.

    Raises:
        Refusal: something has (code 6).
    """
    if key in store:
        raise Refusal(ALREADY_EXISTS, f"{key} already exists. Choose another id.")
    return key


def mutable(params: type) -> set[str]:
    """What an update may change, by the names of the API."""
    return set(names(params).values()) - {"account_id", "skipShapeValidation"}


def merged(
    old: Mapping[str, Any], new: Mapping[str, Any], may: set[str], mask: str
) -> dict[str, Any]:
    """The fields after an update.

    Without a mask every field that may change is replaced, so that what the update
    leaves out is lost. With one ("displayName,autoscaling_policy.scale_to_zero_window")
    only the fields it names change.

    Raises:
        Refusal: the mask names what may not change, or is not there (code 3).
    """
    if mask in ("", "*"):
        kept = {name: value for name, value in old.items() if name not in may}
        return kept | {name: new[name] for name in new if name in may}
    result = deepcopy(dict(old))
    for path in mask.split(","):
        parts = [_camel(part) for part in path.strip().split(".")]
        if parts[0] not in may:
            raise Refusal(
                INVALID_ARGUMENT,
                f"updateMask: expected fields of {sorted(may)}, found {path!r}.",
            )
        _copy(result, new, parts)
    return result


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _copy(target: dict[str, Any], source: Mapping[str, Any], path: list[str]) -> None:
    """Set, or unset, what is at this path to what it is in the source."""
    head, *rest = path
    if rest:
        target[head] = dict(target.get(head) or {})
        _copy(target[head], source.get(head) or {}, rest)
    elif head in source:
        target[head] = source[head]
    else:
        target.pop(head, None)
