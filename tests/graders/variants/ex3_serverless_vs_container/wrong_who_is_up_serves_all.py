"""Who is up serves everybody at once: a function that is warm, and a server."""

FAILS = {
    "a_sandbox_does_one_call_at_a_time",
    "the_one_used_last_is_used_next",
    "each_call_is_billed",
    "as_many_are_cold_on_the_platform",
    "a_container_lets_wait",
    "a_container_starts_once",
    "real_figures_lead_to_their_conclusion",
}


def by_function(times, each, keep_alive_s):
    gone_at, latencies = -math.inf, []
    for now in times:
        latencies.append(each.warm_s if now <= gone_at else each.cold_s)
        gone_at = max(gone_at, now + latencies[-1] + keep_alive_s)
    cold = latencies.count(each.cold_s)
    billed_s = cold * each.cold_billed_s + (len(times) - cold) * each.warm_billed_s
    return Replayed(tuple(latencies), cold, billed_s)


def by_container(times, service_s, slots, start_s):
    return Replayed((service_s,) * len(times))
