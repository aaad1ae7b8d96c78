"""The machinery of the API: everything `model_api.py` needs that is not an idea.

settings     what an operator decides, from the environment
service      what the routes share; the model's coming and going
asgi         the outermost layer: request id, body limit, access metrics
protocol     OpenAI's dialect, the asking half: strict models of requests
answers      OpenAI's dialect, the telling half: bodies and chunks
errors       a refusal or a failure, in the one envelope
contract     what /openapi.json promises, key scopes included
plan         from a request to token ids, sampling and a writer
generate     from the engine's streams to the wire
wire         sending in time, and remembering for replays
limits       budgets of requests and tokens, with refunds
idempotency  the same key and body twice: one piece of work, one answer
metrics      Prometheus metrics, one registry for each app
telemetry    where traces and logs take hold, if there are any
pages        the chat at / and the reference at /docs
server       uvicorn, and a stop that breaks no stream
trials       what the lesson's demonstrations do to a server
"""
