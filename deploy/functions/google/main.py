"""The lesson's handler on Cloud Run: a CloudEvent in, a CloudEvent out.

    functions-framework --source deploy/functions/google/main.py --target answer

The other way that functions-framework offers, `@cloud_event`, answers OK and drops what
the function returns: Eventarc wants a status only. Here somebody waits for the answer.

What differs from Lambda:

- Many requests share an instance (see instance.py); containerConcurrency, THREADS and
  ROWS are the same number.
- Nothing kills a call at its deadline: Cloud Run answers 504 and lets it run on. The
  handler stops by itself, because it is told the time left.
- There are no snapshots: CPU boost and a minimum of instances take their place.
"""

from __future__ import annotations

import os

import functions_framework
from cloudevents.exceptions import GenericException
from cloudevents.http import CloudEvent, from_http, to_binary
from flask import Request

from deploy.functions import instance

TIMEOUT_S = float(os.environ.get("CLOUD_RUN_TIMEOUT_SECONDS", 60))
QUESTION, ANSWER = "course.question.v1", "course.answer.v1"

# gunicorn reads this file first and forks its worker then. No thread survives a fork,
# and the engine is one: so the worker opens it, before it takes requests.
os.register_at_fork(after_in_child=instance.initialise)


@functions_framework.http
def answer(request: Request) -> tuple[bytes | str, int, dict[str, str]]:
    """Answers the question in a CloudEvent of either mode, binary or structured."""
    try:
        event = from_http(dict(request.headers), request.get_data())
    except GenericException as problem:
        return refuse(str(problem).splitlines()[0])
    if event["type"] != QUESTION or not isinstance(event.data, dict):
        return refuse(f"{event['type']} with {type(event.data).__name__}")
    result = instance.answer(event.data, event["id"], TIMEOUT_S)
    about = {"type": ANSWER, "source": "/answer", "subject": event["id"]}
    headers, body = to_binary(CloudEvent(about, result))
    return body, 400 if "error" in result else 200, dict(headers)


def refuse(found: str) -> tuple[str, int, dict[str, str]]:
    expected = f"a CloudEvent of type {QUESTION} whose data is a JSON object"
    return f"Expected {expected}, found: {found}. Send one.\n", 400, {}
