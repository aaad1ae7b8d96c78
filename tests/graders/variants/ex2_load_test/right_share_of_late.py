"""Tasks in a group, a rank without rounding, the share of requests that are bad."""


def schedule(rate_per_s, duration_s, seed):
    draw = random.Random(seed)

    def moments():
        now = 0.0
        while True:
            now -= math.log(1.0 - draw.random()) / rate_per_s
            if now >= duration_s:
                return
            yield now

    return list(moments())


async def fire(send, due):
    start = asyncio.get_running_loop().time()
    samples = [None] * len(due)

    async def one(number):
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, due[number] - (loop.time() - start)))
        failed = False
        try:
            await send(number)
        except ConnectionError:
            failed = True
        samples[number] = Sample(due[number], loop.time() - start, not failed)

    async with asyncio.TaskGroup() as group:
        for number in range(len(due)):
            group.create_task(one(number))
    return samples


def percentile(groups, q):
    values = []
    for group in groups:
        values.extend(group)
    values.sort()
    for rank, value in enumerate(values, 1):
        if rank * 100 >= q * len(values):
            return value
    raise ValueError("nothing was measured")


async def find_bottleneck(ask, routes):
    async def bad(route, rate):
        samples = await fire(lambda _: ask(route), schedule(rate, 0.6, seed=7))
        late = [s for s in samples if not s.ok or s.latency_s > 0.15]
        return len(late) / len(samples)

    shares = {route: await bad(route, 100.0) for route in routes}
    found = max(shares, key=shares.get)
    rate = 80.0
    while rate > 25.0 and await bad(found, rate) > 0.1:
        rate /= 1.5
    return Bottleneck(found, rate)
