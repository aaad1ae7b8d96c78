"""The machinery of the API: everything `model_api.py` needs that is not an idea.

settings     what an operator decides, from the environment
protocol     OpenAI's dialect, the asking half: strict models of requests
answers      OpenAI's dialect, the telling half: bodies, chunks, errors
asgi         the outermost layer: request id, body limit, access metrics
limits       budgets of requests and tokens, with refunds
idempotency  the same key and body twice: one piece of work, one answer
metrics      Prometheus metrics, one registry for each app
server       uvicorn, and a stop that breaks no stream
"""
