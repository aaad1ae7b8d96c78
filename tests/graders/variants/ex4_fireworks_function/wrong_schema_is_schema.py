"""JSON Schema is JSON Schema: a pattern and a length bound the amount.

The service refuses what it cannot enforce.
"""

FAILS = {
    "request_is_taken",
    "request_allows_entries_alone",
    "answers_are_whole",
    "survives_a_bad_day",
}


def request(note, whole=request):
    asked = whole(note)
    fields = asked["response_format"]["json_schema"]["schema"]["properties"]
    fields["amount"] = {"type": "string", "pattern": AMOUNT.pattern, "maxLength": 9}
    return asked
