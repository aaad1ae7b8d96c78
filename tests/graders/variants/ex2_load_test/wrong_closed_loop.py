"""A load test asks, waits for the answer, and asks again."""

FAILS = {"fire_waits_for_no_answer", "fire_counts_from_due"}


async def fire(send, due):
    start, samples = time.perf_counter(), []
    for number, due_s in enumerate(due):
        await asyncio.sleep(max(0.0, start + due_s - time.perf_counter()))
        sent = time.perf_counter()
        try:
            await send(number)
            ok = True
        except ConnectionError:
            ok = False
        samples.append(Sample(due_s, due_s + time.perf_counter() - sent, ok))
    return samples
