"""Asleep where an hour has fewer than twelve notes; windows of its own."""


def policy(day, replica):
    working = [hour.calls for hour in day if hour.calls >= 12]
    often = min(working) / 3600  # a second, in the quietest hour that counts
    window_s = max(300, math.ceil(5 / often))
    peak = max(working) / replica.per_hour
    return {
        "min_replica_count": 0,
        "max_replica_count": 1 + round(2 * peak),
        "autoscaling_policy": {
            "scale_to_zero_window": f"{window_s}.0s",
            "scale_up_window": "15s",
            "scale_down_window": "300s",
            "load_targets": {"default": 0.8},
        },
    }


def request(note, whole=request):
    asked = whole(note)
    form = asked["response_format"]["json_schema"]
    form["schema"] = json.loads(json.dumps(form["schema"]))
    del form["schema"]["additionalProperties"]  # the service closes it by itself
    return asked


def plan(day, note, price, replica):
    def cost(hour, n):
        room = n * replica.per_hour
        at_once = max(0, hour.calls - hour.can_wait - room)
        room = max(0, room - (hour.calls - hour.can_wait))
        later = max(0, hour.can_wait - room)
        batch = note.dollars(price, known=False, batch=True)
        known = note.dollars(price)
        tokens = at_once * known + later * min(batch, known)
        return tokens + n * replica.usd_per_hour, n

    best = [min(cost(hour, n) for n in range(40)) for hour in day]
    return Plan(tuple(n for _, n in best), math.fsum(usd for usd, _ in best))
