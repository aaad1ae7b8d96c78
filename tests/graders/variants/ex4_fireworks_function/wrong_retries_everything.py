"""What failed is tried again, five times, whatever it was."""

FAILS = {
    "entry_has_patience_to_an_end",
    "entry_never_pays_twice",
    "entry_tells_its_own_mistakes",
    "entry_believes_nobody",
    "survives_a_bad_day",
}


def entry(note, ask, sleep):
    for wait_s in (2.0, 4.0, 8.0, 16.0, 32.0):
        reply = ask(MODEL, request(note))
        if (found := _read(note, reply)) is not None:
            return found
        sleep(reply.retry_after_s or wait_s)
    return _read(note, ask(FALLBACK, request(note)))
