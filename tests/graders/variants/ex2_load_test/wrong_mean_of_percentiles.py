"""The p99 of all is the mean of the workers' p99, interpolated as numpy does it."""

FAILS = {
    "percentile_was_measured",
    "percentile_is_of_all_values",
    "percentile_needs_values",
}


def percentile(groups, q):
    found = []
    for group in groups:
        group.sort()
        place = q / 100 * (len(group) - 1)
        low, high = math.floor(place), math.ceil(place)
        value = group[low] if group else 0.0
        found.append(value + (place - low) * (group[high] - value) if group else 0.0)
    return sum(found) / len(found)
