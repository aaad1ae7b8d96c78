"""What the API tells Prometheus. Each app has its own registry; nothing is global.

Names and buckets follow OpenTelemetry's conventions for generative AI (dots become
underscores, the unit is appended), so that a dashboard for one server fits another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics

from serving.telemetry import Exemplar

if TYPE_CHECKING:
    from models.engine import Snapshot

REQUEST_S = [0.01 * 2**i for i in range(14)]  # 10 ms to 82 s
FIRST_TOKEN_S = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,
    0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
]  # fmt: skip
# A token that never came, beyond the last edge. Not infinity: no sum, and so no mean,
# would ever recover from it.
NEVER_S = 2 * FIRST_TOKEN_S[-1]
PER_TOKEN_S = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5]
REFUSALS = ("requests_per_minute", "tokens_per_minute", "overloaded", "invalid_api_key")
WORK = ("/v1/chat/completions", "/v1/completions", "/v1/classify")  # in objectives
# How they end, as far as a burst of it must be seen from its first. All others are rare
# mistakes of callers; each one more here is 50 lines of every scrape.
STATUSES = (200, 422, 429, 499, 500, 503, 504)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = openmetrics.CONTENT_TYPE_LATEST


class Metrics:
    """The metrics of one app."""

    def __init__(self, model: str, snapshot: Callable[[], Snapshot | None]):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(EngineCollector(snapshot))  # type: ignore[arg-type]
        clock = Gauge("host_clock_seconds", "The wall clock.", registry=registry)
        clock.set_function(time.time)  # Prometheus compares it with its own
        since = time.time() - time.monotonic()
        text = "By how much the wall clock was set since the start."
        offset = Gauge("host_clock_offset_seconds", text, registry=registry)
        offset.set_function(lambda: time.time() - time.monotonic() - since)
        self.http = Histogram(
            "http_server_request_duration_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ["http_route", "http_request_method", "http_response_status_code"],
            buckets=REQUEST_S,
            registry=registry,
        )
        # Children with known labels are made now: a counter that first appears with
        # its first increment hides that increment from rate().
        self.duration = self._histogram("request_duration", REQUEST_S, model)
        self.first_token = self._histogram("time_to_first_token", FIRST_TOKEN_S, model)
        self.per_token = self._histogram("time_per_output_token", PER_TOKEN_S, model)
        self.tokens = Counter(
            "gen_ai_server_tokens",
            "Tokens read (input) and written (output).",
            ["gen_ai_request_model", "gen_ai_token_type"],
            registry=registry,
        )
        self.input_tokens = self.tokens.labels(model, "input")
        self.output_tokens = self.tokens.labels(model, "output")
        self.refused = Counter(
            "gen_ai_server_refused_requests",
            "Requests refused before any work, by reason.",
            ["reason"],
            registry=registry,
        )
        for reason in REFUSALS:
            self.refused.labels(reason)
        # Who is told the tokens of each prompt: the distribution may drift.
        self.on_prompt: list[Callable[[float], None]] = []
        self.cancelled = Counter(
            "gen_ai_server_cancelled_requests",
            "Requests whose client left or stopped reading.",
            registry=registry,
        )
        self._routes: dict[tuple[str, str, int], Any] = {
            (route, "POST", status): self.http.labels(route, "POST", str(status))
            for route in WORK
            for status in STATUSES
        }

    def _histogram(self, name: str, buckets: list[float], model: str) -> Any:
        histogram = Histogram(
            f"gen_ai_server_{name}_seconds",
            f"{name.replace('_', ' ').capitalize()} of one generation.",
            ["gen_ai_request_model"],
            buckets=buckets,
            registry=self.registry,
        )
        return histogram.labels(model)

    def finished(
        self,
        route: str,
        method: str,
        status: int,
        seconds: float,
        exemplar: Exemplar = None,
    ) -> None:
        """Count one HTTP exchange; the child is remembered, `labels()` costs more."""
        name = (route, method, status)
        child = self._routes.get(name)
        if child is None:
            child = self._routes[name] = self.http.labels(route, method, str(status))
        child.observe(seconds, exemplar)

    def refuse(self, code: str | None) -> None:
        """Count a request that was turned away while nothing was wrong with it."""
        if code in REFUSALS:
            self.refused.labels(code).inc()

    def first(self, seconds: float, exemplar: Exemplar = None) -> None:
        """Count when the first token of one answer came; NEVER_S for one without."""
        self.first_token.observe(seconds, exemplar)

    def generated(
        self,
        *,
        prompt: int,
        completion: int,
        first_s: float,
        total_s: float,
        exemplar: Exemplar = None,
    ) -> None:
        """Count one generation that reached its end."""
        self.input_tokens.inc(prompt)
        for tell in self.on_prompt:
            tell(prompt)
        self.output_tokens.inc(completion)
        self.duration.observe(total_s, exemplar)
        if completion > 1:
            per_token_s = (total_s - first_s) / (completion - 1)
            self.per_token.observe(per_token_s, exemplar)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """What Prometheus scrapes, and its type: exemplars are for who can read them.

        Prometheus says that it can. Whoever asks for nothing gets the older text.
        """
        if "application/openmetrics-text" in accept:
            # All names are plain, so these are the same bytes as by default, without a
            # look at every letter of every name: that would be half of a scrape.
            told = openmetrics.generate_latest(self.registry, openmetrics.ALLOWUTF8)
            return told, OPENMETRICS_TYPE
        return generate_latest(self.registry), CONTENT_TYPE


class EngineCollector:
    """Reads the engine at scrape time, so that gauges are never stale."""

    def __init__(self, snapshot: Callable[[], Snapshot | None]):
        self.snapshot = snapshot

    def collect(self) -> Iterable[Any]:
        now = self.snapshot()
        if now is None:
            return
        for name, value, text in (
            ("rows", now.rows, "Answers the engine can decode at once."),
            ("active_rows", now.active, "Answers being decoded."),
            ("queued_requests", now.queued, "Answers waiting for a row."),
            (
                "queued_prompt_tokens",
                now.queued_prompt_tokens,
                "Prompt tokens waiting.",
            ),
            (
                "stalled_seconds",
                now.stalled_s,
                "Since the last step, if work is there.",
            ),
            ("decode_tokens_per_second", now.decode_tokens_per_s, "Recent rate."),
            ("prefill_tokens_per_second", now.prefill_tokens_per_s, "Recent rate."),
        ):
            yield GaugeMetricFamily(f"engine_{name}", text, value)
        for name, value, text in (
            ("steps", now.steps, "Steps of the engine."),
            ("prompt_tokens", now.prompt_tokens, "Prompt tokens taken in."),
            ("cached_tokens", now.cached_tokens, "Prompt tokens found in the cache."),
            ("generated_tokens", now.generated_tokens, "Tokens written."),
        ):
            yield CounterMetricFamily(f"engine_{name}", text, value)
        ends = CounterMetricFamily("engine_finished", "Ends.", labels=["reason"])
        for reason in ("stop", "length", "cancelled", "deadline", "error"):
            ends.add_metric([reason], now.finished.get(reason, 0))
        yield ends
