"""Whatever is not answered with 200 failed, and a second is fast enough."""

FAILS = {"objectives_count_the_right_requests", "objectives_promise_what_was_said"}


def objectives():
    route = {"route": "/v1/embeddings"}
    total = Selector("gateway_requests_total", route)
    errors = Selector("gateway_requests_total", route | {"code": "~[^2].."})
    slow = Selector("gateway_seconds_bucket", {"le": "1.0"})
    seconds = Selector("gateway_seconds_count")
    return (
        SLO("answers", 0.995, "no error", total, bad=errors),
        SLO("fast", 0.98, "fast", seconds, good=slow),
    )
