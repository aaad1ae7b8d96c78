"""Ratios of good requests recorded first, and alerts on what was recorded."""


def rules(slo):
    spans = sorted({s for w in watches(slo) for s in (w.long_s, w.short_s)})
    recorded = [
        {
            "record": f"slo:good:rate{window_s:.0f}s",
            "expr": _good(slo, window_s),
            "labels": {"slo": slo.name},
        }
        for window_s in spans
    ]
    alerts = [
        {
            "alert": "BudgetBurn",
            "expr": " or ".join(_pair(slo, w) for w in watches(slo) if w.severity == s),
            "for": "1m",
            "labels": {"slo": slo.name, "severity": s},
        }
        for s in ("ticket", "page")
    ]
    return [*recorded, *alerts]


def _pair(slo, watch):
    below = [
        f'slo:good:rate{s:.0f}s{{slo="{slo.name}"}} < {1 - watch.limit:.9f}'
        for s in (watch.short_s, watch.long_s)
    ]
    least = f"({_sum('increase', slo.total, watch.long_s)} > {LEAST - 0.5})"
    return f"({' and on (job) '.join([*below, least])})"


def _good(slo, window_s):
    total = _sum("rate", slo.total, window_s)
    if slo.good:
        return f"{_sum('rate', slo.good, window_s)} / {total}"
    return f"({total} - {_sum('rate', slo.bad, window_s)}) / {total}"
