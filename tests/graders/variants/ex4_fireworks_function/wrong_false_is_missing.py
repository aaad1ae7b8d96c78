"""A field that is false or null was forgotten, so somebody else is asked."""

FAILS = {"entry_reads_a_good_answer"}


def _read(note, reply, whole=_read):
    found = whole(note, reply)
    return found if found and all(found.values()) else None
