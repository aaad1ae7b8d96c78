"""Traces: spans made of what was written down, where they are kept, how they look.

A request's own span begins with the request, so that its id can stand in log lines
and exemplars from the first moment. Everything below it is made at the end, from the
times that the engine's thread wrote down, and only if the trace is kept.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    SpanKind,
    Status,
    StatusCode,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from course.show import Table
from local_cloud.monitoring import logs

if TYPE_CHECKING:
    from models import AsyncStream

W3C = TraceContextTextMapPropagator()
COLLECTORS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
GOOD_ENDS = ("stop", "length")
# The conventions leave a server's 4xx unset. These two are ours to look at: work that
# was refused, and a client that did not wait for its answer.
TROUBLE = (429, 499)
WAITING_SPANS = 16_384  # for the thread that exports; some 30 MB
EXPORT_EVERY_MS = 500
KEPT_SPANS = 100_000  # in SQLite; the oldest go first
LOG = logging.getLogger("serving.access")

# trace id, seconds, what failed -> whether to keep the trace
Keep = Callable[[str, float, str | None], bool]
Facts = dict[str, Any]


class Tracing:
    """What `create_app(telemetry=...)` takes: a trace and a log line a request."""

    def __init__(self, exporter: SpanExporter, keep: Keep, service: str = "model-api"):
        """Kept traces go to `exporter`, and to a collector if OTEL_... names one."""
        resource = Resource.create({"service.name": service})
        # All are recorded, also those whose caller did not: the choice is at the end.
        self.provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False)
        for each in (exporter, *_collector()):
            self.provider.add_span_processor(
                BatchSpanProcessor(each, WAITING_SPANS, EXPORT_EVERY_MS)
            )
        self.tracer, self.keep = self.provider.get_tracer("serving"), keep

    def __enter__(self) -> Tracing:
        return self

    def __exit__(self, *_: object) -> None:
        self.provider.shutdown()

    def flush(self) -> None:
        """Wait until everything kept so far is exported."""
        self.provider.force_flush()

    def begin(
        self, request_id: str, headers: Iterable[tuple[bytes, bytes]]
    ) -> RequestTrace:
        """Begin a request's trace, or join the one its caller names."""
        given = {
            name.decode(): value.decode("latin-1")
            for name, value in headers
            if name in (b"traceparent", b"tracestate")
        }
        return RequestTrace(self, request_id, given)


def _collector() -> Iterable[SpanExporter]:
    if any(os.environ.get(name) for name in COLLECTORS):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
            OTLPSpanExporter,
        )

        yield OTLPSpanExporter()  # it reads OTEL_EXPORTER_OTLP_... itself


