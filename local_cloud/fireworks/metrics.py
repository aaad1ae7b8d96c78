"""The metrics of an account's deployments, as Prometheus text.

Facts (docs.fireworks.ai/deployments/exporting-metrics): at most 6 reads a minute; what
is called `*_total:sum_by_deployment` is a rate per second over the last minute, not a
counter, so `rate()` of it is wrong. Serverless use is not in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from local_cloud.fireworks.listing import query
from local_cloud.fireworks.wire import RESOURCE_EXHAUSTED, Refusal

if TYPE_CHECKING:
    from local_cloud.fireworks.deployments import Call, Deployment
    from local_cloud.fireworks.state import State

READS, WINDOW_S = 6, 60.0
LABELS = ("base_model", "deployment", "deployment_account", "deployment_id")
BUCKETS_MS = (10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

RATES: dict[str, Callable[[Call], float]] = {
    "request_counter_total": lambda call: 1,
    "tokens_prompt_total": lambda call: call.prompt_tokens,
    "tokens_cached_prompt_total": lambda call: call.cached_tokens,
}
LATENCIES: dict[str, Callable[[Call], float]] = {
    "latency_overall_ms": lambda call: call.total_s * 1000,
    "latency_to_first_token_ms": lambda call: call.first_token_s * 1000,
}


def add_metrics(routes: APIRouter, state: State) -> None:
    """The one route; who reads more often than 6 times a minute gets 429."""

    @routes.get("/{account}/metrics")
    async def metrics(account: str, request: Request) -> Response:
        query(request)
        now = state.clock.now()
        state.scrapes = [at for at in state.scrapes if at > now - WINDOW_S]
        if len(state.scrapes) >= READS:
            raise Refusal(
                RESOURCE_EXHAUSTED,
                f"Expected at most {READS} reads of metrics a minute. Read every 60 s.",
            )
        state.scrapes.append(now)
        registry = CollectorRegistry(auto_describe=False)
        with state.lock:
            registry.register(Readings(list(state.deployments.values()), now))
            text = generate_latest(registry)
        return Response(text, media_type=CONTENT_TYPE)


class Readings(Collector):
    """The last minute of some deployments, ready to be written."""

    def __init__(self, deployments: Iterable[Deployment], now: float) -> None:
        self._rows = []
        for deployment in deployments:
            deployment.settle(now)
            if deployment.deleted_s is None:
                recent = [c for c in deployment.calls if c.at_s > now - WINDOW_S]
                self._rows.append((deployment, recent))

    def collect(self) -> Iterator[Metric]:
        for name, amount in RATES.items():
            yield self._rate(name, amount)
        yield self._errors()
        for name, amount in LATENCIES.items():
            yield self._histogram(name, amount)
        yield self._concurrent()

    def _rate(self, name: str, amount: Callable[[Call], float]) -> Metric:
        family = _family(f"{name}:sum_by_deployment", "Per second, last minute.")
        for deployment, calls in self._rows:
            family.add_metric(_labels(deployment), sum(map(amount, calls)) / WINDOW_S)
        return family

    def _errors(self) -> Metric:
        name = "requests_error_total:sum_by_deployment"
        family = _family(name, "Per second, last minute.", "http_code")
        for deployment, calls in self._rows:
            failed = [call.status for call in calls if call.status != 200]
            for status in sorted(set(failed)):
                labels = [*_labels(deployment), str(status)]
                family.add_metric(labels, failed.count(status) / WINDOW_S)
        return family

    def _histogram(self, name: str, amount: Callable[[Call], float]) -> Metric:
        family = _family(
            f"{name}_bucket:sum_by_deployment", "Per second, last minute.", "le"
        )
        for deployment, calls in self._rows:
            took = [amount(call) for call in calls if call.status == 200]
            for limit in (*BUCKETS_MS, float("inf")):
                labels = [*_labels(deployment), f"{limit:g}".replace("inf", "+Inf")]
                below = sum(value <= limit for value in took)
                family.add_metric(labels, below / WINDOW_S)
        return family

    def _concurrent(self) -> Metric:
        name = "requests_coordinator_concurrent_count:avg_by_deployment"
        family = _family(name, "Requests at once, mean of the last minute.")
        for deployment, calls in self._rows:
            busy_s = sum(call.load_s for call in calls)
            family.add_metric(_labels(deployment), busy_s / WINDOW_S)
        return family


def _family(name: str, words: str, *more: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, words, labels=[*LABELS, *more])


def _labels(deployment: Deployment) -> list[str]:
    _, account, _, name = deployment.name.split("/")
    return [deployment.fields["baseModel"], deployment.name, account, name]
