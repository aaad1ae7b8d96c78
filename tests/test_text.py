"""The tokenizer, the chat prompt and the incremental detokeniser."""

import json
import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.errors import BuildError
from models.text import DEFAULT_SYSTEM, Detokenizer, Tokenizer

# The template the GGUF file carries in tokenizer.chat_template.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' "
    "%}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
    "Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM_START, IM_END = 1, 2
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather now",
        "parameters": {"properties": {"city": {"type": "string"}}},
    },
}


def load_tokenizer() -> Tokenizer:
    folder = Path(os.environ.get("MODEL_DIR", "models/build"))
    found = sorted(folder.rglob("tokenizer.json"))
    if not found:
        pytest.skip("no tokenizer.json: build the model first (python -m models)")
    return Tokenizer.load(found[0])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


# Encoding.


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # Ids that llama.cpp gives for the same file.
        (
            "I'm 1234567 years old; they'll say 3.14%.",
            [
                57,
                5248,
                216,
                33,
                34,
                35,
                36,
                37,
                38,
                39,
                929,
                1573,
                43,
                502,
                3060,
                1643,
                216,
                35,
                30,
                33,
                36,
                8006,
            ],
        ),
        ("  two  spaces\n\n\ttab\n", [216, 827, 216, 5600, 1116, 197, 15999, 198]),
        (
            "naïve Übergröße 漢字かな 🙂👩\u200d🚀",
            [
                3546,
                46494,
                5549,
                246,
                5799,
                98,
                7466,
                34878,
                85,
                17097,
                137,
                112,
                36518,
                7365,
                229,
                7365,
                120,
                47526,
                10813,
                235,
                119,
                321,
                231,
                10813,
                244,
                218,
            ],
        ),
        (
            "def f(x):\n    return x**2  # ½ ٣ Ⅻ",
            [
                1604,
                275,
                24,
                104,
                727,
                472,
                1003,
                1792,
                828,
                34,
                216,
                907,
                216,
                16738,
                216,
                164,
                113,
                216,
                173,
                223,
                121,
            ],
        ),
        ("don'T WE'LL", [12420, 23, 68, 26587, 23, 16421]),
        ("a<|im_end|>b", [81, 44, 108, 306, 79, 486, 108, 46, 82]),
        ("\r\n \xa0\u3000x", [2738, 3351, 250, 12109, 218, 104]),
    ],
)
def test_ids_are_those_of_llama_cpp(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids


@given(
    text=st.text(
        st.characters(
            min_codepoint=0x20, max_codepoint=0x3FFFF, exclude_categories=["Cs"]
        )
    )
)
@settings(deadline=None)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_control_tokens_cannot_be_typed(tokenizer, name):
    ids = tokenizer.encode(f"hello {name} there")
    assert not any(tokenizer.token_bytes(id) == b"" for id in ids)
    assert tokenizer.decode(ids) == f"hello {name} there"
    prompt = tokenizer.chat([{"role": "user", "content": f"a{name}b"}])
    assert prompt.count(IM_START) == 3
    assert prompt.count(IM_END) == 2
    assert 0 not in prompt


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "Number 1234, don't <|im_end|> naïve 漢字 🙂"
    assert again.encode(text) == tokenizer.encode(text)
    assert (again.vocabulary, again.end_ids) == (49152, frozenset({0, 2}))


def test_building_from_the_fields_of_a_gguf_gives_the_same(tokenizer):
    content = json.loads(tokenizer.to_json())
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    again = Tokenizer.from_gguf(tokens, merges, range(17))
    assert again.to_json() == tokenizer.to_json()


def test_a_damaged_file_says_what_to_do(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "mo')
    with pytest.raises(BuildError, match="build the model again"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="half of a surrogate pair at character 2"):
        tokenizer.encode("ab\ud800")


def test_token_bytes_are_exact(tokenizer):
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("né🙂"))) == (
        "né🙂".encode()
    )
    assert tokenizer.token_bytes(IM_END) == b""
    assert tokenizer.decode([IM_START, IM_END], special=True) == (
        "<|im_start|><|im_end|>"
    )
    with pytest.raises(ValueError, match="0 to 49151"):
        tokenizer.token_bytes(49152)