class RequestTrace:
    """One request, and the answers that the engine writes for it."""

    def __init__(self, tracing: Tracing, request_id: str, given: dict[str, str]):
        self.tracing, self.request_id = tracing, request_id
        # The only look at the wall clock: a step of it later bends no span.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        self._began = time.monotonic()
        self.span = tracing.tracer.start_span(
            "request",
            W3C.extract(given) if given else None,
            SpanKind.SERVER,
            start_time=self._ns(self._began),
        )
        context = self.span.get_span_context()
        self.trace_id = format_trace_id(context.trace_id)
        self.span_id = format_span_id(context.span_id)
        self.kind = self.model = ""
        self.streams: Sequence[AsyncStream] = ()

    def generates(self, kind: str, model: str, streams: Sequence[AsyncStream]) -> None:
        """Remember the answers; the engine writes their times down."""
        self.kind, self.model, self.streams = kind, model, streams

    def exemplar(self) -> dict[str, str] | None:
        """Name this trace, unless it might not be kept: an example must be there."""
        kept = self._kept(time.monotonic() - self._began, None)
        return {"trace_id": self.trace_id} if kept else None

    def _kept(self, seconds: float, failure: str | None) -> bool:
        try:
            return self.tracing.keep(self.trace_id, seconds, failure)
        except Exception:  # of a policy that is not ours: rather too much than nothing
            return True

    def end(
        self, route: str, method: str, status: int, seconds: float, failure: str | None
    ) -> dict[str, str] | None:
        """Log the request; write its spans if its trace is kept."""
        failure = failure or self._broken() or _refused(status)
        kept = self._kept(seconds, failure)
        facts: Facts = {
            "http.route": route,
            "http.request.method": method,
            "http.response.status_code": status,
        }
        if failure:
            facts["error.type"] = failure
        if kept:
            self.span.update_name(f"{method} {route}")
            self._spans(facts, seconds, failure)
        self._log(f"{method} {route} {status}", facts, seconds, kept)
        return {"trace_id": self.trace_id} if kept else None

    def _broken(self) -> str | None:
        """How an answer failed, though the status line of its stream said 200."""
        ends = {stream.finish_reason for stream in self.streams}
        for reason in ("error", "deadline", "cancelled"):  # one error cancels the rest
            if reason in ends:
                return f"generation_{reason}"
        return None

    def _log(self, text: str, facts: Facts, seconds: float, kept: bool) -> None:
        level = logging.WARNING if "error.type" in facts else logging.INFO
        usage = self._usage() if self.streams else {}
        extra = {**facts, **usage, "seconds": round(seconds, 6), "trace_kept": kept}
        try:
            LOG.log(level, text, extra=extra)
        except Exception as error:  # of somebody's handler, and it shall fail nothing
            ids = {"trace_id": self.trace_id, "request_id": self.request_id}
            line = {"message": text, **ids, **extra, "handler": type(error).__name__}
            logs.last_resort(json.dumps(line))

    def _usage(self) -> Facts:
        """Tokens; of a prompt with many answers each answer counts it."""
        streams = self.streams
        return {
            "gen_ai.usage.input_tokens": sum(s.prompt_tokens for s in streams),
            "gen_ai.usage.output_tokens": sum(s.completion_tokens for s in streams),
            "gen_ai.usage.cache_read.input_tokens": sum(
                s.cached_tokens for s in streams
            ),
            "gen_ai.response.finish_reasons": [
                s.finish_reason or "cancelled" for s in streams
            ],
        }

    def _spans(self, facts: Facts, seconds: float, failure: str | None) -> None:
        ended = self._began + seconds
        if self.streams:
            self._generation(ended, failure)
        self._close(self.span, ended, failure, facts)

    def _generation(self, ended: float, failure: str | None) -> None:
        """The model's span, and below it what the engine did for each answer."""
        operation = "chat" if self.kind.startswith("chat") else self.kind
        facts: Facts = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "self_hosted",
            "gen_ai.request.model": self.model,
            "gen_ai.response.model": self.model,
            **self._usage(),
        }
        if failure:
            facts["error.type"] = failure
        name, last = f"{operation} {self.model}", 0.0
        model = self._child(self.span, name, self.streams[0].submitted)
        for stream in self.streams:
            told = phases(stream, ended)
            for phase, start, end in told[:-1]:
                self._close(self._child(model, phase, start), end)
            phase, start, last_end = told[-1]
            good, last = stream.finish_reason in GOOD_ENDS, max(last, last_end)
            child = self._child(model, phase, start)
            self._close(child, last_end, None if good else failure)
        self._close(model, last, failure, facts)

    def _child(self, parent: Any, name: str, began: float) -> Any:
        context, start = set_span_in_context(parent), self._ns(began)
        return self.tracing.tracer.start_span(name, context, start_time=start)

    def _close(
        self,
        span: Any,
        ended: float,
        failure: str | None = None,
        facts: Facts | None = None,
    ) -> None:
        span.set_attributes(facts or {})
        if failure:
            span.set_status(Status(StatusCode.ERROR, failure))
        span.end(self._ns(ended))

    def _ns(self, monotonic_s: float) -> int:
        return self._epoch_ns + int(monotonic_s * 1e9)


def _refused(status: int) -> str | None:
    return str(status) if status >= 500 or status in TROUBLE else None


def phases(stream: AsyncStream, now: float) -> list[tuple[str, float, float]]:
    """queue, prefill and decode: names, starts and ends by `time.monotonic()`.

    An answer that was given up has fewer; the last lasts until the engine let go of
    it, or until now.
    """
    start = stream.submitted
    begins = [0.0, *(at for at in (stream.queued_s, stream.first_token_s) if at)]
    ends = [*begins[1:], stream.total_s or now - start]
    names = ("queue", "prefill", "decode")
    told = zip(names, begins, ends, strict=False)
    return [(name, start + begin, start + end) for name, begin, end in told]


