"""Text to token ids, conversations to prompts, and token ids back to safe text.

The tokenizer is GPT-2 style byte-level BPE: every token stands for some bytes, and a
token may end in the middle of a character. Its seventeen control tokens (such as
`<|im_end|>`) have no bytes. They enter a prompt only by their id, never by their
spelling: a user who types `<|im_end|>` has typed ten ordinary characters.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BpeTokenizer

from models.errors import BuildError

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
ROLES = ("system", "user", "assistant", "tool")
# The tags and the JSON spacing are those the tool-call grammar forces, so that an
# answer put back into a conversation reads as the model wrote it.
TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
TOOLS_INTRO = (
    "You may call one of these functions, described by JSON schemas, to help with the "
    "user's question:\n<tools>\n"
)
TOOLS_OUTRO = (
    "\n</tools>\nTo call a function, answer with nothing but its name and arguments as "
    "JSON, like this:\n"
    '<tool_call>{"name": "function name", "arguments": {}}</tool_call>'
)
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Tokenizer:
    """The model's tokenizer. Safe to share between threads."""

    def __init__(self, bpe: BpeTokenizer) -> None:
        # Without this, spelling a control token in user text would produce it.
        bpe.encode_special_tokens = True
        self._bpe = bpe
        self.vocabulary: int = bpe.get_vocab_size()
        self._special = {
            id: token.content
            for id, token in bpe.get_added_tokens_decoder().items()
            if token.special
        }
        # Filled as tokens are met: all 49,152 would take as long as reading the file.
        self._bytes: dict[int, bytes] = dict.fromkeys(self._special, b"")
        ids = {name: id for id, name in self._special.items()}
        self._turn, self.turn_end = ids["<|im_start|>"], ids["<|im_end|>"]
        self.end_ids = frozenset({ids["<|endoftext|>"], self.turn_end})
        self._newline = self.encode("\n")
        # What most prompts begin and all end with.
        self._default_system = self.encode(f"system\n{DEFAULT_SYSTEM}")
        self._reply = [self._turn, *self.encode("assistant\n")]

    @classmethod
    def from_gguf(
        cls, tokens: Sequence[str], merges: Sequence[str], special_ids: Iterable[int]
    ) -> Tokenizer:
        """Build from a GGUF's `tokenizer.ggml.` fields; `special_ids` have type 3."""
        vocabulary = {token: id for id, token in enumerate(tokens)}
        pairs = [
            (left, right) for left, right in (merge.split(" ") for merge in merges)
        ]
        bpe = BpeTokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        # "smollm": each digit on its own, then the words of GPT-2's expression.
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens(
            [AddedToken(tokens[id], normalized=False) for id in special_ids]
        )
        return cls(bpe)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read the `tokenizer.json` that `save` wrote (takes about 0.05 s)."""
        try:
            return cls(BpeTokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing narrower
            raise BuildError(
                f"tokenizer: expected a tokenizer.json at {path}, found {error}; "
                "delete the file and build the model again"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`."""
        # Not by the library: its error on a full disk is no OSError.
        Path(path).write_text(self._bpe.to_str(pretty=True), encoding="utf-8")

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self._bpe.to_str()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, which is data: it never yields a control token.

        The vocabulary has no token for eight bytes that occur in valid UTF-8: six
        ASCII control characters and the lead bytes F1 and F2 of unassigned planes.
        They are left out.
        """
        try:
            return self._bpe.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(
                "text: expected a string of valid Unicode, found "
                f"{_unreadable(text)}; remove it or send the whole character"
            ) from error

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of `ids`; `special` spells control tokens out instead of dropping them.

        Bytes that are not UTF-8 become U+FFFD.
        """
        named = self._special if special else {}
        pieces = (
            named[id].encode() if id in named else self.token_bytes(id) for id in ids
        )
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The exact bytes token `id` stands for; empty for a control token."""
        if not 0 <= id < self.vocabulary:
            raise ValueError(
                f"token id: expected 0 to {self.vocabulary - 1}, found {id}; "
                "use ids that this tokenizer made"
            )
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = _spelling_bytes(self._bpe.id_to_token(id) or "")
        return known

    def chat(
        self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None
    ) -> list[int]:
        """Prompt ids of a conversation (ChatML), ending where the assistant speaks."""
        turns = chat_turns(messages, tools)
        ids: list[int] = []
        for turn in turns:
            ids += [self._turn, *self._turn_ids(*turn), self.turn_end, *self._newline]
        return [*ids, *self._reply]

    def _turn_ids(self, role: str, content: str) -> list[int]:
        if (role, content) == ("system", DEFAULT_SYSTEM):
            return self._default_system
        # One call for role and content: BPE may merge across the line break.
        return self.encode(f"{role}\n{content}")


def _unreadable(text: object) -> str:
    if not isinstance(text, str):
        return short(text)
    place = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    return f"half of a surrogate pair at character {place}"


def _spelling_bytes(spelling: str) -> bytes:
    return bytes(BYTE_OF_CHARACTER[character] for character in spelling)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 is itself, the rest begins at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(0x100 + place): byte for place, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


# Conversations: each message becomes one turn of (role, content).


def chat_turns(
    messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None
) -> list[tuple[str, str]]:
    """The turns of a conversation, the system message and its tools included."""
    if not messages or isinstance(messages, (str, Mapping)):
        raise ValueError(
            f"messages: expected a list with at least one message, found "
            f'{short(messages)}; send [{{"role": "user", "content": "..."}}]'
        )
    turns = [_turn(message, place) for place, message in enumerate(messages)]
    if turns[0][0] != "system":
        turns.insert(0, ("system", DEFAULT_SYSTEM))
    if tools:
        lines = "\n".join(
            json.dumps(function, ensure_ascii=False) for function in functions(tools)
        )
        system = f"{turns[0][1]}\n\n{TOOLS_INTRO}{lines}{TOOLS_OUTRO}"
        turns[0] = ("system", system)
    return turns


def _turn(message: Mapping, place: int) -> tuple[str, str]:
    where = f"messages[{place}]"
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        found = message.get("role") if isinstance(message, Mapping) else message
        raise ValueError(
            f"{where}.role: expected one of {', '.join(ROLES)}, found {short(found)}; "
            "correct the role"
        )
    role, content = message["role"], message.get("content")
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        raise ValueError(
            f"{where}.tool_calls: expected only on an assistant message, found on a "
            f"{role} message; remove it"
        )
    if calls and not isinstance(calls, (list, tuple)):
        raise ValueError(
            f"{where}.tool_calls: expected a list of calls, found {short(calls)}; "
            "send the calls as they were answered"
        )
    text = "" if content is None and calls else _content(content, f"{where}.content")
    if role == "tool":
        text = f"<tool_response>{text}</tool_response>"
    for call in calls or ():
        text += _tool_call(call, f"{where}.tool_calls")
    return role, text


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(
            f"{where}: expected a string or a list of text parts, "
            f"found {short(content)}; send the message as a string"
        )
    for part in content:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise ValueError(
                f'{where}: expected parts like {{"type": "text", "text": "..."}}, '
                f"found {short(part)}; this model reads text only"
            )
    return "".join(part["text"] for part in content)


def _tool_call(call: object, where: str) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    try:
        name, arguments = function["name"], json.loads(function["arguments"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError, RecursionError):
        name, arguments = None, None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(
            f'{where}: expected {{"function": {{"name": "...", "arguments": "{{...}}"}}'
            f"}} with arguments that are a JSON object, found {short(call)}; "
            "send the call as it was answered"
        )
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{TOOL_CALL}{body}{TOOL_CALL_END}"


def functions(tools: Sequence[Mapping]) -> list[dict]:
    """The checked functions of OpenAI-style `tools`: name, description, parameters."""
    found = [_function(tool, f"tools[{place}]") for place, tool in enumerate(tools)]
    names = [function["name"] for function in found]
    if len(set(names)) < len(names):
        raise ValueError(
            f"tools: expected different names, found {short(names)}; rename one"
        )
    return found


def _function(tool: object, where: str) -> dict:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(
            f'{where}: expected {{"type": "function", "function": {{"name": ...}}}}, '
            f"found {short(tool)}; wrap the function like this"
        )
    name, parameters = function.get("name"), function.get("parameters", {})
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise ValueError(
            f"{where}.function.name: expected 1 to 64 letters, digits, _ or -, "
            f"found {short(name)}; rename the function"
        )
    if (
        not isinstance(parameters, Mapping)
        or parameters.get("type", "object") != "object"
    ):
        raise ValueError(
            f"{where}.function.parameters: expected a JSON schema of an object, "
            f"found {short(parameters)}; describe the arguments or leave it out"
        )
    return {
        "name": name,
        "description": function.get("description") or "",
        "parameters": {"type": "object", **parameters},
    }


class Detokenizer:
    """Turns the tokens of one answer into text that is safe to show at once.

    Held back are the bytes of an incomplete character and anything that may become a
    stop string. The text ends before the first occurrence of any stop string, first by
    where it begins. The work per token depends on its own bytes alone, not on the
    answer so far.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False  # a stop string matched: nothing more will come
        self._tokenizer = tokenizer
        self._searches = [_StopSearch(string.encode()) for string in stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = bytearray()  # bytes not shown yet
        self._read = 0  # bytes read, shown and held
        self._match: int | None = None  # where the first stop string found begins

    def push(self, id: int) -> str:
        """Read one token; return the text that can be shown now, often empty."""
        piece = self._tokenizer.token_bytes(id)
        if not self._searches:
            return self._decoder.decode(piece)
        if self.stopped:
            return ""
        self._held += piece
        candidate = self._search(piece)
        if self._match is not None and candidate >= self._match:
            return self._end(self._match)
        return self._decoder.decode(self._show(candidate))

    def flush(self) -> str:
        """End the answer: what was held back, an incomplete character as U+FFFD."""
        if self.stopped:
            return ""
        if self._match is not None:
            return self._end(self._match)
        return self._decoder.decode(self._show(self._read), final=True)

    def _search(self, piece: bytes) -> int:
        """Where the earliest text begins that may still become a stop string."""
        for search in self._searches:
            begin = search.read(piece, self._read)
            # A match may have to wait: of "bc" and "abcd" in "abc", the second would
            # begin earlier, and the next byte decides.
            if begin is not None and (self._match is None or begin < self._match):
                self._match = begin
        self._read += len(piece)
        return min(self._read - search.matched for search in self._searches)

    def _show(self, end: int) -> bytes:
        """Take the held bytes up to position `end` of the answer."""
        count = end - (self._read - len(self._held))
        shown = bytes(self._held[:count])
        del self._held[:count]
        return shown

    def _end(self, end: int) -> str:
        self.stopped = True
        return self._decoder.decode(self._show(end), final=True)


class _StopSearch:
    """Knuth, Morris and Pratt's search, for bytes that arrive in pieces."""

    def __init__(self, wanted: bytes) -> None:
        self._wanted = wanted
        # _shorter[n]: length of the longest proper prefix that also ends wanted[:n]
        self._shorter = [0] * (len(wanted) + 1)
        length = 0
        for place in range(1, len(wanted)):
            while length and wanted[place] != wanted[length]:
                length = self._shorter[length]
            length += wanted[place] == wanted[length]
            self._shorter[place + 1] = length
        self.matched = 0  # how much of `wanted` the text read so far ends with

    def read(self, piece: bytes, start: int) -> int | None:
        """Read `piece`, found at `start`; where the string begins once it is found."""
        wanted, shorter, matched = self._wanted, self._shorter, self.matched
        for place, byte in enumerate(piece):
            while matched and byte != wanted[matched]:
                matched = shorter[matched]
            matched += byte == wanted[matched]
            if matched == len(wanted):
                # Later occurrences begin later: this search has done its work.
                self.matched = 0
                return start + place + 1 - matched
        self.matched = matched
        return None
