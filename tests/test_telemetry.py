"""Traces, log lines and exemplars: one id, nothing secret, nothing lost, no cost."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from prometheus_client.openmetrics import parser as openmetrics

from course import process
from local_cloud.monitoring import logs
from local_cloud.monitoring.scrape import Scrape, parse, scrape
from local_cloud.monitoring.traces import SQLiteSpans, Tracing, phases, waterfall
from model_api import create_app
from monitoring_setup import KEPT, JsonLines, worth_keeping
from serving.errors import failed_answer
from serving.settings import Settings
from tests.api_fixtures import (
    ADMIN_KEY,
    CHAT,
    KEY,
    NAME,
    client,
    model,
    question,
    run,
    served,
    until,
)

ROOT = Path(__file__).parent.parent
EVERYTHING = partial(worth_keeping, share=1.0)
OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}
HTTP_COUNT = "http_server_request_duration_seconds_count"
FIRST_TOKEN = "gen_ai_server_time_to_first_token_seconds"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


class Watched(SimpleNamespace):
    """An app with telemetry, and what it wrote."""

    def spans(self) -> list:
        """The requests' own spans."""
        self.tracing.flush()
        return self.store.roots()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.written.getvalue().splitlines()]


@contextmanager
def watched(keep: Any = EVERYTHING, **settings: Any) -> Iterator[Watched]:
    written = io.StringIO()
    with (
        closing(SQLiteSpans()) as store,
        Tracing(store, keep) as tracing,
        logs.lines(JsonLines(), written, "serving") as handler,
    ):
        app = create_app(Settings(**settings), model=model(), telemetry=tracing)
        yield Watched(
            app=app, store=store, tracing=tracing, written=written, handler=handler
        )


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def work() -> httpx.Response:
        async with client(app) as http:
            return await http.request(method, path, **options)

    return run(work)


# ## One id


def test_one_trace_leads_from_the_client_to_the_engine_the_log_and_the_exemplar():
    with watched() as seen, served(seen.app) as url:
        answer = httpx.post(url + CHAT, json=question(), headers=PARENT, timeout=60)
        until(seen.lines)  # the answer is there before its end is written down
        seen.tracing.flush()
        spans = seen.store.trace(TRACE)
        exposed = httpx.get(f"{url}/metrics", headers=OPENMETRICS).text
    request, chat, queue, prefill, decode = spans
    assert [span.name for span in spans] == [
        f"POST {CHAT}",
        f"chat {NAME}",
        "queue",
        "prefill",
        "decode",
    ]
    assert request.parent_id == CALLER
    assert chat.parent_id == request.span_id
    assert {s.parent_id for s in (queue, prefill, decode)} == {chat.span_id}
    # The engine's thread wrote these times: they meet, and lie within the request's.
    assert request.start_ns <= chat.start_ns == queue.start_ns
    assert queue.end_ns == prefill.start_ns < prefill.end_ns == decode.start_ns
    assert decode.start_ns < decode.end_ns == chat.end_ns <= request.end_ns

    usage = answer.json()["usage"]
    told = chat.attributes
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.model"] == NAME
    assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert told["gen_ai.usage.cache_read.input_tokens"] == cached
    ends = [choice["finish_reason"] for choice in answer.json()["choices"]]
    assert told["gen_ai.response.finish_reasons"] == ends

    (line,) = [line for line in seen.lines() if line["http.route"] == CHAT]
    assert line["trace_id"] == TRACE
    assert line["span_id"] == request.span_id
    assert line["request_id"] == answer.headers["x-request-id"]
    named = {
        family.name
        for family in openmetrics.text_string_to_metric_families(exposed)
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels == {"trace_id": TRACE}
    }
    assert named == {
        "http_server_request_duration_seconds",
        "gen_ai_server_request_duration_seconds",
        "gen_ai_server_time_to_first_token_seconds",
        "gen_ai_server_time_per_output_token_seconds",
    }


