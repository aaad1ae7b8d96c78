"""Sandboxes take turns, so all stay warm; and they age from when a call began."""

FAILS = {"the_one_used_last_is_used_next", "a_sandbox_stays_for_a_while"}


def by_function(times, each, keep_alive_s):
    boxes = []  # (busy until, began), the one that waited longest first
    latencies = []
    for now in times:
        boxes = [box for box in boxes if now - box[1] <= keep_alive_s]
        free = [box for box in boxes if box[0] <= now]
        latencies.append(each.warm_s if free else each.cold_s)
        if free:
            boxes.remove(free[0])
        boxes.append((now + latencies[-1], now))
    cold = latencies.count(each.cold_s)
    billed_s = cold * each.cold_billed_s + (len(times) - cold) * each.warm_billed_s
    return Replayed(tuple(latencies), cold, billed_s)
