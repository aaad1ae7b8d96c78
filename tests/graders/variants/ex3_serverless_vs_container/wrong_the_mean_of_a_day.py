"""Percentiles lie between values; and a day's bill is taken for a month's."""

FAILS = {
    "compare_tells_percentiles",
    "compare_tells_a_month",
    "compare_tells_the_break_even",
}


def compare(function, container, sizes, slo_s, whole=compare):
    from dataclasses import replace

    def between(values, q):
        ordered = sorted(values)
        at = q / 100 * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    both = {"function": function, "container": container}
    p50, p99 = (
        {name: between(side.latencies_s, q) for name, side in both.items()}
        for q in (50, 99)
    )
    told = whole(function, container, sizes, slo_s)
    calls = len(function.latencies_s)
    day = costs.lambda_cost(calls, function.billed_s, sizes.function_mb)
    usd = {**told.usd_per_month, "function": day}
    even = usd["container"] / day * calls * DAYS
    return replace(told, p50_s=p50, p99_s=p99, usd_per_month=usd, break_even=even)