def test_requests_at_once_keep_their_ids_apart():
    ids = [f"{number:032x}" for number in range(1, 9)]

    async def work(app: Any) -> list[httpx.Response]:
        async with client(app) as http:
            return await asyncio.gather(
                *(
                    http.post(
                        CHAT,
                        json=question(max_tokens=place + 1, stream=place % 2 == 0),
                        headers={
                            "traceparent": f"00-{id}-{CALLER}-01",
                            "x-request-id": f"request-{place}",
                        },
                    )
                    for place, id in enumerate(ids)
                )
            )

    with watched() as seen:
        run(lambda: work(seen.app))
        seen.spans()
        for place, id in enumerate(ids):
            (chat,) = [s for s in seen.store.trace(id) if s.name.startswith("chat")]
            assert chat.attributes["gen_ai.usage.output_tokens"] <= place + 1
        told = {line["trace_id"]: line["request_id"] for line in seen.lines()}
    assert told == {id: f"request-{place}" for place, id in enumerate(ids)}


def test_each_of_many_answers_has_its_phases():
    with watched() as seen:
        ask(seen.app, "POST", CHAT, json=question(n=3), headers=PARENT)
        seen.tracing.flush()
        names = [bar.span.name for bar in waterfall(seen.store.trace(TRACE))]
    assert [names.count(name) for name in ("queue", "prefill", "decode")] == [3, 3, 3]


@pytest.mark.parametrize(
    "given",
    ["", "nonsense", f"00-{'0' * 32}-{CALLER}-01", "00-\xff-\xff-01", "0" * 9999],
)
def test_a_broken_traceparent_begins_a_trace_of_its_own(given: str):
    headers = [(b"traceparent", given.encode("latin-1"))]
    with watched() as seen:
        assert ask(seen.app, "GET", "/v1/models", headers=headers).status_code == 200
        (root,) = seen.spans()
    assert root.parent_id is None
    assert int(root.trace_id, 16)


def test_an_answer_that_was_given_up_has_the_phases_it_reached():
    stream: Any = SimpleNamespace(
        submitted=10.0, queued_s=0.0, first_token_s=0.0, total_s=0.0
    )
    assert phases(stream, 12.0) == [("queue", 10.0, 12.0)]
    stream.queued_s, stream.total_s = 0.5, 1.5
    assert phases(stream, 12.0) == [("queue", 10.0, 10.5), ("prefill", 10.5, 11.5)]


def test_a_step_of_the_wall_clock_bends_no_span(monkeypatch: pytest.MonkeyPatch):
    with watched() as seen:
        trace = seen.tracing.begin("id", [])
        now_ns = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now_ns - 3_600_000_000_000)
        trace.end("/", "GET", 200, 0.25, None)
        (root,) = seen.spans()
    assert root.ms == pytest.approx(250, abs=0.01)
    assert abs(root.start_ns - now_ns) < 60e9


# ## What failed


def test_refusals_and_failures_have_a_status_and_callers_mistakes_have_none():
    with watched(keep=EVERYTHING, tokens_per_minute=500) as seen:
        app = seen.app

        @app.get("/broken")
        async def broken() -> None:
            raise RuntimeError("on purpose")

        for method, path, body in (
            ("POST", CHAT, question(max_tokens=900)),
            ("GET", "/broken", None),
            ("GET", "/nothing", None),
            ("POST", CHAT, question(max_tokens="many")),
            ("POST", CHAT, question()),
        ):
            ask(app, method, path, json=body)
        errors = [root.error for root in seen.spans()]
        told = [line for line in seen.lines() if "http.route" in line]
        (crash,) = [line for line in seen.lines() if "exception" in line]
    levels = [line["level"] for line in told]
    assert errors == ["429", "500", None, None, None]
    assert levels == ["WARNING", "WARNING", "INFO", "INFO", "INFO"]
    assert "on purpose" in crash["exception"]
    assert crash["trace_id"] == told[1]["trace_id"]


ENDLESS = {"max_tokens": 900, "logit_bias": {"0": -100, "2": -100}}


