"""`/v1/jobs` over real back ends, once with the real model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

import models
from course.process import free_port, wait_until
from local_cloud.scaling.jobs import Jobs, SQLiteJobs
from local_cloud.scaling.jobs_api import create_app
from local_cloud.scaling.redis_jobs import RedisJobs
from local_cloud.scaling.worker import work
from tests.job_fixtures import OwnRedis, in_background, needs_redis, own_redis

__all__ = ["own_redis"]  # a fixture


@contextmanager
def served(jobs: Jobs) -> Iterator[httpx.Client]:
    """A client of a real server in front of these jobs."""
    port = free_port()
    config = uvicorn.Config(create_app(jobs), port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, 10, "the server to start", every_s=0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[SQLiteJobs]:
    with SQLiteJobs(tmp_path / "jobs", bound=3) as jobs:
        yield jobs


@pytest.fixture
def client(jobs: SQLiteJobs) -> Iterator[httpx.Client]:
    with served(jobs) as client:
        yield client


def submit(client: httpx.Client, payload: Any, key: str = "", **rest: Any) -> Any:
    headers = {"Idempotency-Key": key} if key else {}
    body = json.dumps({"payload": payload, **rest})  # in ASCII, lone surrogates too
    headers["content-type"] = "application/json"
    return client.post("/v1/jobs", content=body, headers=headers)


def finished(client: httpx.Client, location: str) -> dict[str, Any]:
    """What a job became, asked for as a client would."""

    def ended() -> dict[str, Any] | None:
        answer = client.get(location)
        assert answer.status_code == 200, answer.text
        return None if "retry-after" in answer.headers else answer.json()

    return wait_until(ended, 30, "an end") or {}


def envelope(answer: httpx.Response, status: int, code: str | None) -> str:
    """The message, when the error has the one shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["code"] == code
    return error["message"]


def test_a_job_is_accepted_done_and_told(client: httpx.Client, jobs: Any) -> None:
    answer = submit(client, {"n": 20})
    assert answer.status_code == 202
    assert answer.json()["status"] == "accepted"
    location = answer.headers["location"]
    assert location == f"/v1/jobs/{answer.json()['id']}"
    waiting = client.get(location)
    assert (waiting.json()["status"], waiting.headers["retry-after"]) == ("queued", "1")
    with ExitStack() as stack:
        in_background(stack, jobs, lambda payload: payload["n"] + 1)
        told = finished(client, location)
    assert (told["status"], told["result"], told["tries"]) == ("done", 21, 1)


def test_any_json_comes_back_as_it_was(client: httpx.Client, jobs: Any) -> None:
    payload = {"lone": "\ud800", "deep": [[[{}]]], "n": 1.5, "none": None}
    location = submit(client, payload).headers["location"]
    with ExitStack() as stack:
        in_background(stack, jobs, lambda given: given)
        assert finished(client, location)["result"] == payload


def test_the_real_model_works_a_job_off(jobs: Any, model: models.Model) -> None:
    def do(payload: dict[str, Any]) -> dict[str, Any]:
        sampling = models.Sampling(max_tokens=payload["max_tokens"], temperature=0)
        return {"text": model.generate(payload["prompt"], sampling).text}

    with served(jobs) as client, ExitStack() as stack:
        payload = {"prompt": "Name a colour.", "max_tokens": 4}
        location = submit(client, payload).headers["location"]
        in_background(stack, jobs, do)
        told = finished(client, location)
        assert told["status"] == "done"
        assert told["result"] == do(payload)


def test_a_key_may_be_sent_again(client: httpx.Client, jobs: Any) -> None:
    first, again = submit(client, 1, "k"), submit(client, 1, "k")
    assert first.headers["location"] == again.headers["location"]
    assert jobs.counts()["waiting"] == 1
    told = envelope(submit(client, 2, "k"), 422, "idempotency_key_reused")
    assert "found another" in told