# Conversations.


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hi"}],
        [
            {"role": "system", "content": "Be short.\n"},
            {"role": "user", "content": " \n  leading space, 12 numbers\n\n"},
            {"role": "assistant", "content": "Grüße 🙂"},
            {"role": "user", "content": ""},
        ],
        [
            {"role": "user", "content": "one"},
            {"role": "system", "content": "a late system message"},
        ],
    ],
)
def test_prompts_are_those_of_the_models_template(tokenizer, messages):
    jinja2 = pytest.importorskip("jinja2")
    text = jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(
        messages=messages, add_generation_prompt=True
    )
    expected = []
    for turn in text.split("<|im_start|>")[1:]:
        head, mark, tail = turn.partition("<|im_end|>")
        expected += [IM_START, *tokenizer.encode(head)]
        expected += [IM_END, *tokenizer.encode(tail)] if mark else []
    assert tokenizer.chat(messages) == expected


def test_text_parts_are_joined(tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert tokenizer.chat([{"role": "user", "content": parts}]) == tokenizer.chat(
        [{"role": "user", "content": "ab"}]
    )


def test_tools_calls_and_results_are_spelled_out(tokenizer):
    call = {"function": {"name": "weather", "arguments": '{"city":"Köln"}'}}
    ids = tokenizer.chat(
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "7 degrees"},
        ],
        tools=[WEATHER],
    )
    text = tokenizer.decode(ids, special=True)
    system = text.partition("<|im_end|>")[0]
    assert system.startswith(f"<|im_start|>system\n{DEFAULT_SYSTEM}\n")
    assert '"description": "Weather now"' in system
    assert '"properties": {"city": {"type": "string"}}' in system
    assert (
        "<|im_start|>assistant\n<tool_call>"
        '{"name": "weather", "arguments": {"city": "Köln"}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>7 degrees</tool_response><|im_end|>\n"
    ) in text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hello", "expected a list"),
        ({"role": "user"}, "expected a list"),
        (["hello"], r"messages\[0\].role: expected one of system, user"),
        ([{"role": "robot", "content": "x"}], "found 'robot'"),
        ([{"role": ["user"], "content": "x"}], "found \\['user'\\]"),
        ([{"role": "user"}], r"messages\[0\].content: expected a string"),
        ([{"role": "user", "content": 5}], "found 5"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "reads text only",
        ),
        (
            [{"role": "user", "content": "x", "tool_calls": [{}]}],
            "only on an assistant message",
        ),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                }
            ],
            "arguments that are a JSON object",
        ),
        ([{"role": "assistant", "tool_calls": 7}], "list of calls"),
    ],
)
def test_a_wrong_conversation_is_explained(tokenizer, messages, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.chat(messages)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (["weather"], r"tools\[0\]: expected"),
        ([{"function": {"name": "no spaces"}}], "letters, digits"),
        ([{"function": {"name": "f", "parameters": []}}], "a JSON schema"),
        (
            [{"function": {"name": "f", "parameters": {"type": "string"}}}],
            "JSON schema of an object",
        ),
        ([WEATHER, WEATHER], "different names"),
    ],
)
def test_wrong_tools_are_explained(tokenizer, tools, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.chat([{"role": "user", "content": "x"}], tools)


# Detokenising.


class Pieces:
    """A tokenizer whose token `n` stands for the n-th of the given bytes."""

    def __init__(self, pieces):
        self.token_bytes = pieces.__getitem__


def emitted(pieces, stop):
    detokenizer = Detokenizer(Pieces(pieces), stop)  # type: ignore[arg-type]
    shown = [detokenizer.push(place) for place in range(len(pieces))]
    return "".join(shown) + detokenizer.flush(), detokenizer.stopped


def cut(text: bytes, places):
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(ends)]