def test_a_stream_that_breaks_after_its_200_is_an_error_and_counts_as_one():
    with watched(keep=worth_keeping, request_timeout_s=2.0) as seen:
        body = question(stream=True, **ENDLESS)
        answer = ask(seen.app, "POST", CHAT, json=body, headers=PARENT)
        counted = parse(ask(seen.app, "GET", "/metrics").text)
        seen.tracing.flush()
        spans = {span.name: span for span in seen.store.trace(TRACE)}
    assert answer.status_code == 200
    assert "[DONE]" not in answer.text
    for name in (f"POST {CHAT}", f"chat {NAME}", "decode"):
        assert spans[name].error == "generation_deadline"
    assert spans["queue"].error is spans["prefill"].error is None
    told = spans[f"POST {CHAT}"].attributes["http.response.status_code"]
    assert told == 200  # what was sent; what is promised is counted by how it ended
    assert requests(counted, "504") == 1
    assert requests(counted, "200") == 0
    assert counted.total(f"{FIRST_TOKEN}_count") == 1


def requests(counted: Scrape, status: str) -> float:
    return counted.total(HTTP_COUNT, http_route=CHAT, http_response_status_code=status)


def test_a_stream_that_crashes_after_its_200_counts_as_a_failure(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("serving.generate._usage", lambda *_: 1 // 0)  # at its end
    with watched() as seen:
        with pytest.raises(ZeroDivisionError):
            ask(seen.app, "POST", CHAT, json=question(stream=True))
        counted = parse(ask(seen.app, "GET", "/metrics").text)
    assert (requests(counted, "500"), requests(counted, "200")) == (1, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_in_vain_for_a_first_token_is_counted(stream: bool):
    """Or an overload would improve the share of quick answers."""
    with watched(request_timeout_s=0.0) as seen:
        answer = ask(seen.app, "POST", CHAT, json=question(n=2, stream=stream))
        counted = parse(ask(seen.app, "GET", "/metrics").text)
    assert answer.status_code == 504
    assert requests(counted, "504") == 1
    assert counted.total(f"{FIRST_TOKEN}_count") == 2
    assert counted.total(f"{FIRST_TOKEN}_bucket", le="10.0") == 0
    assert math.isfinite(counted.total(f"{FIRST_TOKEN}_sum"))  # a mean recovers


def test_a_whole_answer_that_fails_gave_nobody_a_first_token():
    with watched(request_timeout_s=1.0) as seen:
        assert ask(seen.app, "POST", CHAT, json=question(**ENDLESS)).status_code == 504
        counted = parse(ask(seen.app, "GET", "/metrics").text)
    assert counted.total(f"{FIRST_TOKEN}_count") == 1
    assert counted.total(f"{FIRST_TOKEN}_bucket", le="2.5") == 0


def test_a_first_token_is_counted_when_it_leaves_and_once():
    with watched() as seen, served(seen.app) as url:
        body = question(stream=True, **ENDLESS)

        def count() -> float:
            return scrape(url).total(f"{FIRST_TOKEN}_count")

        with httpx.stream("POST", url + CHAT, json=body) as answer:
            lines = answer.iter_lines()  # whoever lets go of it has left
            next(lines)
            until(lambda: count() == 1)
            assert CHAT not in seen.written.getvalue()  # the answer goes on
        until(lambda: "client_left" in seen.written.getvalue())
        assert count() == 1


def test_who_leaves_before_the_first_token_is_counted():
    rows, body = 8, question(stream=True, **ENDLESS)

    def full(url: str) -> bool:
        told = scrape(url)
        begun = told.total(f"{FIRST_TOKEN}_count")
        return (begun, told.total("engine_queued_requests")) == (rows, 1)

    async def work(url: str) -> None:
        async with httpx.AsyncClient(timeout=60) as http, asyncio.TaskGroup() as group:
            ask = [http.post(url + CHAT, json=body) for _ in range(rows + 1)]
            asked = [group.create_task(one) for one in ask]
            await asyncio.to_thread(until, lambda: full(url))
            for task in asked:
                task.cancel()

    with watched(ttft_target_ms=600_000) as seen, served(seen.app) as url:
        run(lambda: work(url))
        until(lambda: scrape(url).total(f"{FIRST_TOKEN}_count") == rows + 1)
        counted = scrape(url)
    assert counted.total(f"{FIRST_TOKEN}_bucket", le="10.0") == rows


def test_a_client_that_leaves_is_an_error_and_its_answer_was_cut():
    body = question(max_tokens=900, stream=True, logit_bias={"0": -100, "2": -100})
    with watched() as seen, served(seen.app) as url:
        with httpx.stream("POST", url + CHAT, json=body, headers=PARENT) as answer:
            next(answer.iter_lines())
        until(seen.lines)
        seen.tracing.flush()
        spans = {span.name: span for span in seen.store.trace(TRACE)}
    assert spans[f"POST {CHAT}"].error == spans["decode"].error == "client_left"
    assert spans[f"chat {NAME}"].attributes["gen_ai.usage.output_tokens"] < 900


# ## What is kept


def test_all_errors_are_kept_and_a_tenth_of_the_rest():
    draw = random.Random(7)
    ids = {f"{draw.getrandbits(128):032x}": number % 20 == 0 for number in range(600)}

    async def work(app: Any) -> None:
        async with client(app) as http:
            for number, (id, refused) in enumerate(ids.items()):
                # What the caller keeps of it (the last digit) is the caller's affair.
                traced = {"traceparent": f"00-{id}-{CALLER}-0{number // 20 % 2}"}
                if refused:
                    body = question(max_tokens=900)
                    await http.post(CHAT, json=body, headers=traced)
                else:
                    await http.get("/v1/models", headers=traced)

    with watched(keep=worth_keeping, tokens_per_minute=500) as seen:
        run(lambda: work(seen.app))
        kept = {root.trace_id for root in seen.spans()}
        lines = seen.lines()
    failed = {id for id, refused in ids.items() if refused}
    assert failed <= kept
    rest = kept - failed
    # Binomial: 570 at a tenth are 57, and within 25 of it but once in 2,000 draws.
    assert 32 <= len(rest) <= 82
    # The same everywhere: another service that draws by the id keeps the same traces.
    assert rest == {id for id in set(ids) - failed if worth_keeping(id, 0.0, None)}
    assert len(lines) == 600  # a log line each, whatever is sampled
    assert {line["trace_id"] for line in lines if line["trace_kept"]} == kept


def test_a_policy_that_fails_loses_nothing():
    with watched(keep=lambda *_: 1 // 0) as seen:
        assert ask(seen.app, "POST", CHAT, json=question()).status_code == 200
        assert len(seen.spans()) == len(seen.lines()) == 1


def test_slow_requests_are_kept():
    unlucky = "f" * 32
    assert not worth_keeping(unlucky, 4.9, None)
    assert worth_keeping(unlucky, 5.0, None)
    assert worth_keeping(unlucky, 0.0, "500")
    assert KEPT == 0.1


def test_no_exemplar_names_a_trace_that_was_not_kept():
    with watched(keep=lambda *_: False) as seen:
        ask(seen.app, "POST", CHAT, json=question(), headers=PARENT)
        exposed = ask(seen.app, "GET", "/metrics", headers=OPENMETRICS).text
        assert not seen.spans()
    assert 'le="+Inf"' in exposed
    assert "trace_id" not in exposed


def test_the_store_keeps_the_newest_spans(tmp_path: Path):
    with closing(SQLiteSpans(tmp_path / "spans", most=5)) as store:
        with Tracing(store, EVERYTHING) as tracing:
            for number in range(12):
                tracing.begin("id", []).end(f"/{number}", "GET", 200, 0.0, None)
        names = [root.name for root in store.roots()]
    assert names == [f"GET /{number}" for number in range(7, 12)]


# ## Where it goes


@contextmanager
def collector() -> Iterator[tuple[str, list]]:
    """An OTLP receiver that parses what it gets."""
    got: list[ExportTraceServiceRequest] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Receiver) as receiver:
        thread = threading.Thread(target=receiver.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{receiver.server_port}", got
        finally:
            receiver.shutdown()
            thread.join()


def test_a_collector_gets_the_spans_over_otlp(monkeypatch: pytest.MonkeyPatch):
    with collector() as (url, got):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        with watched() as seen:
            ask(seen.app, "POST", CHAT, json=question(), headers=PARENT)
            seen.tracing.flush()
            kept = seen.store.trace(TRACE)
    (resource,) = [r for request in got for r in request.resource_spans]
    service = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert service["service.name"] == "model-api"
    spans = {s.span_id.hex(): s for scope in resource.scope_spans for s in scope.spans}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert {id: (s.name, s.start_time_unix_nano) for id, s in spans.items()} == {
        span.span_id: (span.name, span.start_ns) for span in kept
    }


def test_a_dead_collector_fails_no_request_and_loses_no_trace(
    monkeypatch: pytest.MonkeyPatch,
):
    dead = f"http://127.0.0.1:{process.free_port()}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", dead)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    with watched() as seen:
        assert ask(seen.app, "GET", "/v1/models").status_code == 200
        (root,) = seen.spans()
    assert root.name == "GET /v1/models"


def test_without_telemetry_nothing_of_it_is_imported():
    """The image has no SDK. (FastAPI itself needs OpenTelemetry's API.)"""
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None; import model_api;"
        "from serving.settings import Settings; model_api.create_app(Settings());"
        "print([name for name in sys.modules if 'monitoring' in name])"
    )
    argv = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# ## Log lines


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def cycle() -> dict[str, Any]:
    told: dict[str, Any] = {}
    told["self"] = told
    return told


@pytest.mark.parametrize(
    ("message", "args", "extra"),
    [
        ("plain", (), {"value": object()}),
        ("unprintable %s", (Unprintable(),), {}),
        ("unprintable", (), {"value": Unprintable()}),
        ("unprintable name", (), {"value": {Unprintable(): 1}}),
        ("wrong %d", ("arguments",), {}),
        ("too few %s %s", (1,), {}),
        ("no number", (), {"value": [float("nan"), float("inf"), 10**5000]}),
        ("a cycle", (), {"value": cycle()}),
        ("surrogate \ud800", (), {}),
        ("bytes", (), {"value": b"\xff\x00"}),
        ('forged\n{"level": "INFO"}\r\u2028\x1b[2Kend', (), {}),
        (Unprintable(), (), {}),
    ],
)
def test_any_record_is_one_line_of_json(message: Any, args: tuple, extra: dict):
    written = io.StringIO()
    with logs.lines(JsonLines(), written, "serving") as handler:
        logging.getLogger("serving").info(message, *args, extra=extra)
    (line,) = written.getvalue().splitlines()

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    told = json.loads(line, parse_constant=refuse)
    assert handler.failed == 0
    assert told["level"] == "INFO"
    assert all(" " <= char <= "~" for char in line)
    if isinstance(message, str) and not args:
        assert told["message"] == message


SECRETS = [
    "Bearer abcdef-ghijkl",
    "Basic dXNlcjpwYXNz",
    "sk-proj-0123456789abcd",
    "hf_abcdefghijklmnop",
    "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSM",
    "Jx0tq3-2n0PbNq9mVJ4K6X0yq2Xq6s0hQ7dYkZ1aBcD",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822c",
    KEY,  # of no shape at all: it is known
]
PLACES: dict[str, Any] = {
    "message": lambda s: {"msg": f"before {s} after"},
    "arguments": lambda s: {"msg": "%s and %r", "args": (s, [s])},
    "field": lambda s: {"value": s},
    "nested": lambda s: {"value": [{"deep": (s, {"deeper": f"x={s}"})}]},
    "a field's name": lambda s: {"value": {s: 1}},
    "bytes": lambda s: {"value": [(b"x-header", s.encode())]},
    "url": lambda s: {"msg": f"GET /v1?q={s}&x=1"},
    "wrong arguments": lambda s: {"msg": "%d", "args": (s,)},
    "exception": lambda s: {"exc_info": raised(s)},
}


def raised(text: str) -> Any:
    try:
        raise ValueError(f"could not use {text}")
    except ValueError:
        return sys.exc_info()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_hidden_wherever_it_stands(secret: str, place: str):
    record = logging.makeLogRecord({"msg": "text", **PLACES[place](secret)})
    line = JsonLines([KEY, ADMIN_KEY]).format(record)
    assert secret.split()[-1] not in line
    assert "[redacted]" in line
    json.loads(line)


@pytest.mark.parametrize(
    "said",
    [
        {"msg": "Authorization: hunter2 and more"},
        {"msg": "headers %s", "args": ([(b"authorization", b"hunter2")],)},
        {"msg": "headers %s", "args": ({"X-Api-Key": "hunter2"},)},
        {"msg": 'body {"password": "hunter2"}'},
        {"msg": "redis://user:hunter2@10.0.0.1/0"},
        {"msg": "?api_key=hunter2&x=1"},
        {"msg": "cookie: a=1; session=hunter2"},
        {"value": {"password": ["hunter2"], "client_secret": {"a": "hunter2"}}},
        {"authorization": "hunter2"},
        {"value": "-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----"},
    ],
)
def test_what_a_name_gives_away_is_hidden_whatever_it_looks_like(said: dict):
    line = JsonLines().format(logging.makeLogRecord({"msg": "text", **said}))
    assert "hunter2" not in line
    json.loads(line)


def test_ids_and_counts_are_not_taken_for_secrets():
    told = {
        "msg": "POST /v1/chat/completions 200",
        "trace_id": TRACE,
        "span_id": CALLER,
        "request_id": TRACE,
        "gen_ai.usage.input_tokens": 12,
        "skipping": "sketchy-looking words that are long but not secret",
    }
    line = json.loads(JsonLines().format(logging.makeLogRecord(told)))
    assert {name: line[name] for name in told if name != "msg"} == {
        name: value for name, value in told.items() if name != "msg"
    }


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_line_that_cannot_be_written_goes_to_stderr_without_its_secrets(
    capsys: pytest.CaptureFixture[str],
):
    with watched() as seen, logs.lines(JsonLines(), FullDisk(), "serving") as handler:
        secret = {"extra": {"api_key": "hunter2"}}
        logging.getLogger("serving").warning("kept %s", "Bearer abcdefgh", **secret)
        assert ask(seen.app, "GET", "/v1/models", headers=PARENT).status_code == 200
    said = capsys.readouterr().err
    assert handler.failed == 2
    first, second = map(json.loads, said.splitlines())
    assert first["message"] == "kept Bearer [redacted]"
    assert second["trace_id"] == TRACE
    assert "hunter2" not in said


def test_a_handler_that_raises_fails_no_request_and_loses_no_line(
    capsys: pytest.CaptureFixture[str],
):
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("somebody's mistake")

    with watched() as seen:
        logging.getLogger("serving").addHandler(Broken())
        assert ask(seen.app, "GET", "/v1/models", headers=PARENT).status_code == 200
        assert [root.trace_id for root in seen.spans()] == [TRACE]
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["trace_id"] == TRACE


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"max_tokens": "wrong"}])
def test_no_prompt_and_no_answer_is_written_anywhere(fields: dict[str, Any]):
    said = [{"role": "user", "content": "Repeat after me: PELIKAN PELIKAN PELIKAN"}]
    with watched() as seen:
        answer = ask(seen.app, "POST", CHAT, json=question(messages=said, **fields))
        (root,) = seen.spans()
        spans = str(seen.store.trace(root.trace_id))
    assert answer.status_code in (200, 422)
    for text in (spans, seen.written.getvalue()):
        assert "PELIKAN" not in text.upper()
    assert f"POST {CHAT}" in spans


