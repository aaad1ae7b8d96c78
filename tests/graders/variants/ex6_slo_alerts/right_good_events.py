"""Good events counted instead of bad ones, and increases instead of rates."""


def objectives():
    route = {"route": "/v1/embeddings"}
    good = Selector("gateway_requests_total", {"code": "~[1-4]..", **route})
    whole = Selector("gateway_seconds_bucket", {"le": "+Inf", **route})
    return [
        SLO(
            "fast",
            0.98,
            "within half a second",
            total=whole,
            good=Selector("gateway_seconds_bucket", {"le": "0.5", **route}),
            period_s=28 * DAY_S,
        ),
        SLO(
            "answers",
            0.995,
            "answered",
            total=Selector("gateway_requests_total", route),
            good=good,
            period_s=28 * DAY_S,
        ),
    ]


def _above(slo, window_s, limit):
    total = _sum("increase", slo.total, window_s)
    if slo.good:
        return f"({total} - {_sum('increase', slo.good, window_s)}) > {limit} * {total}"
    return f"{_sum('increase', slo.bad, window_s)} > {limit} * {total}"


def detection_s(slo, share, already=0.0):
    found = math.inf
    for spend in SPENDS:
        spent = spend.share * slo.period_s * slo.budget  # seconds of failing
        limit = spent / spend.within_s
        if spend.severity == "page" and already > limit:
            return 0
        if spend.severity == "page" and share > limit:
            part = (spent - already * spend.within_s) / (share - already)
            found = min(found, part)
    return found


def budget_left(slo, days):
    allowed = spent = 0.0
    for requests, bad in list(reversed(days))[:28]:
        allowed += requests * (1 - slo.objective)
        spent += bad
    return (allowed - spent) / allowed if allowed else 1


def receiver(alert, firing):
    if alert["alertname"] == "Watchdog":
        return "deadman"
    if alert.get("severity", "") == "ticket":
        page = {**alert, "severity": "page"}
        return None if page in firing else "tracker"
    return "pager"
