"""The burns are those of the book, 14.4 and so on, whatever the period and the budget.

Thus the objective that could never page under the exercise's own is accepted, too.
"""

FAILS = {
    "detection_counts_what_burns_already",
    "detection_is_now_or_never",
    "rules_hold_in_prometheus",
    "rules_open_tickets",
    "rules_page_in_time",
    "rules_refuse_what_never_fires",
    "rules_resolve_soon",
    "rules_sleep_at_night",
    "rules_stay_silent_on_a_blip",
    "rules_survive_restarts",
}

BURNS = {HOUR_S: 14.4, 6 * HOUR_S: 6.0, DAY_S: 3.0}


def watches(slo):
    limits = {s.within_s: BURNS[s.within_s] * slo.budget for s in SPENDS}
    return [Watch(s.severity, limits[s.within_s], s.within_s) for s in SPENDS]
