"""Latency begins when the request is sent: before that nobody waits."""

FAILS = {"fire_counts_from_due"}


async def fire(send, due):
    start = time.perf_counter()

    async def one(number, due_s):
        await asyncio.sleep(start + due_s - time.perf_counter())
        sent = time.perf_counter()
        try:
            await send(number)
            ok = True
        except ConnectionError:
            ok = False
        return Sample(due_s, due_s + time.perf_counter() - sent, ok)

    return await asyncio.gather(*(one(i, at) for i, at in enumerate(due)))
