"""Sized for the peak and no more; and paid for all day, by the hour.

It also takes every token to be new.
"""

FAILS = {
    "the_lessons_day_is_soon",
    "plan_rents_where_it_pays",
    "plan_lets_the_rest_overflow",
    "plan_bills_every_note",
}


def needed(day, replica):
    return math.ceil(max(hour.calls for hour in day) / replica.per_hour)


def policy(day, replica, whole=policy):
    return {**whole(day, replica), "max_replica_count": needed(day, replica)}


def plan(day, note, price, replica):
    by_hour = needed(day, replica) * replica.usd_per_hour * len(day)
    by_token = note.dollars(price, known=False) * sum(hour.calls for hour in day)
    if by_token < by_hour:
        return Plan((0,) * len(day), by_token)
    return Plan((needed(day, replica),) * len(day), by_hour)
