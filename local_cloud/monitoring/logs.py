"""Log lines: one formatter that redacts, and a handler that loses none."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from types import NoneType
from typing import Any, TextIO

from serving.telemetry import CURRENT

LARGE = 2**63  # beyond it, readers of JSON differ
SECRET_NAME = re.compile(
    r"(?i)authorization|cookie|passw|secret|credential|(api|private).?key|token$"
)
SECRET = re.compile(
    r"""(?isx)
    (?P<rest> (?:authorization|cookie) ["'\\]* \s*[:=,]\s* b?["'\\]* ) [^"'\\\r\n]+
    | (?P<pair> (?:passw\w{0,9}|secret\w{0,9}|credentials?|(?:api|private).?key
        |(?:access|auth|session).?token) ["'\\]* \s*[:=]\s* b?["'\\]* ) [^\s"'\\,;&]+
    | (?P<kind> \b(?:bearer|basic)\s+ ) [^\s"'\\,]{6,}
    | (?P<user> ://[^\s/:@]*: ) [^\s/@]+ (?=@)
    | \b(?:sk|pk|rk|fw|hf|gh[a-z]|xox[a-z]|glpat)[-_][\w-]{8,} | \bAKIA\w{12,}
    | \beyJ[\w-]+\.[\w-]+\.[\w-]*  # a JSON web token
    | -----BEGIN\ [A-Z\ ]*KEY-----.*?(?:-----END[^-]*-----|\Z)
    | (?<![\w-])(?=[\w-]*\d)(?=[\w-]*[a-z])[\w-]{40,}  # long and random; ids have 32
    """
)


class JsonLines(logging.Formatter):
    """The one formatter: any record becomes one line of JSON, with the trace's ids."""

    usual = frozenset(logging.makeLogRecord({}).__dict__) | {"taskName"}

    def __init__(self, known_secrets: Sequence[str] = ()):
        super().__init__()
        self.known = [secret for secret in known_secrets if secret]

    def hide(self, text: str) -> str:
        for secret in self.known:
            text = text.replace(secret, "[redacted]")
        if len(text) < 40 and text.isalnum() and text[:4] != "AKIA":
            return text  # a word or an id: no form fits, and most values are such
        return SECRET.sub(r"\g<rest>\g<pair>\g<kind>\g<user>[redacted]", text)

    def format(self, record: logging.LogRecord) -> str:
        """Never raises: what cannot be said is described."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat()
        told: dict[str, Any] = {"level": record.levelname, "logger": record.name}
        told["message"] = message(record)
        if trace := CURRENT.get():
            ids = ("trace_id", "span_id", "request_id")
            told |= {name: getattr(trace, name, None) for name in ids}
        told |= {k: v for k, v in record.__dict__.items() if k not in self.usual}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            told["stack"] = record.stack_info
        told = plain(told, self.hide, SECRET_NAME)
        return json.dumps({"time": when, **told})


class LineHandler(logging.StreamHandler):
    """Writes one line a record and never raises: a full disk must not end a request.

    The library's own way with a failure is to print the record's raw arguments, and
    with them whatever the formatter would have redacted.
    """

    def __init__(self, formatter: logging.Formatter, stream: TextIO):
        super().__init__(stream)
        self.setFormatter(formatter)
        self.failed = 0

    def handleError(self, record: logging.LogRecord) -> None:
        self.failed += 1
        last_resort(self.format(record))


def last_resort(line: str) -> None:
    """Say it on stderr, which may be full or closed as well."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr)


@contextmanager
def lines(
    formatter: logging.Formatter, stream: TextIO, logger: str = ""
) -> Iterator[LineHandler]:
    """Send what a logger (by default every logger) says here, for the block."""
    handler, target = LineHandler(formatter, stream), logging.getLogger(logger)
    before = target.level, target.propagate, target.handlers[:]
    target.setLevel(logging.INFO)
    target.handlers, target.propagate = [handler], False
    try:
        yield handler
    finally:
        target.setLevel(before[0])
        target.propagate, target.handlers = before[1:]


def message(record: logging.LogRecord) -> Any:
    """The record's text, or its parts where they do not make one."""
    try:
        return record.getMessage()
    except Exception as error:
        return {"template": record.msg, "args": record.args, "error": error}


def plain(
    value: Any, hide: Callable[[str], str], secret: re.Pattern[str], depth: int = 5
) -> Any:
    """A copy that JSON can say: texts through `hide`, nothing under a secret's name."""
    if isinstance(value, (bool, NoneType)):
        return value
    if isinstance(value, (int, float)) and abs(value) < LARGE:  # NaN is not less
        return value
    if isinstance(value, (dict, list, tuple, set, frozenset)) and not depth:
        return "[too deep]"
    if isinstance(value, dict):
        told = {}
        for key, each in value.items():
            name, hidden = _name(key if type(key) is str else _text(key), hide, secret)
            told[name] = hidden or plain(each, hide, secret, depth - 1)
        return told
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each, hide, secret, depth - 1) for each in value]
    return hide(_text(value))


@lru_cache  # the names of fields are few, and the same in every line
def _name(
    name: str, hide: Callable[[str], str], secret: re.Pattern[str]
) -> tuple[str, str | None]:
    return hide(name), "[redacted]" if secret.search(name) else None


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception as error:
        return f"[{type(value).__name__} that raised {type(error).__name__}]"