# ## Metrics


def test_callers_cannot_make_up_time_series():
    """Paths, methods and models are theirs to invent; each could be a series."""

    async def work(app: Any) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(_: Any) -> None: ...

        for number in range(10_000):
            scope = {
                "type": "http",
                "method": f"M{number}" if number % 2 else "GET",
                "path": "/v1/models" if number % 4 == 1 else f"/p{number}",
                "query_string": b"",
                "headers": [(b"host", f"h{number}".encode())],
                "client": (f"10.0.{number // 250}.{number % 250}", 1),
            }
            await app(scope, receive, send)
        async with client(app) as http:
            for number in range(20):
                await http.post(CHAT, json=question(model=f"model-{number}"))

    app, name = create_app(Settings(), model=model()), HTTP_COUNT
    before = parse(ask(app, "GET", "/metrics").text)
    run(lambda: work(app))
    after = parse(ask(app, "GET", "/metrics").text)
    assert after.total(name, http_request_method="_OTHER") > 0
    new = set(after.series(name)) - set(before.series(name))
    assert len(new) < 10, new
    assert after.total(name) - before.total(name) == 10_021  # one is a scrape


def test_a_burst_of_any_failure_is_seen_from_its_first():
    """What appears with its first increment hides that from rate()."""
    app = create_app(Settings(), model=model())
    made = parse(ask(app, "GET", "/metrics").text)
    routes = [route.path for route in app.routes if "POST" in route.methods]  # type: ignore[attr-defined]
    failures = [failed_answer(why).status for why in ("deadline", "cancelled", "error")]
    for route in (path for path in routes if path.startswith("/v1/")):
        for status in {200, 422, 429, 499, 503, *failures}:
            labels = {"http_route": route, "http_response_status_code": str(status)}
            assert made.series(HTTP_COUNT, http_request_method="POST", **labels)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "text/plain; version=0.0.4; charset=utf-8"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/html", "text/plain; version=0.0.4; charset=utf-8"),
        (
            "application/openmetrics-text;version=1.0.0,"
            "application/openmetrics-text;version=0.0.1;q=0.75,"
            "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
        (
            "application/openmetrics-text;version=x",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
    ],
)
def test_metrics_come_in_the_form_that_was_asked_for(accept: str | None, kind: str):
    headers = {} if accept is None else {"accept": accept}
    with watched() as seen:
        ask(seen.app, "POST", CHAT, json=question(), headers=PARENT)
        answer = ask(seen.app, "GET", "/metrics", headers=headers)
    assert answer.headers["content-type"] == kind
    assert ("trace_id" in answer.text) == kind.startswith("application/")
    assert answer.text.endswith("# EOF\n") == kind.startswith("application/")


