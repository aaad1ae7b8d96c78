"""Arrivals drawn as a number and places, routes asked in parallel, rates bisected."""


def schedule(rate_per_s, duration_s, seed):
    # Given their number, Poisson arrivals are uniform; the number is itself random.
    draw = random.Random(seed)
    count, total = 0, draw.expovariate(rate_per_s)
    while total < duration_s:
        count, total = count + 1, total + draw.expovariate(rate_per_s)
    return sorted(draw.uniform(0, duration_s) for _ in range(count))


async def find_bottleneck(ask, routes):
    async def pain(route, rate):
        samples = await fire(lambda _: ask(route), schedule(rate, 0.6, seed=3))
        return percentile([[s.latency_s if s.ok else 9.0 for s in samples]], 80)

    # All routes at a time: they share nothing but the machine.
    calm = await asyncio.gather(*(pain(route, 8.0) for route in routes))
    loaded = await asyncio.gather(*(pain(route, 100.0) for route in routes))
    worse = [b / a for a, b in zip(calm, loaded, strict=True)]
    route = routes[worse.index(max(worse))]
    low, high = 22.0, 100.0
    for _ in range(3):
        middle = (low * high) ** 0.5
        if await pain(route, middle) < 0.07:
            low = middle
        else:
            high = middle
    return Bottleneck(route, low)
