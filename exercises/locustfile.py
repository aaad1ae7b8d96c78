"""Load for a model API: by a schedule, not by the server's leave.

Locust's users wait for an answer before they ask again, so a server that stalls also
stops being asked, and its worst moment is missing from the figures. Here one locust
user hands out the work: the moment of each request is drawn before the run, each is
sent when it is due, and every latency counts from then, however late it was sent.

Run it, from the repository's root, beside `python model_api.py --serve` (it needs
locust: pip install -r requirements-tests.txt):

    python -m locust -f exercises/locustfile.py --headless \\
        --host http://127.0.0.1:8000 --shape spike --rate 2 --duration 30 \\
        --csv reports/load --json-file reports/load

    --shape     constant, steps, spike or daily
    --rate      requests a second at the shape's lowest
    --peak      times that at its highest
    --duration  seconds in which requests are due; the answers may take longer
    --seed      of the schedule: the same one, the same moments

The key, if the server wants one, comes from the environment: API_KEY. Without
--headless, locust's page is at http://localhost:8089. Three lines of the report:
"whole answer" and "first token" are latencies from when due; "sent late" is this
program's own delay. If the last is not far below the others, distrust them all. One
process is enough: --processes would send the schedule once for each.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
import requests
from gevent.pool import Pool
from locust import LoadTestShape, User, events, task
from locust.exception import StopUser
from requests.adapters import HTTPAdapter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from course.load import MAX_REQUESTS, check_target
from course.request import Events

MOST_IN_FLIGHT = 1000  # beyond, a request waits, and its waiting counts
ANSWER_S = 120.0  # until a request is given up
SILENCE_S = 30.0  # between two pieces of an answer
MAX_TOKENS = 32
QUESTIONS = (
    "Explain gravity in one sentence.",
    "Name three rivers in Africa.",
    "Write a line of a poem about rain.",
    "What is a prime number?",
)

# The shapes: requests a second, in units of the lowest rate, at a share of the run.

Shape = Callable[[float, float], float]  # (share of the run, peak) -> factor
SHAPES: dict[str, Shape] = {
    "constant": lambda share, peak: 1.0,
    "steps": lambda share, peak: 1 + (peak - 1) * math.floor(share * 4) / 3,
    "spike": lambda share, peak: peak if 0.4 <= share < 0.6 else 1.0,
    "daily": lambda share, peak: 1 + (peak - 1) * (1 - math.cos(math.tau * share)) / 2,
}


def schedule(
    shape: str, rate: float, peak: float, duration_s: float, seed: int
) -> list[float]:
    """Due times in s of users who do not know of each other (Poisson, thinned).

    Raises:
        ValueError: numbers that no run can have.
    """
    size = rate * peak * duration_s
    if shape not in SHAPES or rate <= 0 or peak < 1 or not 0 < size <= MAX_REQUESTS:
        raise ValueError(
            f"expected a shape of {', '.join(SHAPES)}, a rate above 0, a peak of at "
            f"least 1 and at most {MAX_REQUESTS:,} requests, found {shape} with rate "
            f"{rate:g}, peak {peak:g} and {duration_s:g} s"
        )
    draw, at, due = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate * peak)) < duration_s:
        if draw.random() * peak < SHAPES[shape](at / duration_s, peak):
            due.append(at)
    return due


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    parser.add_argument("--shape", choices=list(SHAPES), default="constant")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second")
    parser.add_argument("--peak", type=float, default=4.0, help="times that, at most")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds")
    parser.add_argument("--seed", type=int, default=1, help="of the schedule")
    parser.add_argument("--allow-remote", action="store_true", help="it is my server")


@events.init.add_listener
def check(environment: Any, **_: Any) -> None:
    """Refuse before the first request what would only fail in all of them."""
    options = environment.parsed_options
    host = urlsplit(environment.host or "").hostname
    try:
        if host is None:
            raise ValueError("expected a server, found none; pass --host http://…")
        check_target(host, allow_remote=options.allow_remote)
        planned(options)
    except (ValueError, PermissionError) as error:
        print(f"locustfile: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def planned(options: Any) -> list[float]:
    """The schedule that the command line asks for."""
    return schedule(
        options.shape, options.rate, options.peak, options.duration, options.seed
    )


class Whole(LoadTestShape):
    """One user, until the schedule is over and everything is answered.

    The load's shape is in the schedule. Users could not make it: each of them slows
    down with the server.
    """

    def tick(self) -> tuple[int, float] | None:
        return None if Dispatcher.finished else (1, 1.0)


class Dispatcher(User):
    """Sends each request when it is due."""

    finished = False

    @task
    def run_schedule(self) -> None:
        due = planned(self.environment.parsed_options)
        pool, start = Pool(MOST_IN_FLIGHT), time.perf_counter()
        with connected() as session:
            try:
                for number, at in enumerate(due):
                    gevent.sleep(max(0.0, start + at - time.perf_counter()))
                    pool.spawn(self.request, session, number, start + at)
                pool.join()
            finally:
                pool.kill()
        Dispatcher.finished = True
        raise StopUser

    def request(self, session: requests.Session, number: int, due: float) -> None:
        """One streamed answer, told to locust as three measurements from when due."""
        self.tell("sent late", due, None)
        try:
            with gevent.Timeout(ANSWER_S, TimeoutError(f"not within {ANSWER_S:g} s")):
                self.read(session, number, due)
        except (requests.RequestException, TimeoutError, ValueError) as error:
            self.tell("whole answer", due, error)
        else:
            self.tell("whole answer", due, None)

    def read(self, session: requests.Session, number: int, due: float) -> None:
        """Raises ValueError if what comes is not a whole answer."""
        question = QUESTIONS[number % len(QUESTIONS)]
        body = {
            "model": "smollm2-135m-instruct",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": MAX_TOKENS,
            "stream": True,
        }
        url = f"{self.environment.host}/v1/chat/completions"
        with session.post(url, json=body, stream=True, timeout=SILENCE_S) as answer:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}: {answer.text[:200]}")
            first, reader = True, Events()
            for chunk in answer.iter_content(chunk_size=None):
                for data in reader.feed(chunk):
                    if data == "[DONE]":
                        return
                    if has_text(data) and first:
                        first = False
                        self.tell("first token", due, None)
        raise ValueError("the stream broke off before [DONE]")

    def tell(self, what: str, due: float, error: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type="chat",
            name=what,
            response_time=1000 * (time.perf_counter() - due),
            response_length=0,
            exception=error,
            context={},
        )


def connected() -> requests.Session:
    """Connections for all requests at once, and never through a proxy."""
    session = requests.Session()
    session.trust_env = False
    adapter = HTTPAdapter(pool_connections=1, pool_maxsize=MOST_IN_FLIGHT)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    if secret := os.environ.get("API_KEY"):
        session.headers["Authorization"] = f"Bearer {secret}"
    return session


def has_text(data: str) -> bool:
    """Whether an event brings text; an error that it brings instead is raised."""
    event = json.loads(data)
    if problem := event.get("error"):
        raise ValueError(str(problem))
    choices = event.get("choices") or ()
    return any((choice.get("delta") or {}).get("content") for choice in choices)
