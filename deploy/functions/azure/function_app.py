"""The lesson's handler on Azure Functions: called over HTTP, or from a queue.

    python -m deploy.functions.package build/azure --python 3.13
    cp deploy/functions/azure/*.py deploy/functions/azure/host.json build/azure
    cd build/azure && func azure functionapp publish NAME --no-build

What differs from Lambda: an instance has several calls at once (host.json), which run
as threads of one process (see instance.py); a queue's message comes alone, is tried
again (maxDequeueCount) and then goes to QUEUE-poison, so that there are no partial
failures to report; nothing is frozen between calls, nor restored from a snapshot.
"""

from __future__ import annotations

import json

import azure.functions as func

from deploy.functions import instance

TIMEOUT_S = 60.0  # of a call, as functionTimeout in host.json

app = func.FunctionApp(http_auth_level=func.AuthLevel.FUNCTION)


@app.function_name("answer")
@app.route(route="answer", methods=["POST"])
def answer(req: func.HttpRequest, context: func.Context) -> func.HttpResponse:
    """Answers the question in a JSON body."""
    try:
        event = req.get_json()
    except ValueError as problem:
        told = f"Expected a JSON object, found: {problem}. Send one.\n"
        return func.HttpResponse(told, status_code=400)
    result = instance.answer(event, context.invocation_id, TIMEOUT_S)
    return func.HttpResponse(
        json.dumps(result),
        status_code=400 if "error" in result else 200,
        mimetype="application/json",
    )


@app.function_name("answer_queued")
@app.queue_trigger("msg", queue_name="questions", connection="AzureWebJobsStorage")
@app.queue_output("out", queue_name="answers", connection="AzureWebJobsStorage")
def answer_queued(msg: func.QueueMessage, out: func.Out[str]) -> None:
    """Answers the question in a message; the answer becomes a message."""
    result = instance.answer(msg.get_json(), msg.id or "", TIMEOUT_S)
    out.set(json.dumps({"question": msg.id, "answer": result}))
