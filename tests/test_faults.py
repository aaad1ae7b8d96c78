"""The edge in front of the real API: it changes nothing until told to, and says so."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import httpx
import pytest

from course.process import wait_until
from local_cloud.monitoring.faults import MOST_BYTES, Edge, Faults, Share
from local_cloud.monitoring.scrape import scrape
from tests.benchmarks.servers import ours

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REQUESTS = "http_server_request_duration_seconds_count"
ASKED = {"model": "smollm2-135m-instruct", "temperature": 0}
SHORT = {**ASKED, "prompt": "The weather is", "max_tokens": 1}
TALK = {**ASKED, "messages": [{"role": "user", "content": "Count to ten."}]}
TALK |= {"stream": True, "max_tokens": 12}


@pytest.fixture
def edge(server: SimpleNamespace) -> Iterator[Edge]:
    with Edge(server.url, edges_s=(0.3,), timeout_s=30) as edge:
        yield edge


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=60) as client:
        yield client


def counted(edge: Edge, status: int, requests: int) -> bool:
    """Wait until so many ended so; an exchange is counted just after its last byte."""
    code = str(status)

    def total() -> float:
        return scrape(edge.url).total(REQUESTS, http_response_status_code=code)

    what = f"{requests} requests to be counted as {code}"
    return wait_until(lambda: total() == requests, 20, what, every_s=0.01)


def test_an_answer_passes_as_it_is(edge: Edge, server: SimpleNamespace, http):
    direct = http.post(server.url + COMPLETIONS, json=SHORT)
    through = http.post(edge.url + COMPLETIONS, json=SHORT)
    assert through.json()["choices"] == direct.json()["choices"]
    differing = {"date", "x-request-id", "content-length"}
    assert set(through.headers) - differing == set(direct.headers) - differing
    refused = http.post(edge.url + COMPLETIONS, json={"nothing": 1})
    assert refused.status_code == 422
    assert http.get(edge.url + "/health/ready?x=1").json()["status"] == "ready"
    assert counted(edge, 200, 2)
    assert edge.injected == 0


def test_a_stream_passes_piece_by_piece(edge: Edge, http):
    with http.stream("POST", edge.url + CHAT, json=TALK) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = [(time.monotonic(), piece) for piece in answer.iter_raw()]
    text = b"".join(piece for _, piece in pieces)
    assert text.endswith(b"data: [DONE]\n\n")
    assert text.count(b"data: ") > 8
    assert len(pieces) > 4, "the stream was held back and came in one piece"
    first = scrape(edge.url).total("gen_ai_server_time_to_first_token_seconds_count")
    assert first == 1


def test_a_client_that_leaves_is_gone_for_the_api_too(
    edge: Edge, server: SimpleNamespace, http
):
    cancelled = "gen_ai_server_cancelled_requests_total"
    before = scrape(server.url).total(cancelled)
    long = {**TALK, "max_tokens": 1500, "logit_bias": {"0": -100, "2": -100}}
    with http.stream("POST", edge.url + CHAT, json=long) as answer:
        next(answer.iter_raw())
    wait_until(lambda: scrape(server.url).total(cancelled) > before, 20, "a cancel")
    assert counted(edge, 499, 1)
    assert scrape(edge.url).total("http_server_active_requests") == 0


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_a_share_of_errors_is_exact(edge: Edge, http, share: float):
    edge.inject(errors=share)
    told = [http.post(edge.url + COMPLETIONS, json=SHORT) for _ in range(10)]
    bad = [answer for answer in told if answer.status_code == 500]
    assert len(bad) == round(10 * share)
    assert all(answer.headers["x-fault-injected"] == "error" for answer in bad)
    assert edge.injected == len(bad)
    assert counted(edge, 500, len(bad))
    edge.clear()
    assert http.post(edge.url + COMPLETIONS, json=SHORT).status_code == 200


def test_so_many_errors_and_no_more(edge: Edge, http):
    edge.inject(errors=1.0, most=2)
    told = [http.post(edge.url + COMPLETIONS, json=SHORT) for _ in range(4)]
    assert [answer.status_code for answer in told] == [500, 500, 200, 200]


def test_a_tenth_is_a_tenth_however_long_it_goes_on():
    share = Share(0.1)
    assert sum(share.hit() for _ in range(100_000)) == 10_000


def test_delay_and_hang(server: SimpleNamespace, http):
    with Edge(server.url, edges_s=(0.3,), timeout_s=1.0) as edge:
        edge.inject(delay_s=0.31)
        slow = http.post(edge.url + COMPLETIONS, json=SHORT)
        assert slow.headers["x-fault-injected"] == "delay"
        seen = scrape(edge.url)
        name = "gen_ai_server_time_to_first_token_seconds"
        assert seen.buckets(name)[0.3] == 0, "what is late is beyond the SLO's edge"
        assert seen.total(f"{name}_count") == 1
        edge.inject(hangs=1.0)
        began = time.monotonic()
        assert http.post(edge.url + COMPLETIONS, json=SHORT).status_code == 504
        assert time.monotonic() - began >= 1.0
        assert counted(edge, 504, 1)


def test_a_hang_ends_when_the_client_leaves(edge: Edge, http):
    edge.inject(hangs=1.0)
    soon = httpx.Timeout(20, read=0.3)
    with pytest.raises(httpx.ReadTimeout):
        http.post(edge.url + COMPLETIONS, json=SHORT, timeout=soon)
    assert counted(edge, 499, 1)


@pytest.mark.parametrize(
    "faults", [{"errors": 1.1}, {"errors": -0.1}, {"errors": 0.6, "hangs": 0.6}]
)
def test_impossible_faults_are_refused_and_change_nothing(faults: dict[str, float]):
    edge = Edge("http://127.0.0.1:9")
    edge.inject(errors=0.2)
    with pytest.raises(ValueError, match="expected errors and hangs from 0 to 1"):
        edge.inject(**faults)
    with pytest.raises(ValueError, match="delay_s"):
        edge.inject(delay_s=float("nan"))
    assert edge.faults == Faults(errors=0.2)


def test_labels_stay_few_whatever_strangers_ask(edge: Edge, http):
    before = len(scrape(edge.url).samples)
    for number in range(20):
        http.get(f"{edge.url}/secret-{number}")
        http.request(f"X{number}", f"{edge.url}/")
    grown = len(scrape(edge.url).samples) - before
    assert grown < 200, "paths and methods of strangers became labels"


def test_series_are_there_before_the_first_error(edge: Edge):
    for status in (500, 502, 503, 504):
        found = scrape(edge.url).series(REQUESTS, http_response_status_code=str(status))
        assert any(dict(labels)["http_route"] == CHAT for labels in found)


def test_too_large_a_request_is_refused(edge: Edge, http):
    body = b"x" * (MOST_BYTES + 1)
    assert http.post(edge.url + CHAT, content=body).status_code == 413


class Raw:
    """A server that reads a request and then does what it is told, byte by byte."""

    def __init__(self, answer: bytes, close: bool) -> None:
        self.answer, self.close = answer, close
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.serve)

    def serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(self.answer)
            if not self.close:
                self.over.wait(20)

    def __enter__(self) -> Raw:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.listener.close()


BEGUN = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"


@pytest.mark.parametrize(
    ("answer", "close", "status", "told"),
    [
        (b"", True, 502, 502),  # hung up before an answer
        (b"", False, 504, 504),  # silent
        (BEGUN, True, None, 502),  # hung up within it
        (BEGUN, False, None, 504),  # fell silent within it
    ],
)
def test_what_is_no_answer_is_counted_as_none(
    http, answer: bytes, close: bool, status: int | None, told: int
):
    with Raw(answer, close) as raw, Edge(raw.url, timeout_s=0.5) as edge:
        if status:
            assert http.post(edge.url + CHAT, json={}).status_code == status
        else:
            with pytest.raises(httpx.RemoteProtocolError):
                http.post(edge.url + CHAT, json={})
        assert counted(edge, told, 1)


def test_nobody_there_is_502(http):
    with Edge("http://127.0.0.1:9") as edge:
        assert http.post(edge.url + CHAT, json={}).status_code == 502


def test_many_at_once_and_no_thread_left(edge: Edge):
    threads = threading.active_count()
    edge.inject(errors=0.5, delay_s=0.05)

    def ask(_: int) -> int:
        with httpx.Client(trust_env=False, timeout=60) as http:
            return http.post(edge.url + COMPLETIONS, json=SHORT).status_code

    with ThreadPoolExecutor(16) as pool:
        told = list(pool.map(ask, range(32)))
    assert sorted(told) == [200] * 16 + [500] * 16
    edge.__exit__()
    assert threading.active_count() < threads
    edge.__enter__()


def test_a_stopped_server_is_seen_from_the_edge_alone(http):
    """SIGSTOP: connections are taken, nothing is answered; then all goes on."""
    with (
        ours(ROWS="2", CONTEXT="128") as api,
        Edge(f"http://127.0.0.1:{api.port}", timeout_s=0.5) as edge,
    ):
        ask = partial(http.post, edge.url + COMPLETIONS, json=SHORT)
        try:
            os.kill(api.pid, signal.SIGSTOP)
            assert ask().status_code == 504
        finally:
            os.kill(api.pid, signal.SIGCONT)
        wait_until(lambda: ask().is_success, 60, "it to answer again")
