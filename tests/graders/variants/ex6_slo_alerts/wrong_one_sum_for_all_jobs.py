"""The users see one service, so all jobs are one sum."""

FAILS = {"rules_keep_jobs_apart"}


def _sum(function, selector, window_s):
    return f"sum({function}({selector.promql()}[{window_s:.0f}s]))"
