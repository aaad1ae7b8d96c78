"""Results are what was answered, in the order of the answers: a failure is none."""

FAILS = {"fire_keeps_failures", "fire_keeps_the_order"}


async def fire(send, due):
    start, samples = time.perf_counter(), []

    async def one(number, due_s):
        await asyncio.sleep(start + due_s - time.perf_counter())
        await send(number)
        samples.append(Sample(due_s, time.perf_counter() - start, True))

    tasks = [one(number, due_s) for number, due_s in enumerate(due)]
    await asyncio.gather(*tasks, return_exceptions=True)
    return samples
