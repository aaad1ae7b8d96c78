"""A fault is found when the window is full of it, and all days are alike."""

FAILS = {
    "detection_counts_what_burns_already",
    "detection_is_now_or_never",
    "budget_weighs_days_by_requests",
    "budget_can_be_whole_or_overdrawn",
}


def detection_s(slo, share, already=0.0):
    return min(w.long_s * w.limit / share for w in watches(slo))


def budget_left(slo, days):
    shares = [bad / requests for requests, bad in days if requests]
    spent = sum(shares) / len(shares) / slo.budget if shares else 1.0
    return max(0.0, 1 - spent)
