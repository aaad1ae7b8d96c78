"""Only what is known is sent on; any page is a reason to withhold any ticket."""

FAILS = {
    "receiver_always_has_somebody",
    "receiver_withholds_the_ticket_of_a_page",
}


def receiver(alert, firing):
    severity = alert.get("severity")
    if severity == "ticket" and any(a.get("severity") == "page" for a in firing):
        return None
    return {"page": "pager", "ticket": "tracker", "none": "deadman"}.get(severity)