@pytest.mark.prometheus
def test_prometheus_finds_the_trace_by_its_exemplar(tmp_path: Path):
    if not shutil.which("prometheus"):
        pytest.skip("no Prometheus: apt-get install -y prometheus")
    with watched() as seen, served(seen.app) as url:
        httpx.post(url + CHAT, json=question(), headers=PARENT, timeout=60)
        target = json.dumps([url.removeprefix("http://")])
        (tmp_path / "prometheus.yml").write_text(
            "global: {scrape_interval: 200ms}\nscrape_configs: [{job_name: api, "
            f"static_configs: [{{targets: {target}}}]}}]\n"
        )
        port = process.free_port()
        argv = [
            "prometheus",
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--enable-feature=exemplar-storage",
        ]
        prometheus = f"http://127.0.0.1:{port}"
        asked = {
            "query": "gen_ai_server_time_to_first_token_seconds_bucket",
            "start": time.time() - 600,
            "end": time.time() + 600,
        }

        def exemplars() -> set[str]:
            address = f"{prometheus}/api/v1/query_exemplars"
            found = httpx.get(address, params=asked).json()["data"]
            return {e["labels"]["trace_id"] for s in found for e in s["exemplars"]}

        with process.child(argv, ready=f"{prometheus}/-/ready", deadline_s=30):
            until(exemplars, deadline_s=30)
            assert exemplars() == {TRACE}
