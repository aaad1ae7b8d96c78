"""What our metrics are called elsewhere.

OpenTelemetry's conventions for generative AI name the metrics and their buckets; a
server that follows them fits every dashboard that does. Prometheus turns their dots
into underscores and appends the unit. Others had names before there were conventions.

As of 2026-11-24. The column `convention` was compared with the installed package
opentelemetry-semantic-conventions 0.66b2 (a test does so again). There all of these are
marked as moved to open-telemetry/semantic-conventions-genai: expect changes there. The
columns of other servers are from their documentation as known (vLLM: Production
Metrics; TGI: Metrics; Triton: Metrics) and were NOT compared with running servers.
"""

from __future__ import annotations

from dataclasses import dataclass

NONE = ""  # no counterpart is known


@dataclass(frozen=True)
class Name:
    """One measured thing and its names. Histograms without their suffixes."""

    what: str
    ours: str
    convention: str = NONE
    vllm: str = NONE
    tgi: str = NONE
    triton: str = NONE


NAMES = (
    Name(
        "whole request",
        "gen_ai_server_request_duration_seconds",
        "gen_ai.server.request.duration",
        "vllm:e2e_request_latency_seconds",
        "tgi_request_duration",
        "nv_inference_request_duration_us",  # a sum of microseconds: no percentiles
    ),
    Name(
        "time to the first token",
        "gen_ai_server_time_to_first_token_seconds",
        "gen_ai.server.time_to_first_token",
        "vllm:time_to_first_token_seconds",
        triton="nv_inference_first_response_histogram_ms",
    ),
    Name(
        "time a token after it",
        "gen_ai_server_time_per_output_token_seconds",
        "gen_ai.server.time_per_output_token",
        "vllm:request_time_per_output_token_seconds",
        "tgi_request_mean_time_per_token_duration",
    ),
    Name(
        "tokens read",
        'gen_ai_server_tokens_total{gen_ai_token_type="input"}',
        "gen_ai.client.token.usage",  # the conventions know it at the client alone
        "vllm:prompt_tokens_total",
        "tgi_request_input_length",
    ),
    Name(
        "tokens written",
        'gen_ai_server_tokens_total{gen_ai_token_type="output"}',
        "gen_ai.client.token.usage",
        "vllm:generation_tokens_total",
        "tgi_request_generated_tokens",
    ),
    Name(
        "HTTP requests",
        "http_server_request_duration_seconds",
        "http.server.request.duration",
        tgi="tgi_request_count",
        triton="nv_inference_request_success",
    ),
    Name(
        "requests waiting",
        "engine_queued_requests",
        vllm="vllm:num_requests_waiting",
        tgi="tgi_queue_size",
        triton="nv_inference_pending_request_count",
    ),
    Name(
        "answers being written",
        "engine_active_rows",
        vllm="vllm:num_requests_running",
        tgi="tgi_batch_current_size",
    ),
    Name(
        "ends by reason",
        "engine_finished_total",
        vllm="vllm:request_success_total",
        tgi="tgi_request_success",
    ),
    Name(
        "prompt tokens reused",
        "engine_cached_tokens_total",
        vllm="vllm:prefix_cache_hits_total",
    ),
    Name("energy", "energy_joules_total", triton="nv_energy_consumption"),
)
