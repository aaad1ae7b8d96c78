"""Nobody should ever wait for a boot: one replica is always there."""

FAILS = {
    "the_lessons_day_is_cheap",
    "another_day_is_soon_and_cheap",
    "an_office_is_soon_and_cheap",
}


def policy(day, replica, whole=policy):
    return {**whole(day, replica), "min_replica_count": 1}
