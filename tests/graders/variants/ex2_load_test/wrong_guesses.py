"""The first route is as good a guess as any, and 30 a second is what servers bear."""

FAILS = {
    "finds_the_route_that_queues",
    "finds_the_route_that_refuses",
    "tells_what_the_route_sustains",
}


async def find_bottleneck(ask, routes):
    return Bottleneck(routes[0], 30.0)
