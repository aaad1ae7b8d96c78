"""The platform's log tells the cold start: its init duration. And init is free."""

FAILS = {
    "typical_tells_cold_from_warm",
    "typical_knows_what_is_billed",
    "typical_is_what_was_measured",
    "real_figures_lead_to_their_conclusion",
}


def typical(calls, whole=typical):
    each = whole(calls)
    init_s = statistics.median(call.ready_ms for call in calls if call.cold) / 1000
    return Typical(init_s, each.warm_s, each.cold_billed_s - init_s, each.warm_billed_s)
