"""Both back ends of jobs for tests: opened, worked on, killed and started again."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from course.process import free_port, wait_until
from local_cloud.scaling.jobs import SQLiteJobs
from local_cloud.scaling.redis_jobs import INSTALL, RedisJobs, redis_server
from local_cloud.scaling.worker import work

NUMBERS = itertools.count()

MARKS = [
    pytest.mark.redis,
    pytest.mark.skipif(
        not shutil.which("redis-server"), reason=f"no redis-server: {INSTALL}"
    ),
]


def needs_redis(test: Any) -> Any:
    """Marks a test that has no other back end."""
    return MARKS[0](MARKS[1](test))


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@dataclass(frozen=True)
class Open:
    """Opens the same queue as often as it is called."""

    kind: Callable[..., Any]
    place: str  # a path, or the URL of a Redis
    options: dict[str, Any]
    opened: ExitStack

    def __call__(self, **more: Any) -> Any:
        jobs = self.kind(self.place, **self.options, **more)
        return self.opened.enter_context(jobs)


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=MARKS)])
def open_jobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """A new queue."""
    with ExitStack() as opened:
        if request.param == "sqlite":
            place, options = str(tmp_path / "jobs"), {}
            kind: Any = SQLiteJobs
        else:
            place = request.getfixturevalue("redis_url")
            kind, options = RedisJobs, {"name": f"test-{next(NUMBERS)}"}

        yield Open(kind, place, options, opened)


@pytest.fixture
def jobs(open_jobs: Open) -> Any:
    return open_jobs()


def next_job(jobs: Any, lease_s: float = 30.0) -> Any:
    """The next job, when there is one."""
    return wait_until(lambda: jobs.lease("w", lease_s), 5, "a job", every_s=0.01)


def in_background(stack: ExitStack, *values: Any, **options: Any) -> None:
    """A worker's loop in a thread, stopped at the end of the stack."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(*values, stop), kwargs=options)
    thread.start()
    stack.callback(thread.join)
    stack.callback(stop.set)


def settled(jobs: Any, id: str, deadline_s: float = 10) -> Any:
    """The status of a job that nobody will work on any more."""
    ends = ("done", "dead", "expired", "cancelled")
    wait_until(lambda: jobs.get(id).state in ends, deadline_s, f"{id} to end")
    return jobs.get(id)


class OwnRedis:
    """A Redis that a test kills and starts again, on one port and one folder."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.port, self.folder, self.stack = free_port(), folder, stack
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        server = redis_server(self.folder, port=self.port)
        assert self.stack.enter_context(server) == self.url

    def kill(self, password: str | None = None) -> None:
        """kill -9."""
        with redis.Redis.from_url(self.url, password=password) as client:
            pid = client.info("server")["process_id"]
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    with ExitStack() as stack:
        server = OwnRedis(tmp_path, stack)
        server.start()
        yield server
