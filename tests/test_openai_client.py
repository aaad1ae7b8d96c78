"""What everyone has already: the `openai` package, against the real server."""

from __future__ import annotations

from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.api_fixtures import COLOUR, KEY, KEYS, NAME, app, served


@pytest.fixture(scope="module")
def address():
    with served(app(api_keys=KEYS)) as url:
        yield url


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]


def test_chat(client):
    answer = client.chat.completions.create(
        model=NAME, messages=COLOUR, max_completion_tokens=8, n=2, seed=1
    )
    assert len(answer.choices) == 2
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0
    again = [*COLOUR, answer.choices[0].message, {"role": "user", "content": "More?"}]
    assert client.chat.completions.create(model=NAME, messages=again, max_tokens=4)


def test_chat_streams(client):
    stream = client.chat.completions.create(
        model=NAME,
        messages=COLOUR,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=1,
    )
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens == 8
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    said = [t.token for c in chunks if c.choices for t in c.choices[0].logprobs.content]
    assert "".join(said) == text


def test_the_streaming_helper(client):
    with client.chat.completions.stream(
        model=NAME, messages=COLOUR, stop=" "
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content


class Colour(BaseModel):
    name: Literal["red", "blue"]
    warm: bool


def test_structured_output_is_parsed(client):
    answer = client.chat.completions.parse(
        model=NAME, messages=COLOUR, max_tokens=60, response_format=Colour
    )
    assert isinstance(answer.choices[0].message.parsed, Colour)


def test_tools(client):
    tool = openai.pydantic_function_tool(Colour, name="paint")
    answer = client.chat.completions.create(
        model=NAME,
        messages=COLOUR,
        max_tokens=80,
        tools=[tool],
        tool_choice="required",
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "paint"
    assert Colour.model_validate_json(call.function.arguments)


def test_completions(client):
    answer = client.completions.create(
        model=NAME, prompt=["One, two,", "The sky is"], max_tokens=4, logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    pieces = client.completions.create(
        model=NAME, prompt="One, two,", max_tokens=4, stream=True
    )
    assert "".join(p.choices[0].text for p in pieces) == answer.choices[0].text


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError),
        ({"max_tokens": 100_000}, openai.BadRequestError),
        ({"temperature": 9}, openai.UnprocessableEntityError),
    ],
)
def test_errors_have_their_types(client, options, kind):
    asked = {"model": NAME, "messages": COLOUR, **options}
    with pytest.raises(kind) as raised:
        client.chat.completions.create(**asked)
    assert raised.value.request_id
    assert raised.value.body["message"]


def test_a_wrong_key(address):
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_a_spent_budget_is_not_retried():
    with (
        served(app(api_keys=KEYS, requests_per_minute=1)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=2) as client,
    ):
        asked = {"model": NAME, "messages": COLOUR, "max_tokens": 1}
        first = client.chat.completions.with_raw_response.create(**asked)
        assert first.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError) as raised:
            client.chat.completions.create(**asked)
        assert int(raised.value.response.headers["retry-after"]) > 1
