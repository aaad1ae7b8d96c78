"""One window is one window: an hour says all, and the guard at night is for others."""

FAILS = {
    "rules_hold_in_prometheus",
    "rules_page_once",
    "rules_resolve_soon",
    "rules_sleep_at_night",
}


def rules(slo):
    found = []
    for watch in watches(slo):
        labels = {"severity": watch.severity, "slo": slo.name}
        expr = _above(slo, watch.long_s, watch.limit)
        found.append({"alert": "BudgetBurn", "expr": expr, "labels": labels})
    return found
