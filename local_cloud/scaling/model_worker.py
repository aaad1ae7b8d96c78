"""A worker as it is deployed: the model, the jobs of one Redis, and no port.

    python -m local_cloud.scaling.model_worker redis://localhost:6379/0

A payload is {"prompt": "Hi", "max_tokens": 16}; the result has the text. It does as
many jobs at a time as the model has rows (ROWS and CONTEXT, as for the API). SIGTERM:
no other job is begun, those at hand are finished, then it ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from local_cloud.scaling.jobs import Jobs
from local_cloud.scaling.worker import work

if TYPE_CHECKING:
    from models import Model

TOKENS = 64  # of an answer, unless the payload says


def answer(model: Model, payload: Any) -> dict[str, Any]:
    """Does a job. What is wrong with its payload is raised, and becomes its error."""
    from models import Sampling

    if not isinstance(payload, dict) or not isinstance(payload.get("prompt"), str):
        raise ValueError('expected {"prompt": a text}, found another payload; send one')
    sampling = Sampling(max_tokens=payload.get("max_tokens", TOKENS))
    found = model.generate(payload["prompt"], sampling)
    return {"text": found.text, "finish_reason": found.finish_reason}


def serve(model: Model, jobs: Jobs, stop: threading.Event) -> int:
    """Does jobs until `stop`, one a row at a time; gives how many it did.

    What ends one row ends all, and is raised: whoever runs this starts it again.
    """
    here = f"{socket.gethostname()}-{os.getpid()}"

    def row(number: int) -> int:
        try:
            name = f"{here}-{number}"
            return work(jobs, partial(answer, model), stop, worker=name)
        finally:
            stop.set()

    with ThreadPoolExecutor(model.rows) as pool:
        return sum(pool.map(row, range(model.rows)))


def main(argv: list[str] | None = None) -> int:
    """Serve the Redis of a URL until a signal comes."""
    (url,) = sys.argv[1:] if argv is None else argv
    import models
    from local_cloud.scaling.redis_jobs import RedisJobs
    from serving.settings import Settings

    stop, told = threading.Event(), Settings()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    loaded = models.load(told.device, rows=told.rows, context=told.context)
    with loaded as model, RedisJobs(url) as jobs:
        print(f"Did {serve(model, jobs, stop)} jobs.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
