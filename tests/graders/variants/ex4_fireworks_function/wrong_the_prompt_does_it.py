"""All is said in one prompt, the note too, and the model reads the amount by itself."""

FAILS = {"request_allows_entries_alone", "request_begins_alike"}


def request(note, whole=request):
    asked = whole(note)
    asked["messages"] = [{"role": "user", "content": f"{INSTRUCTIONS}\n{note}"}]
    fields = asked["response_format"]["json_schema"]["schema"]["properties"]
    fields["amount"] = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    return asked