@dataclass(frozen=True)
class Span:
    """A span as it was kept."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start_ns: int  # since 1970
    end_ns: int
    error: str | None
    attributes: Facts

    @property
    def ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


class SQLiteSpans(SpanExporter):
    """Keeps spans in a file (":memory:" is one too), the newest so many."""

    def __init__(self, path: str | Path = ":memory:", most: int = KEPT_SPANS):
        self._lock, self.most = threading.Lock(), most
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._db.executescript(
            "PRAGMA journal_mode = WAL; CREATE TABLE IF NOT EXISTS spans (id INTEGER "
            "PRIMARY KEY, trace_id, span_id, parent_id, name, start_ns, end_ns, error, "
            "attributes); CREATE INDEX IF NOT EXISTS by_trace ON spans (trace_id);"
        )

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write a batch in one transaction."""
        rows = [_row(span) for span in spans]
        oldest = "DELETE FROM spans WHERE id <= (SELECT max(id) FROM spans) - ?"
        with self._lock, self._db:
            self._db.executemany(
                "INSERT INTO spans VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)", rows
            )
            self._db.execute(oldest, (self.most,))
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing: whoever made the store still reads it. See `close`."""

    def close(self) -> None:
        self._db.close()

    def trace(self, trace_id: str) -> list[Span]:
        """The spans of one trace, by start."""
        return self._select("WHERE trace_id = ? ORDER BY start_ns, id DESC", trace_id)

    def roots(self) -> list[Span]:
        """The request's own span of every trace."""
        spans = self._select("ORDER BY id")
        known = {span.span_id for span in spans}
        return [span for span in spans if span.parent_id not in known]

    def _select(self, rest: str, *values: Any) -> list[Span]:
        columns = "trace_id, span_id, parent_id, name, start_ns, end_ns, error"
        query = f"SELECT {columns}, attributes FROM spans {rest}"
        with self._lock:
            rows = self._db.execute(query, values).fetchall()
        return [Span(*told, attributes=json.loads(facts)) for *told, facts in rows]


def _row(span: ReadableSpan) -> tuple[Any, ...]:
    context, failed = span.context, span.status.status_code is StatusCode.ERROR
    assert context
    return (
        format_trace_id(context.trace_id),
        format_span_id(context.span_id),
        format_span_id(span.parent.span_id) if span.parent else None,
        span.name,
        span.start_time,
        span.end_time,
        (span.status.description or "error") if failed else None,
        json.dumps(dict(span.attributes or {})),
    )


@dataclass(frozen=True)
class Bar:
    """One line of a waterfall; times from the trace's beginning."""

    depth: int
    span: Span
    start_ms: float

    def drawn(self, whole_ms: float, columns: int) -> str:
        """The span as a bar, to scale."""
        before = round(self.start_ms / whole_ms * columns)
        long = max(1, round(self.span.ms / whole_ms * columns))
        return ("·" * before + "█" * long)[: max(columns, before + 1)]


def waterfall(spans: Sequence[Span]) -> list[Bar]:
    """The spans of a trace, each below its parent, in the order they began."""
    known = {span.span_id for span in spans}
    below: dict[str | None, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        parent = span.parent_id if span.parent_id in known else None
        below.setdefault(parent, []).append(span)
    began = min((span.start_ns for span in spans), default=0)
    bars: list[Bar] = []

    def walk(parent: str | None, depth: int) -> None:
        for span in below.get(parent, ()):
            bars.append(Bar(depth, span, (span.start_ns - began) / 1e6))
            walk(span.span_id, depth + 1)

    walk(None, 0)
    return bars


def table(spans: Sequence[Span], columns: int = 40) -> Table:
    """The waterfall of one trace."""
    bars = waterfall(spans)
    whole_ms = max((bar.start_ms + bar.span.ms for bar in bars), default=0.0) or 1.0
    rows = [
        [
            "  " * bar.depth + bar.span.name,
            round(bar.start_ms, 1),
            round(bar.span.ms, 1),
            bar.drawn(whole_ms, columns),
            bar.span.error or "",
        ]
        for bar in bars
    ]
    title = f"Trace {spans[0].trace_id}" if spans else "No trace"
    named = ["span", ("start", "ms"), ("length", "ms"), "", "error"]
    return Table(title, named, rows)
