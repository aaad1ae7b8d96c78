"""The first call is the cold one, and the others are warm; the mean will do."""

FAILS = {
    "typical_tells_cold_from_warm",
    "typical_knows_what_is_billed",
    "typical_needs_both_kinds",
}


def typical(calls):
    first, *others = calls
    warm_s = statistics.mean(call.total_ms for call in others) / 1000
    billed_s = statistics.mean(call.billed_ms for call in others) / 1000
    return Typical(first.total_ms / 1000, warm_s, first.billed_ms / 1000, billed_s)
