"""The loop of a worker: lease, do, acknowledge.

    work(jobs, lambda payload: model.generate(payload["prompt"]).text, stop)

While a job is done its lease is extended, so leases can be short, and a worker that
dies is missed within one. A job that never ends would be extended for ever: `limit_s`
bounds it, after which the next worker gets it, and after `max_tries` it is dead.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from local_cloud.scaling.jobs import (
    BadJob,
    Job,
    Jobs,
    JobsDown,
    JobsError,
    LeaseLost,
)

LEASE_S = 10.0
LIMIT_S = 600.0
POLL_S = 0.02  # an empty queue is asked again: one look-up in an index
DOWN_S = 0.25  # a back end that is gone
RETRY_S, MAX_RETRY_S = 1.0, 60.0  # before the second try, and at most

log = logging.getLogger(__name__)


def work(
    jobs: Jobs,
    do: Callable[[Any], Any],
    stop: threading.Event,
    *,
    worker: str | None = None,
    lease_s: float = LEASE_S,
    limit_s: float = LIMIT_S,
    retry_s: float = RETRY_S,
) -> int:
    """Does jobs until `stop`; the one at hand is finished. Gives how many it did.

    Args:
        do: gets a payload and gives a result that JSON can say. What it raises is the
            job's failure: it is tried again after `retry_s`, then twice that, and so
            on, until it is dead.
        worker: a name; host and process unless given.

    While the back end is down it goes on asking. What waiting does not mend (a wrong
    password, a Redis without memory) is raised as JobsError.
    """
    worker = worker or f"{socket.gethostname()}-{os.getpid()}"
    done, down = 0, False
    while not stop.is_set():
        try:
            job = jobs.lease(worker, lease_s)
        except JobsDown as error:
            if not down:  # once, not four times a second
                log.warning("%s waits. %s", worker, error)
            down = True
            stop.wait(DOWN_S)
            continue
        if down:
            log.warning("%s goes on: the queue is back.", worker)
        down = False
        if job is None:
            stop.wait(POLL_S)
            continue
        with _extended(jobs, job, lease_s, limit_s):
            answer = _answer(jobs, do, job, retry_s)
        done += _deliver(answer, jobs, job, lease_s)
    return done


def _answer(
    jobs: Jobs, do: Callable[[Any], Any], job: Job, retry_s: float
) -> Callable[[], None]:
    try:
        return partial(jobs.ack, job, do(job.payload))
    except Exception as error:  # whatever it is, it is this job's, not the worker's
        return _failed(jobs, job, error, retry_s)


def _failed(
    jobs: Jobs, job: Job, error: Exception, retry_s: float
) -> Callable[[], None]:
    delay_s = min(MAX_RETRY_S, retry_s * 2 ** min(job.tries - 1, 30))
    return partial(jobs.nack, job, delay_s, f"{type(error).__name__}: {error}"[:1000])


def _deliver(answer: Callable[[], None], jobs: Jobs, job: Job, lease_s: float) -> bool:
    """Tells the back end, for as long as the lease can hold; whether it took it."""
    end = time.monotonic() + lease_s
    while True:
        try:
            answer()
            return True
        except LeaseLost:
            return False  # another has it now
        except BadJob as error:  # a result that cannot be stored
            answer = _failed(jobs, job, error, 0.0)
        except JobsDown:
            if time.monotonic() >= end:
                return False
            time.sleep(DOWN_S)


@contextmanager
def _extended(jobs: Jobs, job: Job, lease_s: float, limit_s: float) -> Iterator[None]:
    """Extends the lease three times a lease, for `limit_s` at most."""
    over, end = threading.Event(), time.monotonic() + limit_s

    def beat() -> None:
        while not over.wait(lease_s / 3) and time.monotonic() < end:
            try:
                jobs.extend(job, lease_s)
            except JobsDown:
                continue
            except JobsError:  # lost; or broken for good, as the answer will say
                return

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
