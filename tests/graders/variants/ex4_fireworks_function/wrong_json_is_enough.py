"""What parses is an answer: the form was enforced, so it need not be checked."""

FAILS = {"entry_never_pays_twice", "entry_believes_nobody"}


def _read(note, reply):
    try:
        return json.loads(reply.text)
    except ValueError:
        return None
