"""Five minutes are enough to see a fault: the long window only makes it late."""

FAILS = {
    "rules_hold_in_prometheus",
    "rules_open_tickets",
    "rules_page_in_time",
    "rules_page_once",
    "rules_resolve_soon",
    "rules_sleep_at_night",
    "rules_stay_silent_on_a_blip",
    "rules_survive_restarts",
}


def rules(slo):
    found = []
    for watch in watches(slo):
        labels = {"severity": watch.severity, "slo": slo.name}
        expr = _above(slo, watch.short_s, watch.limit)
        found.append({"alert": "BudgetBurn", "expr": expr, "labels": labels})
    return found
