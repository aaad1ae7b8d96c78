"""One contract for both back ends of jobs, SQLite and a real Redis."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from course.process import wait_until
from local_cloud.scaling.jobs import (
    MAX_BYTES,
    STATES,
    BadJob,
    JobsDown,
    JobsError,
    KeyTaken,
    LeaseLost,
    QueueFull,
)
from local_cloud.scaling.redis_jobs import RedisJobs
from local_cloud.scaling.worker import work
from tests.job_fixtures import (
    Open,
    in_background,
    jobs,
    needs_redis,
    next_job,
    open_jobs,
    redis_url,
    settled,
)

__all__ = ["jobs", "open_jobs", "redis_url"]  # fixtures


# ## One job after another


def test_a_job_is_done_and_its_result_kept(jobs: Any) -> None:
    id = jobs.submit({"text": "grüße \ud83c", "n": [1, None]})
    assert jobs.get(id).state == "waiting"
    job = jobs.lease("w", 30)
    assert (job.id, job.payload) == (id, {"text": "grüße \ud83c", "n": [1, None]})
    assert jobs.get(id).state == "leased"
    assert jobs.lease("w", 30) is None
    jobs.ack(job, {"answer": 42})
    status = jobs.get(id)
    assert (status.state, status.result, status.tries) == ("done", {"answer": 42}, 1)
    assert jobs.counts() == dict.fromkeys(STATES, 0) | {"done": 1}


def test_the_oldest_comes_first_and_a_higher_priority_before(jobs: Any) -> None:
    usual = [jobs.submit(n) for n in range(3)]
    urgent = [jobs.submit(n, priority=9) for n in range(2)]
    middle = jobs.submit(0, priority=4)
    found = [jobs.lease("w", 30).id for _ in range(6)]
    assert found == [*urgent, middle, *usual]


def test_a_job_that_comes_back_keeps_its_place(jobs: Any) -> None:
    first, second = jobs.submit(1), jobs.submit(2)
    jobs.nack(jobs.lease("w", 30))
    assert [jobs.lease("w", 30).id for _ in range(2)] == [first, second]


def test_a_key_gives_one_job(jobs: Any) -> None:
    id = jobs.submit({"n": 1}, key="k")
    assert jobs.submit({"n": 1}, key="k") == id
    with pytest.raises(KeyTaken, match="found another"):
        jobs.submit({"n": 2}, key="k")
    jobs.ack(jobs.lease("w", 30), "done")
    assert jobs.submit({"n": 1}, key="k") == id
    assert jobs.lease("w", 30) is None


def test_the_same_key_at_the_same_time_gives_one_job(open_jobs: Open) -> None:
    found: set[str] = set()
    jobs = open_jobs()
    run_together(lambda n: found.add(jobs.submit("same", key="k")), 8)
    assert len(found) == 1
    assert jobs.counts()["waiting"] == 1


def test_finished_jobs_are_forgotten_and_dead_ones_are_not(open_jobs: Open) -> None:
    jobs = open_jobs(keep_s=0.05)
    done, dead = jobs.submit(1, key="k"), jobs.submit(2, max_tries=1)
    jobs.ack(jobs.lease("w", 30))
    jobs.nack(jobs.lease("w", 30))
    wait_until(lambda: jobs.get(done) is None, 5, "it to be forgotten", every_s=0.01)
    assert jobs.submit(3, key="k") != done
    assert [status.id for status in jobs.dead()] == [dead]
    counts = jobs.counts()
    assert (counts["done"], counts["dead"], counts["waiting"]) == (0, 1, 1)


def test_a_key_outlives_the_forgotten_job_that_had_it(open_jobs: Open) -> None:
    jobs = open_jobs(keep_s=0.1)
    for n in range(11):  # more than a submit cleans up at once
        jobs.submit(n)
        jobs.ack(jobs.lease("w", 30))
    old = jobs.submit("same", key="k")
    jobs.ack(jobs.lease("w", 30))
    wait_until(lambda: jobs.get(old) is None, 30, "it to be forgotten", every_s=0.01)
    new = jobs.submit("same", key="k")
    jobs.submit("other")  # cleans up the rest, the old job with the key among it
    assert new != old
    assert jobs.submit("same", key="k") == new


def test_an_unknown_id_is_nothing(jobs: Any) -> None:
    assert jobs.get("nothing") is None
    assert jobs.cancel("nothing") is False


# ## Leases


def test_a_lease_that_ended_acknowledges_nothing(jobs: Any) -> None:
    id = jobs.submit(1)
    late = jobs.lease("late", 0.02)
    time.sleep(0.05)
    for call in (jobs.ack, jobs.nack, lambda job: jobs.extend(job, 30)):
        with pytest.raises(LeaseLost):
            call(late)  # nobody has it yet
    newer = jobs.lease("w", 30)
    assert (newer.id, newer.token) == (id, 2)
    with pytest.raises(LeaseLost, match="lease 1 of job"):
        jobs.ack(late, "late")  # somebody has it
    jobs.ack(newer, "right")
    with pytest.raises(LeaseLost):
        jobs.ack(late, "late")  # somebody had it
    assert jobs.get(id).result == "right"


def test_an_acknowledgement_may_be_sent_again(jobs: Any) -> None:
    id = jobs.submit(1)
    job = jobs.lease("w", 30)
    jobs.ack(job, "x")
    jobs.ack(job, "y")
    assert jobs.get(id).result == "x"
    assert jobs.counts()["done"] == 1


def test_a_lease_can_be_extended(jobs: Any) -> None:
    jobs.submit(1)
    job = jobs.lease("w", 1.0)
    jobs.extend(job, 30)
    time.sleep(1.05)
    assert jobs.lease("other", 30) is None
    jobs.ack(job)


def test_a_delay_is_waited_for(jobs: Any) -> None:
    first, second = jobs.submit(1), jobs.submit(2)
    jobs.nack(jobs.lease("w", 30), 0.2, "not yet")
    begun = time.monotonic()
    assert jobs.get(first).error == "not yet"
    assert jobs.lease("w", 30).id == second
    assert next_job(jobs).id == first
    assert time.monotonic() - begun >= 0.19


def test_each_job_is_leased_once(open_jobs: Open) -> None:
    jobs = open_jobs()
    ids = [jobs.submit(n) for n in range(100)]
    found: list[str] = []

    def take(n: int) -> None:
        mine = open_jobs()
        while job := mine.lease(f"w{n}", 30):
            found.append(job.id)

    run_together(take, 4)
    assert sorted(found) == sorted(ids)


@pytest.mark.parametrize("jump_s", [-86_400, 86_400])
def test_a_workers_clock_moves_nothing(
    open_jobs: Open, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    jobs, true = open_jobs(), time.time
    jobs.submit(1, deadline_s=3600)
    jobs.submit(2, deadline_s=3600)
    short, long = jobs.lease("w", 0.1), jobs.lease("w", 3600)
    monkeypatch.setattr(time, "time", lambda: true() + jump_s)
    for same in (jobs, open_jobs()):  # also who opens it after the jump
        assert same.get(long.id).state == "leased"
    assert next_job(open_jobs(), 30).id == short.id
    assert open_jobs().lease("w", 1) is None
    jobs.ack(long)


# ## Ends


def test_a_poison_job_is_dead_at_exactly_max_tries(jobs: Any) -> None:
    id, tried = jobs.submit("poison", max_tries=3), []

    def fail(payload: Any) -> None:
        tried.append(payload)
        raise ValueError(f"cannot do {payload}")

    with ExitStack() as stack:
        in_background(stack, jobs, fail, retry_s=0.01)
        status = settled(jobs, id)
        good = jobs.submit("poison", max_tries=1)  # the worker goes on
        settled(jobs, good)
    assert tried == ["poison"] * 4
    assert (status.state, status.tries) == ("dead", 3)
    assert status.error == "ValueError: cannot do poison"
    assert {letter.id for letter in jobs.dead()} == {id, good}


def test_a_deadline_expires_what_nobody_began(jobs: Any) -> None:
    late, begun = jobs.submit(1, deadline_s=0.1), jobs.submit(2, priority=1)
    never = jobs.submit(3, deadline_s=3600)
    job = jobs.lease("w", 30)
    assert job.id == begun
    time.sleep(0.15)
    assert jobs.get(late).state == "expired"  # told before any worker comes by
    assert jobs.lease("w", 30).id == never
    assert jobs.counts()["expired"] == 1
    jobs.ack(job)


def test_what_was_begun_in_time_may_be_finished_late(jobs: Any) -> None:
    id, again = jobs.submit(1, deadline_s=1.0), jobs.submit(2, deadline_s=1.0)
    job, other = jobs.lease("w", 30), jobs.lease("w", 30)
    jobs.nack(other)  # began in time, too, but its next try would not
    time.sleep(1.05)
    jobs.ack(job, "late but done")
    assert jobs.get(id).state == "done"
    assert jobs.lease("w", 30) is None
    status = jobs.get(again)
    assert (status.state, status.tries) == ("expired", 1)


def test_a_cancelled_job_is_not_done(jobs: Any) -> None:
    waiting, running = jobs.submit(1), jobs.submit(2, priority=1)
    job = jobs.lease("w", 30)
    assert jobs.cancel(waiting)
    assert jobs.cancel(running)
    assert not jobs.cancel(running)
    with pytest.raises(LeaseLost):
        jobs.ack(job)
    assert jobs.lease("w", 30) is None
    assert jobs.get(waiting).state == jobs.get(running).state == "cancelled"


@needs_redis
def test_the_lag_that_autoscalers_read_is_what_waits(redis_url: str) -> None:
    with RedisJobs(redis_url, name="lag") as jobs:
        ids = [jobs.submit(n) for n in range(5)]
        jobs.cancel(ids[2])
        lags = [5]
        for _ in range(4):
            jobs.ack(jobs.lease("w", 30))
            (group,) = jobs._redis.xinfo_groups("{lag}:priority:0")
            lags.append(group["lag"])
        assert lags == [5, 4, 3, 1, 0]
        assert jobs.lease("w", 30) is None
        assert jobs._redis.xlen("{lag}:priority:0") == 0


def test_a_dead_letter_can_be_cancelled_and_a_done_job_cannot(jobs: Any) -> None:
    dead, done = jobs.submit(1, max_tries=1), jobs.submit(2)
    jobs.nack(jobs.lease("w", 30))
    jobs.ack(jobs.lease("w", 30), 2)
    assert jobs.cancel(dead)
    assert not jobs.cancel(done)
    assert jobs.dead() == []
    assert jobs.get(done).result == 2


def test_a_full_queue_refuses_and_takes_exactly_its_bound(open_jobs: Open) -> None:
    refused: list[JobsError] = []
    jobs = open_jobs(bound=10)

    def submit(n: int) -> None:
        for _ in range(5):
            try:
                jobs.submit(n)
            except QueueFull as error:
                refused.append(error)

    run_together(submit, 4)
    assert (jobs.counts()["waiting"], len(refused)) == (10, 10)
    assert "fewer than 10 unfinished jobs" in str(refused[0])
    jobs.ack(jobs.lease("w", 30))
    jobs.submit("there is room again")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda jobs: jobs.submit({1, 2}), "JSON can say"),
        (lambda jobs: jobs.submit(float("nan")), "JSON can say"),
        (lambda jobs: jobs.submit("x" * MAX_BYTES), "up to 1,048,576 bytes"),
        (lambda jobs: jobs.submit(1, priority=10), "priority from 0 to 9"),
        (lambda jobs: jobs.submit(1, priority=0.5), "priority to be an int"),
        (lambda jobs: jobs.submit(1, deadline_s=float("nan")), "deadline_s from 0"),
        (lambda jobs: jobs.submit(1, deadline_s=-1), "deadline_s from 0"),
        (lambda jobs: jobs.submit(1, max_tries=0), "max_tries from 1"),
        (lambda jobs: jobs.submit(1, key=""), "a key's characters from 1"),
        (lambda jobs: jobs.lease("w", 1e9), "lease_s from 0 to 43,200"),
    ],
)
def test_bad_input_is_refused(jobs: Any, call: Any, says: str) -> None:
    with pytest.raises(BadJob, match=says):
        call(jobs)
    assert sum(jobs.counts().values()) == 0


# ## Workers


def test_the_lease_of_a_long_job_is_extended(
    jobs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    beats, extend = threading.Semaphore(0), jobs.extend
    id = jobs.submit("long")

    def counted(job: Any, lease_s: float) -> None:
        extend(job, lease_s)
        beats.release()

    monkeypatch.setattr(jobs, "extend", counted)

    def slow(payload: Any) -> str:
        done.append(payload)
        for _ in range(4):  # three times a lease: longer than one
            assert beats.acquire(timeout=30)
        return "at last"

    with ExitStack() as stack:
        for name in ("one", "two"):
            in_background(stack, jobs, slow, worker=name, lease_s=1.0)
        status = settled(jobs, id, 60)
    assert (status.result, status.tries, done) == ("at last", 1, ["long"])


def test_a_job_that_hangs_goes_to_the_next_worker(jobs: Any) -> None:
    free, begun = threading.Event(), threading.Event()

    def do(payload: Any) -> str:
        if begun.is_set():
            return "second"
        begun.set()
        free.wait(30)
        return "first"

    id = jobs.submit(1)
    with ExitStack() as stack:
        for name in ("one", "two"):
            options = {"worker": name, "lease_s": 0.2, "limit_s": 0.1}
            in_background(stack, jobs, do, **options)
        assert settled(jobs, id).result == "second"
        free.set()
    assert jobs.get(id).result == "second"


def test_a_worker_says_once_that_the_queue_is_gone(
    jobs: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop, asked = threading.Event(), iter(range(10))

    def gone(worker: str, lease_s: float) -> None:
        if next(asked) == 2:
            stop.set()
        raise JobsDown("no queue here")

    monkeypatch.setattr(jobs, "lease", gone)
    assert work(jobs, print, stop, worker="w") == 0
    assert [record.getMessage() for record in caplog.records] == [
        "w waits. no queue here"
    ]


def test_a_result_that_cannot_be_stored_is_a_failure(jobs: Any) -> None:
    id = jobs.submit(1, max_tries=1)
    with ExitStack() as stack:
        in_background(stack, jobs, lambda payload: object())
        status = settled(jobs, id)
    assert status.state == "dead"
    assert "Expected a result that JSON can say" in status.error


def test_a_worker_told_to_stop_finishes_its_job(jobs: Any) -> None:
    stop, ids = threading.Event(), [jobs.submit(n) for n in range(2)]

    def do(payload: Any) -> Any:
        stop.set()
        return payload

    assert work(jobs, do, stop) == 1
    assert [jobs.get(id).state for id in ids] == ["done", "waiting"]


def run_together(call: Callable[[int], object], count: int) -> None:
    """Calls it in so many threads at once; what one raises, this raises."""
    gate = threading.Barrier(count)

    def one(n: int) -> None:
        gate.wait(10)
        call(n)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(count)))
