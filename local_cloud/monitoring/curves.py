"""PromQL for the curves of a dashboard: one job's series, added up to one number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from local_cloud.monitoring.objectives import Selector

SHARES = {"median": 0.5, "99th percentile": 0.99}


@dataclass(frozen=True)
class Curves:
    """What is asked of one job; rates are over `span`, in Prometheus' words."""

    job: str
    span: str

    def now(self, metric: str) -> str:
        """The value of a gauge."""
        return f"sum({self._of(metric)})"

    def rate(
        self, metric: str, matchers: Mapping[str, str] | None = None, by: str = ""
    ) -> str:
        """How fast a counter grows, a second."""
        return f"sum{by}(rate({self._of(metric, matchers)}[{self.span}]))"

    def quantiles(self, histogram: str) -> dict[str, str]:
        """A curve for each of `SHARES`, by its legend."""
        buckets = self.rate(f"{histogram}_bucket", by=" by (le) ")
        return {k: f"histogram_quantile({q}, {buckets})" for k, q in SHARES.items()}

    def _of(self, metric: str, matchers: Mapping[str, str] | None = None) -> str:
        return Selector(metric, {"job": self.job, **(matchers or {})}).promql()
