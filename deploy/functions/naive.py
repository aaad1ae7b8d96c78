"""The function as it is usually written: the whole service, moved into a handler.

It works, and `serverless_deployment.py` measures what it costs: each cold start imports
a web framework that no request ever reaches, checks and reads 109 MB, packs them with
as many threads as the machine has, and starts an engine for 32 callers, though a
sandbox has one. That engine's thread does not survive our snapshot, which is a
fork; SnapStart keeps a machine's whole memory, its threads included.
"""

from __future__ import annotations

from typing import Any

import models
from model_api import create_app

MODEL = models.load()
APP = create_app(model=MODEL)  # for the day when it gets an HTTP adapter


def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Answer a prompt."""
    sampling = models.Sampling(
        max_tokens=event.get("max_tokens", 64),
        temperature=event.get("temperature", 0.0),
        seed=event.get("seed"),
    )
    answer = MODEL.generate(event["prompt"], sampling)
    return {"text": answer.text, "finish_reason": answer.finish_reason}
