"""Jobs when processes die by SIGKILL: workers, and the Redis they are in."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from course.process import wait_until
from local_cloud.scaling.jobs import JobsDown, JobsError, LeaseLost, SQLiteJobs
from local_cloud.scaling.redis_jobs import RedisJobs
from local_cloud.scaling.worker import work
from tests import job_storm
from tests.job_fixtures import (
    NUMBERS,
    Open,
    OwnRedis,
    in_background,
    needs_redis,
    next_job,
    open_jobs,
    own_redis,
    redis_url,
)

__all__ = ["open_jobs", "own_redis", "redis_url"]  # fixtures
ROOT = Path(__file__).parent.parent
LEASE_S = 0.3
SLACK_S = 5.0  # a lease that ended is noticed within; a busy machine stands still

WORKER = """
import sys, threading, time
sys.path.insert(0, {root!r})
from local_cloud.scaling.worker import work
from local_cloud.scaling.{module} import {kind}
def do(payload):
    print(time.monotonic(), flush=True)
    time.sleep(60)
work({kind}({place!r}, **{options!r}), do, threading.Event(), lease_s={lease_s})
"""


def killed_while_working(open_jobs: Any) -> Any:
    """A real worker that got a job; killed at the beginning of the block."""
    redis = open_jobs.place.startswith("redis")
    module, kind = ("redis_jobs", "RedisJobs") if redis else ("jobs", "SQLiteJobs")
    source = WORKER.format(
        root=str(ROOT),
        module=module,
        kind=kind,
        place=open_jobs.place,
        options=open_jobs.options,
        lease_s=LEASE_S,
    )
    stack = ExitStack()
    argv = [sys.executable, "-c", source]
    worker = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE))
    stack.callback(worker.kill)
    assert worker.stdout
    assert worker.stdout.readline(), "it got a job"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    return stack


def test_a_job_that_kills_its_workers_is_dead_at_exactly_max_tries(
    open_jobs: Open, tmp_path: Path
) -> None:
    jobs = open_jobs()
    id = jobs.submit("killer", max_tries=3)
    for tries in range(1, 4):
        with killed_while_working(open_jobs):
            assert jobs.get(id).tries == tries
        wait_until(lambda: over(jobs, id), 5, "the lease to end", every_s=0.01)
    assert jobs.lease("w", 30) is None
    status = jobs.get(id)
    assert (status.state, status.tries) == ("dead", 3)
    assert status.error == "The lease ran out on the last try."


def over(jobs: Any, id: str) -> bool:
    """Whether the lease of the one job has ended, seen without taking it."""
    if isinstance(jobs, SQLiteJobs):
        row = jobs._file.look("SELECT due FROM jobs WHERE id = ?", (id,))[0]
        return row["due"] <= jobs._now()
    due = jobs._redis.hget(f"{{{jobs.name}}}:job:{id}", "due")
    seconds, micros = jobs._redis.time()
    return float(due) <= 1000 * seconds + micros // 1000


def test_a_killed_workers_job_is_redelivered_within_its_lease(open_jobs: Open) -> None:
    jobs = open_jobs()
    id = jobs.submit(1)
    with killed_while_working(open_jobs):
        killed = time.monotonic()
        job = next_job(jobs)
        waited_s = time.monotonic() - killed
    assert (job.id, job.token) == (id, 2)
    assert waited_s <= LEASE_S + SLACK_S
    jobs.ack(job)


def test_200_kills_lose_nothing_and_do_nothing_twice(
    open_jobs: Any, tmp_path: Path
) -> None:
    outcome = job_storm.run(tmp_path, open_jobs.place, 200, 200, LEASE_S)
    assert outcome.kills == 200
    assert outcome.deliveries > outcome.jobs, "some kill hit a worker at work"
    assert (outcome.lost, outcome.twice) == (0, 0)
    assert outcome.latest_s <= SLACK_S


@needs_redis
def test_redis_killed_under_load_loses_nothing_it_acknowledged(
    own_redis: OwnRedis,
) -> None:
    accepted: list[str] = []
    acknowledged: list[tuple[str, int]] = []
    down, over = threading.Event(), threading.Event()

    class Noting(RedisJobs):
        def ack(self, job: Any, result: Any = None) -> None:
            super().ack(job, result)
            acknowledged.append((job.id, job.token))

    def produce(n: int) -> None:
        with RedisJobs(own_redis.url) as mine:
            for number in itertools.count():
                if over.is_set():
                    return
                try:
                    # The key makes a repeated submit safe after a lost answer.
                    accepted.append(mine.submit(number, key=f"{n}/{number}"))
                except JobsDown:
                    down.set()
                    over.wait(0.05)
                over.wait(0.002)

    with ExitStack() as stack, RedisJobs(own_redis.url) as jobs:
        workers = [stack.enter_context(Noting(own_redis.url)) for _ in range(2)]
        for worker in workers:
            options = {"worker": f"w{id(worker)}", "lease_s": 1.0}
            in_background(stack, worker, lambda payload: payload, **options)
        threads = [threading.Thread(target=produce, args=(n,)) for n in range(2)]
        stack.callback(lambda: [thread.join() for thread in threads])
        stack.callback(over.set)
        for thread in threads:
            thread.start()
        for _ in range(3):
            before = len(accepted)
            wait_until(lambda b=before: len(accepted) > b + 100, 10, "some jobs")
            own_redis.kill()
            assert down.wait(10), "producers saw it gone"
            own_redis.start()
            down.clear()
        wait_until(lambda: len(accepted) > before + 150, 10, "jobs after the restart")
        over.set()
        for thread in threads:
            thread.join()

        def unfinished() -> list[str]:
            # Not by counting: jobs whose "accepted" was lost on the way are done too.
            found = {id: jobs.get(id) for id in accepted}
            return [
                id
                for id, status in found.items()
                if not status or status.state != "done"
            ]

        wait_until(lambda: not unfinished(), 20, "all that was accepted to be done")
    assert len({id for id, _ in acknowledged}) == len(acknowledged)
    assert {id for id, _ in acknowledged} >= set(accepted)


@needs_redis
def test_redis_gone_is_told_and_back_is_back(own_redis: OwnRedis) -> None:
    with RedisJobs(own_redis.url) as jobs:
        id = jobs.submit(1)
        job = jobs.lease("w", 30)
        own_redis.kill()
        wait_until(lambda: not alive(jobs), 5, "it to be gone")
        for call in (lambda: jobs.submit(2), jobs.counts, jobs.dead):
            with pytest.raises(JobsDown, match="Expected Redis to answer at redis://"):
                call()
        own_redis.start()
        jobs.ack(job, "the lease outlived the server")
        assert jobs.get(id).state == "done"


@needs_redis
def test_what_waiting_does_not_mend_is_told_as_such(own_redis: OwnRedis) -> None:
    """A password that is missing or wrong, and memory that is full; none is shown."""
    with RedisJobs(own_redis.url) as jobs:
        jobs._redis.config_set("maxmemory", 1)
        with pytest.raises(JobsError, match="have memory left") as full:
            jobs.submit(1)
        jobs._redis.config_set("maxmemory", 0)
        jobs._redis.config_set("requirepass", "secret")
    wrong = own_redis.url.replace("://", "://:wrong-one@")
    right = own_redis.url.replace("://", "://:secret@")
    for url in (own_redis.url, wrong):
        with RedisJobs(url) as jobs:
            with pytest.raises(JobsError, match="Put the user and password") as told:
                jobs.submit(1)
            assert "wrong-one" not in str(told.value)
            assert not isinstance(told.value, JobsDown)
            with pytest.raises(JobsError, match="Put the user and password"):
                work(jobs, print, threading.Event())
    assert not isinstance(full.value, JobsDown)
    with RedisJobs(right) as jobs:
        assert jobs.counts()["waiting"] == 0
        own_redis.kill(password="secret")
        wait_until(lambda: not alive(jobs), 30, "it to be gone")
        with pytest.raises(JobsDown, match="Start it") as down:
            jobs.counts()
        assert "secret" not in str(down.value)


def alive(jobs: Any) -> bool:
    try:
        jobs.counts()
    except JobsDown:
        return False
    return True


@needs_redis
def test_a_jump_of_rediss_clock_acknowledges_nothing_twice(redis_url: str) -> None:
    with RedisJobs(redis_url, name=f"test-{next(NUMBERS)}") as jobs:
        id = jobs.submit(1)
        first = jobs.lease("w", 1800)
        an_hour_later(jobs, id)
        with pytest.raises(LeaseLost):
            jobs.ack(first, "first")
        second = jobs.lease("w", 1800)
        jobs.ack(second, "second")
        with pytest.raises(LeaseLost):
            jobs.ack(first, "first")
        assert jobs.get(id).result == "second"


def an_hour_later(jobs: RedisJobs, id: str) -> None:
    """To Redis, as if its clock had jumped ahead by an hour.

    Emulated: all that is stored of this job's time is put back by an hour, which is
    the same to whoever compares it with the clock.
    """
    name, client = f"{{{jobs.name}}}", jobs._redis
    hour_ms, stream = 3_600_000, f"{name}:priority:0"
    client.hincrby(f"{name}:job:{id}", "due", -hour_ms)
    (entry,) = client.xpending_range(stream, "workers", "-", "+", 1)
    idle = entry["time_since_delivered"] + hour_ms
    who, which = entry["consumer"], [entry["message_id"]]
    client.xclaim(stream, "workers", who, 0, which, idle=idle, justid=True)