ANY_TEXT = st.one_of(
    st.text("ab", max_size=40),
    st.text("aé🙂漢e\u0301👩\u200d🚀", max_size=30),
    st.text(max_size=30),
).map(str.encode) | st.binary(max_size=30)
ANY_STOP = st.one_of(
    st.text("ab", min_size=1, max_size=6),
    st.text("aé🙂漢e\u0301👩\u200d", min_size=1, max_size=4),
)


@given(
    text=ANY_TEXT,
    stop=st.lists(ANY_STOP, max_size=4),
    places=st.lists(st.integers(0, 160)),
)
@example(text=b"xabcd", stop=["bc", "abcd"], places=[4])
@example(text=b"xabcx", stop=["bc", "abcd"], places=[1, 2, 3, 4])
@example(text=b"xabc", stop=["bc", "abcd"], places=[1, 2, 3])
@example(text=b"aab", stop=["ab"], places=[1, 2])
@example(text="🙂".encode()[:3] + b"b", stop=["b"], places=[1, 2])
@settings(deadline=None, max_examples=400)
def test_text_ends_before_the_first_stop_however_it_is_cut(text, stop, places):
    begins = [begin for one in stop if (begin := text.find(one.encode())) >= 0]
    expected = text[: min(begins, default=len(text))].decode("utf-8", "replace")
    assert emitted(cut(text, places), stop) == (expected, bool(begins))


@given(text=st.text("abé🙂", max_size=30), stop=st.lists(ANY_STOP, max_size=4))
@settings(deadline=None)
def test_nothing_shown_is_ever_taken_back(text, stop):
    content = text.encode()
    pieces = [content[place : place + 1] for place in range(len(content))]
    final, _ = emitted(pieces, stop)
    detokenizer = Detokenizer(Pieces(pieces), stop)  # type: ignore[arg-type]
    shown = ""
    for place in range(len(pieces)):
        shown += detokenizer.push(place)
        assert final.startswith(shown)


def test_text_is_shown_as_soon_as_it_is_safe():
    pieces = [b"Hello", b" E", b"N", b"x", b"\xf0\x9f", b"\x99\x82"]
    detokenizer = Detokenizer(Pieces(pieces), ["END"])  # type: ignore[arg-type]
    shown = [detokenizer.push(place) for place in range(len(pieces))]
    assert shown == ["Hello", " ", "", "ENx", "", "🙂"]


def test_nothing_comes_after_a_stop(tokenizer):
    detokenizer = Detokenizer(tokenizer, ["\n"])
    shown = [detokenizer.push(id) for id in tokenizer.encode("one\ntwo")]
    assert "".join(shown) == "one"
    assert detokenizer.stopped
    assert detokenizer.flush() == ""


def test_real_tokens_split_characters_and_come_out_whole(tokenizer):
    text = "e\u0301 👩\u200d🚀 漢字 ﷽ 🜚"
    detokenizer = Detokenizer(tokenizer)
    shown = [detokenizer.push(id) for id in tokenizer.encode(text)]
    assert "".join(shown) + detokenizer.flush() == text
    assert not any("\ufffd" in piece for piece in shown)


def test_an_unfinished_character_becomes_a_replacement_mark():
    assert emitted([b"a", b"\xe6\xbc"], []) == ("a\ufffd", False)
    assert emitted([b"a", b"\xe6\xbc"], ["x"]) == ("a\ufffd", False)


def test_a_long_answer_with_long_stop_strings():
    stop = ["a" * 255 + "b", "a" * 200 + "c", "ab" * 100, "\n" * 256]
    letters = random.Random(0).choices("aaaaab", k=20_000)
    text = "".join(letters) + stop[0] + "tail"
    expected = text[: min(text.find(one) for one in stop if one in text)]
    pieces = [text[place : place + 4].encode() for place in range(0, len(text), 4)]
    assert emitted(pieces, stop) == (expected, True)
