"""A counter now less a counter an hour ago is what came in between."""

FAILS = {"rules_survive_restarts"}


def _sum(function, selector, window_s):
    series, span = selector.promql(), promql_time(window_s)
    return f"sum by (job) ({series} - {series} offset {span})"
