"""The platform: functions that one deploys, invokes and sends events to.

It checks what comes in, counts who may run at once, and gives the work to the
function's pool of sandboxes. Everything it starts ends with its `with` block; if it is
killed, the guardian ends it.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from local_cloud.functions.asynchronous import Events
from local_cloud.functions.cgroup import Parent
from local_cloud.functions.errors import (
    FunctionError,
    InvalidRequestContent,
    NotFound,
    PlatformClosed,
    RequestTooLarge,
)
from local_cloud.functions.guardian import Guardian
from local_cloud.functions.pool import FREEZE_AFTER_S, Pool, Result, Retired, Room
from local_cloud.functions.runtime_api import RuntimeApi
from local_cloud.functions.sandbox import ARN, Host, Sandbox

REPOSITORY = Path(__file__).resolve().parents[2]
# https://docs.aws.amazon.com/lambda/latest/dg/gettingstarted-limits.html; the second
# was 256 KB until October 2025.
SYNC_BYTES, ASYNC_BYTES = 6 * 2**20, 2**20
CONCURRENCY = 32  # sandboxes of a platform; an account on Lambda has 10 to 1,000
RESERVED_NAMES = re.compile(r"_HANDLER|AWS_LAMBDA_.*|AWS_(DEFAULT_)?REGION|LAMBDA_.*")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Function:
    """What one deploys.

    Attributes:
        handler: "module.function", found in `code`.
        code: the folder that is the process's working directory and import path.
        memory_mb: 128 to 10,240; the share of a CPU is memory_mb / 1769.
        timeout_s: more than 0, at most 900; fractions are ours, Lambda takes seconds.
        reserved: the most sandboxes at once, kept free for it; None: what is left.
        provisioned: sandboxes kept initialised.
        snapshot: start sandboxes as forks of one initialised process.
        ready_clones: ours, to look at clones that nobody has called: allows
            `provisioned` together with `snapshot`, which Lambda refuses.
        keep_alive_s: an idle sandbox is ended after that.
        retries, max_event_age_s, retry_delay_s, on_failure: asynchronous invocations.

    Raises:
        FunctionError: a number or a name that Lambda would not take either.
    """

    name: str
    handler: str
    code: Path = REPOSITORY
    memory_mb: int = 512
    timeout_s: float = 3.0
    environment: Mapping[str, str] = field(default_factory=dict)
    reserved: int | None = None
    provisioned: int = 0
    snapshot: bool = False
    ready_clones: bool = False
    keep_alive_s: float = 300.0
    retries: int = 2
    max_event_age_s: float = 21_600.0
    retry_delay_s: float = 60.0
    on_failure: Callable[[dict], None] | None = None

    def __post_init__(self) -> None:
        most = math.inf if self.reserved is None else self.reserved
        either = not (self.snapshot and self.provisioned) or self.ready_clones
        taken = [name for name in self.environment if RESERVED_NAMES.fullmatch(name)]
        checks = [
            (re.fullmatch(r"[\w-]{1,64}", self.name), "name", "1 to 64 of a-z 0-9 - _"),
            (re.fullmatch(r"[\w/.]+\.\w+", self.handler), "handler", "module.function"),
            (Path(self.code).is_dir(), "code", "a folder that exists"),
            (128 <= self.memory_mb <= 10_240, "memory_mb", "128 to 10240"),
            (0 < self.timeout_s <= 900, "timeout_s", "more than 0, at most 900"),
            (most >= 0, "reserved", "0 or more, or None"),
            (0 <= self.provisioned <= most, "provisioned", "0 to reserved"),
            (either, "provisioned", "0 with snapshot: one or the other"),
            (self.keep_alive_s >= 0, "keep_alive_s", "0 or more"),
            (0 <= self.retries <= 2, "retries", "0 to 2"),
            (0 < self.max_event_age_s <= 21_600, "max_event_age_s", "up to 21600"),
            (self.retry_delay_s >= 0, "retry_delay_s", "0 or more"),
            (not taken, "environment", f"other names than Lambda's own {taken}"),
        ]
        for good, name, expected in checks:
            if not good:
                raise FunctionError(
                    f"Expected {name} to be {expected}, found {getattr(self, name)!r}. "
                    f"Change {name} of function {self.name!r}."
                )


class Platform:
    """`with Platform() as cloud:` - the cloud on this machine, for the block's length.

    Args:
        root: a folder for logs and temporary files; default: one that is removed.
        concurrency: invocations at once over all functions, as of an account.
    """

    def __init__(self, root: Path | None = None, *, concurrency: int = CONCURRENCY):
        self._root, self.concurrency = root, concurrency
        self._pools: dict[str, Pool] = {}
        self._retired: list[Pool] = []
        self._shared = Room(concurrency, "ConcurrentInvocationLimitExceeded")
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._stack = ExitStack()

    def __enter__(self) -> Platform:
        if not find_spec("awslambdaric"):
            raise FunctionError(
                "Expected Lambda's runtime client, found none. "
                "Run: pip install -r requirements.txt"
            )
        with ExitStack() as stack:  # what was started ends in reverse
            own = None if self._root else Path(tempfile.mkdtemp(prefix="functions-"))
            groups = Parent(f"functions-{uuid.uuid4().hex[:12]}")
            guardian = Guardian(groups.folders, own)
            stack.callback(guardian.close)  # last: it removes the folder
            stack.callback(groups.close)
            api = RuntimeApi()
            stack.callback(api.close)
            root = Path(self._root or own or "").resolve()
            self.host = Host(api, groups, guardian, root)
            self._events = Events(self._run, self.concurrency)
            stack.callback(self._events.close)
            stack.callback(self._end_pools)
            keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
            keeper.start()
            stack.callback(keeper.join)
            stack.callback(self._closed.set)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def kind(self) -> str:
        """What enforces the limits of the sandboxes: see cgroup.py."""
        return self.host.groups.kind

    def deploy(self, function: Function) -> None:
        """Makes a function callable, in place of the one of its name.

        Takes the snapshot and starts the provisioned sandboxes before it returns.

        Raises:
            FunctionError: more is reserved than there is, or an init failed.
        """
        pool = Pool(function, self.host, self._room_for(function))
        try:
            for thread in pool.provision():
                thread.join()
        except BaseException:  # no thread to be had, or Ctrl-C
            pool.end()
            raise
        if (found := len(pool.all)) < function.provisioned:
            pool.end()
            raise FunctionError(
                f"Expected {function.provisioned} provisioned sandboxes of "
                f"{function.name!r}, found {found} that could be initialised. "
                "Deploy it without, invoke it and read Result.log: it says why."
            )
        with self._lock:
            old = self._pools.get(function.name)
            self._pools[function.name] = pool
            self._shared.limit = self._free(without="")
        if old:
            old.retire()
            self._retired.append(old)

    def function(self, name: str) -> Function:
        """The deployed function of this name; raises NotFound."""
        return self._pool(name).function

    def invoke(
        self, name: str, payload: bytes | Any, *, client_context: dict | None = None
    ) -> Result:
        """Runs a function and waits for its result.

        Args:
            payload: JSON as bytes, or what json.dumps takes; at most 6 MB.
            client_context: what the handler finds in context.client_context.

        Raises:
            NotFound, TooManyRequests, RequestTooLarge, InvalidRequestContent,
            PlatformClosed. What goes wrong in the function is in Result.error.
        """
        function = self.function(name)
        event = encode(payload, SYNC_BYTES, "RequestResponse")
        return self._run(function, event, str(uuid.uuid4()), client_context)

    def send(self, name: str, payload: bytes | Any) -> str:
        """Accepts an event of 1 MB at most for a function; gives its request id.

        Raises:
            as `invoke`, but never TooManyRequests: throttled events wait.
        """
        function = self.function(name)
        event, request_id = encode(payload, ASYNC_BYTES, "Event"), str(uuid.uuid4())
        self._events.accept(function, event, request_id)
        return request_id

    def sandboxes(self, name: str) -> list[Sandbox]:
        """The function's sandboxes: each tells pid, started, frozen, invocations."""
        return list(self._pool(name).all)

    def warm(self, name: str) -> int:
        """How many of them wait for work."""
        return len(self._pool(name).idle)

    def _run(
        self,
        function: Function,
        payload: bytes,
        request_id: str,
        client_context: dict | None = None,
    ) -> Result:
        trace = f"Root=1-{int(time.time()):08x}-{secrets.token_hex(12)};Sampled=0"
        headers = {"Lambda-Runtime-Trace-Id": trace}
        if client_context is not None:
            headers["Lambda-Runtime-Client-Context"] = json.dumps(client_context)
        while True:
            with suppress(Retired):  # deployed anew meanwhile: the new one takes it
                return self._pool(function.name).invoke(request_id, payload, headers)

    def _pool(self, name: str) -> Pool:
        if self._closed.is_set():
            raise PlatformClosed("The platform's `with` block has ended.")
        try:
            return self._pools[name]
        except KeyError:
            raise NotFound(f"Function not found: {ARN}{name}") from None

    def _room_for(self, function: Function) -> Room:
        """Where it is counted: in a room of its own if it has one reserved."""
        if function.reserved is None:
            return self._shared
        if function.reserved > (free := self._free(without=function.name)):
            raise FunctionError(
                f"Expected at most {free} reserved, found {function.reserved} for "
                f"{function.name!r}. Reserve less, or open Platform(concurrency=...)."
            )
        reason = "ReservedFunctionConcurrentInvocationLimitExceeded"
        return Room(function.reserved, reason)

    def _free(self, without: str) -> int:
        """What no function but the named one has reserved."""
        pools = [pool for name, pool in self._pools.items() if name != without]
        return self.concurrency - sum(pool.function.reserved or 0 for pool in pools)

    def _keep(self) -> None:
        """Looks after idle sandboxes and replaces lost provisioned ones."""
        while not self._closed.wait(FREEZE_AFTER_S):
            for pool in list(self._pools.values()):
                try:
                    pool.keep()
                    pool.provision()
                except Exception:  # of one function: the others need looking after
                    log.exception("%s: cannot be kept", pool.function.name)

    def _end_pools(self) -> None:
        for pool in [*self._retired, *self._pools.values()]:
            pool.end()


def encode(payload: bytes | Any, most: int, kind: str) -> bytes:
    """A payload as JSON in bytes, checked as the Invoke API checks it."""
    try:
        if isinstance(payload, bytes):
            event = payload or b"{}"
            if len(event) <= most:
                json.loads(event)
        else:
            event = json.dumps(payload).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidRequestContent(
            f"Could not parse request body into json: {error}"
        ) from None
    if len(event) > most:
        raise RequestTooLarge(
            f"{len(event)} byte payload is too large for the {kind} invocation type "
            f"(limit {most} bytes)"
        )
    return event
