"""A fleet takes what its replicas can serve; new ones end all pain when they come."""

FAILS = {
    "capacity_is_the_largest_rate",
    "capacity_refuses_nonsense",
    "hurts_until_the_queue_is_gone",
    "hurts_never_or_for_ever",
}


def capacity(replicas, service_s, wait_s):
    return 0.7 * replicas / service_s if service_s else math.inf


def hurts_s(rate, before, after, cold_s):
    return cold_s if rate > before else 0.0
