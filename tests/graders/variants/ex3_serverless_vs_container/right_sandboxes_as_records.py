"""Sandboxes as records that are searched; slots as a list; percentiles by rank."""


def by_function(times, each, keep_alive_s):
    ends, latencies, billed = [], [], []
    for now in times:
        there = [end for end in ends if end <= now <= end + keep_alive_s]
        if there:
            ends.remove(max(there))
            took, cost = each.warm_s, each.warm_billed_s
        else:
            took, cost = each.cold_s, each.cold_billed_s
        ends = [end for end in ends if now <= end + keep_alive_s] + [now + took]
        latencies.append(took)
        billed.append(cost)
    cold = sum(took is each.cold_s for took in latencies)
    return Replayed(tuple(latencies), cold, math.fsum(billed))


def by_container(times, service_s, slots, start_s):
    free, waits = [start_s] * slots, []
    for came in times:
        slot = free.index(min(free))
        free[slot] = max(free[slot], came) + service_s
        waits.append(free[slot] - came)
    return Replayed(tuple(waits))


def _percentile(values, q):
    ranked = enumerate(sorted(values), start=1)
    return next(x for rank, x in ranked if 100 * rank >= q * len(values))
