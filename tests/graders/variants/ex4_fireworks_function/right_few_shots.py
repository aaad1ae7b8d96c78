"""Examples as turns, consts for enums; waits with jitter; rent where one more earns."""

import random

SHOTS = (
    (
        "Train to Ulm 39.00, I paid",
        '{"category":"travel","amount":"39.00","mine":true}',
    ),
    ("Lunch, firm's card", '{"category":"meals","amount":null,"mine":false}'),
)


def request(note, whole=request):
    asked = whole(note)
    messages = [{"role": "system", "content": "Make an entry of the note, in JSON."}]
    for said, told in SHOTS:
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": told})
    asked["messages"] = [*messages, {"role": "user", "content": f"Note: {note}"}]
    amounts = AMOUNT.findall(note)
    fields = asked["response_format"]["json_schema"]["schema"]["properties"]
    fields["amount"] = (
        {"anyOf": [{"const": amount} for amount in dict.fromkeys(amounts)]}
        if amounts
        else {"type": "null"}
    )
    return asked | {"max_tokens": 48}


def entry(note, ask, sleep):
    asked, left_s, next_s = request(note), PATIENCE_S, 4.0
    while True:
        reply = ask(MODEL, asked)
        if reply.status not in (429, 503):
            break
        wait_s = reply.retry_after_s
        if wait_s is None:
            wait_s = next_s * random.uniform(1.0, 1.2)
            next_s = 3 * wait_s
        left_s -= wait_s
        if left_s < 0:
            break
        sleep(wait_s)
    if reply.status // 100 == 4 and reply.status != 429:
        raise ValueError(reply.status)
    answers = (made() for made in (lambda: reply, lambda: ask(FALLBACK, asked)))
    good = (found for found in (_read(note, x) for x in answers) if found is not None)
    return next(good, None)


def plan(day, note, price, replica):
    now = note.dollars(price)
    later = min(now, note.dollars(price, known=False, batch=True))
    replicas, usd = [], 0.0
    for hour in day:
        left = {now: hour.calls - hour.can_wait}
        left[later] = left.get(later, 0) + hour.can_wait
        count = 0
        while True:
            room, saved, rest = replica.per_hour, 0.0, dict(left)
            for each in sorted(rest, reverse=True):
                done = min(room, rest[each])
                room, saved = room - done, saved + done * each
                rest[each] -= done
            if saved <= replica.usd_per_hour:
                break
            left, count = rest, count + 1
        replicas.append(count)
        usd += count * replica.usd_per_hour + sum(k * n for k, n in left.items())
    return Plan(tuple(replicas), usd)
