"""Medians by sorting, the choice by rules, reasons as a list made a set."""


def typical(calls):
    def middle(values):
        ordered = sorted(values)
        n = len(ordered)
        return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2000

    kinds = {True: [], False: []}
    for call in calls:
        kinds[call.cold].append(call)
    if not all(kinds.values()):
        raise ValueError("cold and warm calls are needed")
    waits = {cold: middle(c.total_ms for c in some) for cold, some in kinds.items()}
    billed = {cold: middle(c.billed_ms for c in some) for cold, some in kinds.items()}
    return Typical(waits[True], waits[False], billed[True], billed[False])


def compare(function, container, sizes, slo_s, whole=compare):
    told = whole(function, container, sizes, slo_s)
    usd, reasons = told.usd_per_month, []
    good = {name: told.p99_s[name] <= slo_s for name in ("function", "container")}
    reasons += [f"the {name} is too slow" for name in good if not good[name]]
    names = sorted(usd, key=usd.get)
    reasons.append(f"the {names[0]} costs less")
    choice = next((name for name in names if good[name]), None)
    a_call = usd["function"] / (DAYS * len(function.latencies_s))
    even = usd["container"] / a_call
    return Comparison(told.p50_s, told.p99_s, dict(usd), even, choice, set(reasons))
