"""The routes of an account: all of them, and here who you are, users and keys.

Paths, names and defaults are those of the SDK. A verb such as `:scale` is a route of
its own, declared before `/{id}`, which would take it for part of an id.
"""

from __future__ import annotations

import secrets

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from fireworks import pagination, types

from local_cloud.fireworks import (
    batch,
    datasets,
    deployment_routes,
    listing,
    metrics,
    model_routes,
)
from local_cloud.fireworks.catalogue import PUBLIC
from local_cloud.fireworks.clock import moment
from local_cloud.fireworks.listing import body, one, page, query
from local_cloud.fireworks.state import ACCOUNT, FAKE_PREFIX, State
from local_cloud.fireworks.wire import answer, read

USER_FIELDS = listing.mutable(types.user_update_params.UserUpdateParams) - {"user_id"}


def router(state: State) -> APIRouter:
    """All routes below /v1/accounts."""
    routes = APIRouter(
        prefix="/v1/accounts", dependencies=[Depends(listing.guard(state, PUBLIC))]
    )
    add_account(routes, state)
    add_users(routes, state)
    model_routes.add_models(routes, state)
    deployment_routes.add_shapes(routes, state)
    deployment_routes.add_deployments(routes, state)
    datasets.add_datasets(routes, state)
    batch.add_jobs(routes, state)
    metrics.add_metrics(routes, state)
    return routes


# Account, users, keys.


def add_account(routes: APIRouter, state: State) -> None:
    """Who you are."""

    @routes.get("")
    async def accounts(request: Request) -> JSONResponse:
        kind = pagination.SyncCursorAccounts[types.Account]
        return page(request, kind, "accounts", [state.account_fields])

    @routes.get("/{account}")
    async def account(account: str, request: Request) -> JSONResponse:
        query(request)
        own = {f"accounts/{ACCOUNT}": state.account_fields}
        return answer(types.Account, one(own, f"accounts/{account}"))


def add_users(routes: APIRouter, state: State) -> None:
    """Users, and the API keys of each."""

    @routes.get("/{account}/users")
    async def users(account: str, request: Request) -> JSONResponse:
        kind = pagination.SyncCursorUsers[types.User]
        return page(request, kind, "users", list(state.users.values()))

    @routes.post("/{account}/users")
    async def create(account: str, request: Request) -> JSONResponse:
        fields = read(types.User, await body(request), "user")
        user = listing.new_id(query(request, "userId").get("userId"), "userId")
        listing.free(state.users, user)
        now = moment(state.clock.now())
        state.users[user] = {
            **fields,
            "name": f"accounts/{ACCOUNT}/users/{user}",
            "state": "READY",
            "createTime": now,
            "updateTime": now,
        }
        return answer(types.User, state.users[user])

    @routes.post("/{account}/users/{user}/apiKeys:delete")
    async def delete_key(account: str, user: str, request: Request) -> JSONResponse:
        wanted = (await body(request)).get("keyId")
        ids = {k["fields"]["keyId"]: digest for digest, k in state.keys.items()}
        digest = one(ids, wanted)
        del state.keys[digest]
        return JSONResponse({})

    @routes.get("/{account}/users/{user}/apiKeys")
    async def keys(account: str, user: str, request: Request) -> JSONResponse:
        one(state.users, user)
        rows = [k["fields"] for k in state.keys.values() if k["user"] == user]
        return page(
            request, pagination.SyncCursorAPIKeys[types.APIKey], "apiKeys", rows
        )

    @routes.post("/{account}/users/{user}/apiKeys")
    async def create_key(account: str, user: str, request: Request) -> JSONResponse:
        one(state.users, user)
        asked = read(types.APIKey, (await body(request)).get("apiKey"), "apiKey")
        key = FAKE_PREFIX + secrets.token_urlsafe(24)
        fields = state.add_key(
            key, user, asked.get("displayName", "default"), asked.get("expireTime")
        )
        # The only time that anyone sees it.
        return answer(types.APIKey, {**fields, "key": key})

    @routes.get("/{account}/users/{user}")
    async def get(account: str, user: str, request: Request) -> JSONResponse:
        query(request)
        return answer(types.User, one(state.users, user))

    @routes.patch("/{account}/users/{user}")
    async def update(account: str, user: str, request: Request) -> JSONResponse:
        new = read(types.User, await body(request), "user")
        mask = query(request, "updateMask").get("updateMask", "")
        state.users[user] = listing.merged(
            one(state.users, user), new, USER_FIELDS, mask
        ) | {"updateTime": moment(state.clock.now())}
        return answer(types.User, state.users[user])
