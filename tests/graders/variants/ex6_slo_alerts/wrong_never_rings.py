"""A quiet pager is a good pager: shares are per cent, so they are compared with 100."""

FAILS = {
    "rules_page_in_time",
    "rules_page_once",
    "rules_open_tickets",
    "rules_stay_silent_on_a_blip",
    "rules_resolve_soon",
    "rules_survive_restarts",
    "rules_sleep_at_night",
    "rules_keep_jobs_apart",
    "rules_hold_in_prometheus",
}


def rules(slo, whole=rules):
    return [{**rule, "expr": f"({rule['expr']}) > 100"} for rule in whole(slo)]