def test_a_full_queue_says_when_to_come_back(client: httpx.Client, jobs: Any) -> None:
    for n in range(3):
        assert submit(client, n, f"key {n}").status_code == 202
    answer = submit(client, 3)
    assert "fewer than 3 unfinished jobs" in envelope(answer, 429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1
    assert submit(client, 1, "key 1").status_code == 202  # it is there already
    work_one(jobs)
    assert submit(client, 3).status_code == 202


def test_an_expired_job_is_not_done(client: httpx.Client, jobs: Any) -> None:
    location = submit(client, "late", deadline_s=0.05).headers["location"]
    wait_until(
        lambda: client.get(location).json()["status"] == "expired", 5, "the deadline"
    )
    done: list[Any] = []
    with ExitStack() as stack:
        in_background(stack, jobs, done.append)
        finished(client, submit(client, "in time", deadline_s=60).headers["location"])
    assert done == ["in time"]
    assert finished(client, location)["status"] == "expired"


def test_a_failed_job_says_why(client: httpx.Client, jobs: Any) -> None:
    def fail(payload: Any) -> None:
        raise ValueError(f"no {payload}")

    location = submit(client, "luck").headers["location"]
    with ExitStack() as stack:
        in_background(stack, jobs, fail, retry_s=0.001)
        told = finished(client, location)
    assert (told["status"], told["error"]) == ("failed", "ValueError: no luck")


def test_a_job_can_be_cancelled(client: httpx.Client, jobs: Any) -> None:
    location = submit(client, 1).headers["location"]
    for _ in range(2):
        assert client.delete(location).status_code == 204
    assert "was cancelled" in envelope(client.get(location), 410, "cancelled")
    assert jobs.lease("w", 1) is None
    location = submit(client, 1).headers["location"]
    work_one(jobs)
    told = envelope(client.delete(location), 409, "finished")
    assert "Expected an unfinished job" in told
    assert client.get(location).json()["status"] == "done"


def test_what_is_not_there_is_404(client: httpx.Client) -> None:
    for call in (client.get, client.delete):
        envelope(call("/v1/jobs/nothing"), 404, "job_not_found")
    envelope(client.get("/v2"), 404, "not_found")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[]", 422, "invalid_value"),
        (b"{}", 422, "invalid_value"),
        (b'{"payload": 1, "prioritty": 1}', 422, "invalid_value"),
        (b'{"payload": 1, "priority": 10}', 422, "invalid_value"),
        (b'{"payload": 1, "priority": true}', 422, "invalid_value"),
        (b'{"payload": 1, "deadline_s": 0}', 422, "invalid_value"),
        (b'{"payload": 1, "deadline_s": NaN}', 422, "invalid_value"),
        (b'{"payload": NaN}', 422, "invalid_value"),
        (b'{"payload": "' + b"x" * 1_048_600 + b'"}', 422, "invalid_value"),
        (b'{"payload": "' + b"x" * 1_060_000 + b'"}', 413, "body_too_large"),
    ],
)
def test_a_bad_body_is_refused(
    client: httpx.Client, jobs: Any, body: bytes, status: int, code: str
) -> None:
    headers = {"content-type": "application/json"}
    envelope(client.post("/v1/jobs", content=body, headers=headers), status, code)
    assert jobs.counts()["waiting"] == 0


def test_a_queue_that_cannot_be_read_is_503(
    client: httpx.Client, jobs: SQLiteJobs, tmp_path: Path
) -> None:
    jobs.close()
    for path in tmp_path.glob("jobs*"):
        path.unlink()
    (tmp_path / "jobs").write_text("something else, and long enough to be looked at")
    answer = submit(client, 1)
    told = envelope(answer, 503, "queue_unavailable")
    assert str(tmp_path) not in told
    assert answer.headers["retry-after"]


@needs_redis
def test_redis_gone_is_503_and_back_is_202(own_redis: OwnRedis) -> None:
    with RedisJobs(own_redis.url) as jobs, served(jobs) as client, ExitStack() as stack:
        in_background(stack, jobs, lambda payload: payload)
        location = submit(client, 1).headers["location"]
        assert finished(client, location)["result"] == 1
        own_redis.kill()
        answers: list[Callable[[], httpx.Response]] = [
            lambda: submit(client, 2, "k"),
            lambda: client.get(location),
            lambda: client.delete(location),
        ]
        wait_until(lambda: answers[0]().status_code == 503, 5, "it to be gone")
        for call in answers:
            told = call()
            assert "127.0.0.1" not in envelope(told, 503, "queue_unavailable")
            assert int(told.headers["retry-after"]) >= 1
        own_redis.start()
        again = submit(client, 2, "k")
        assert again.status_code == 202
        assert finished(client, again.headers["location"])["result"] == 2
        assert finished(client, location)["result"] == 1


@needs_redis
def test_a_queue_that_is_not_set_up_right_is_500_and_logged(
    own_redis: OwnRedis, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisJobs(own_redis.url) as jobs, served(jobs) as client:
        jobs._redis.config_set("requirepass", "secret")
        jobs.close()  # what is open stays logged in
        told = envelope(submit(client, 1), 500, "queue_broken")
        own_redis.kill(password="secret")
    assert "Redis" not in told
    assert "Put the user and password" in caplog.text


def work_one(jobs: Any) -> None:
    """Does one job, as a worker would."""
    stop = threading.Event()

    def do(payload: Any) -> Any:
        stop.set()
        return payload

    assert work(jobs, do, stop) == 1
