"""The OpenAPI document and the server agree: schemathesis tries to tell them apart."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from model_api import create_app
from serving.settings import Settings
from tests.api_fixtures import KEY, KEYS, NAME, app, served

EVERYTHING = f"{KEY}-and-all"  # a key that opens every scope
SLOWEST_S = 60.0  # many labels for many texts, on a busy machine
ALL_KEYS = f"{KEYS},{EVERYTHING}:inference+admin"

# The key is schemathesis' to give or to leave out: it also tries without.
config = schemathesis.Config.from_dict(
    {"auth": {"openapi": {"key": {"bearer": EVERYTHING}}}}
)
document = create_app(Settings()).openapi()
for shape in ("ChatRequest", "CompletionRequest", "ClassifyRequest"):
    # Or nearly every request would end at "no such model".
    document["components"]["schemas"][shape]["properties"]["model"] = {"const": NAME}
schema = schemathesis.openapi.from_dict(document, config=config)


@pytest.fixture(scope="module")
def address():
    with served(app(api_keys=ALL_KEYS)) as url:
        yield url


@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_document_tells_the_truth(case, address):
    """Whatever is sent, the answer is one of those the document promises."""
    body = case.body
    if isinstance(body, dict) and "classify" not in case.path:  # short answers do
        if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 4:
            body["max_tokens"] = 4
        body.setdefault("max_tokens", 4)
    # Left out: what JSON schema cannot say (fields that exclude each other, a prompt's
    # length in tokens) makes some requests wrong that the document calls right.
    case.call_and_validate(
        base_url=address,
        excluded_checks=[positive_data_acceptance],
        timeout=SLOWEST_S,
    )
