"""A counter now less a counter an hour ago is what came in between."""

FAILS = {"rules_survive_restarts"}


def _sum(function, selector, window_s):
    series = selector.promql()
    return f"sum by (job) ({series} - {series} offset {window_s:.0f}s)"
