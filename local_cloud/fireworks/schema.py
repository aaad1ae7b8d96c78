"""The forms Fireworks can force an answer into, as grammars of the shared model.

Facts, from https://docs.fireworks.ai/structured-responses/structured-response-formatting
(2026): a documented part of JSON Schema is enforced; `oneOf`, `pattern` and all bounds
on length are not supported; an object with `properties` is taken as closed. Here every
keyword outside that part is refused, because one that was ignored in silence would be a
promise broken in silence. Grammars are GBNF.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Any

from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from models import grammar
from models.errors import GrammarError
from models.grammar import Grammar

NOTES = {"$id", "$schema", "title", "description", "default", "examples"}
NESTED = {"items", "additionalProperties", "unevaluatedProperties"}  # one schema
LISTED = {"anyOf", "allOf"}  # schemas in a list
NAMED = {"properties", "$defs", "definitions"}  # schemas under names
PLAIN = {"type", "required", "enum", "const", "$ref"}
SUPPORTED = NOTES | NESTED | LISTED | NAMED | PLAIN


def response_format(form: Mapping[str, Any] | None) -> Grammar | None:
    """The grammar of a `response_format`, or None for plain text.

    Raises:
        GrammarError: the form is malformed, not supported, or costs too much.
    """
    kind = form.get("type") if form else "text"
    if kind == "text":
        return None
    assert form is not None
    if kind == "json_object":
        given = form.get("schema")
        return grammar.json_schema(closed(given)) if given else grammar.json_object()
    if kind == "json_schema":
        return grammar.json_schema(closed(_inner(form)))
    if kind == "grammar":
        return _gbnf(form.get("grammar"))
    raise GrammarError(
        "response_format.type: expected text, json_object, json_schema or grammar, "
        f"found {short(kind)}; choose one of them"
    )


def tool_call(tools: Sequence[Mapping[str, Any]], choice: str | Mapping) -> Grammar:
    """The grammar of a call of one of `tools`, whose schemas are checked and closed."""
    checked = []
    for tool in tools:
        function = dict(tool.get("function") or {})
        if function.get("parameters"):
            function["parameters"] = closed(function["parameters"], "parameters")
        checked.append({"type": "function", "function": function})
    if isinstance(choice, Mapping) and "name" in choice:  # Fireworks' short spelling
        choice = {"function": {"name": choice["name"]}}
    return grammar.tool_call(checked, "required" if choice == "any" else choice)


def closed(schema: Any, where: str = "schema") -> Any:
    """The schema with its objects closed, after a look at every keyword in it.

    Raises:
        GrammarError: it is no schema, or uses a keyword that is not supported.
    """
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise GrammarError(
            f"{where}: expected a JSON schema (an object), found {short(schema)}; "
            'write it like {"type": "object", "properties": {...}}'
        )
    if unknown := sorted(set(schema) - SUPPORTED):
        raise GrammarError(
            f"{where}: expected only supported keywords, found {', '.join(unknown)}; "
            "remove it and check the value in your own code"
        )
    made = dict(schema)
    for key in NESTED & set(made):
        made[key] = closed(made[key], f"{where}.{key}")
    for key in LISTED & set(made):
        made[key] = [
            closed(one, f"{where}.{key}[{place}]")
            for place, one in enumerate(_list(made[key], f"{where}.{key}"))
        ]
    for key in NAMED & set(made):
        named = _mapping(made[key], f"{where}.{key}")
        made[key] = {
            name: closed(one, f"{where}.{key}.{name}") for name, one in named.items()
        }
    open_ = made.pop("unevaluatedProperties", None)
    if "properties" in made:
        made.setdefault("additionalProperties", open_ or False)
    return made


def _inner(form: Mapping[str, Any]) -> Any:
    """The schema itself: bare, as OpenAI wraps it, or as JSON text."""
    given = form.get("json_schema") or form.get("schema")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise GrammarError(
                f"response_format.json_schema: expected JSON, found an error: {error}; "
                "correct it"
            ) from error
    if isinstance(given, Mapping) and "schema" in given:
        return given["schema"]
    return given


def _gbnf(text: Any) -> Grammar:
    if not isinstance(text, str) or not text.strip():
        raise GrammarError(
            f"response_format.grammar: expected GBNF, found {short(text)}; "
            'write rules like root ::= "yes" | "no"'
        )
    if len(text) > grammar.MAX_PATTERN:
        raise GrammarError(
            f"response_format.grammar: expected at most {grammar.MAX_PATTERN} "
            f"characters, found {len(text)}; make it smaller"
        )
    try:
        made = gbnf_to_lark(text)
    except (GbnfToLarkError, ValueError, RecursionError) as error:
        raise GrammarError(
            f"response_format.grammar: expected GBNF, found an error: {error}; "
            "correct that rule"
        ) from error
    return grammar.lark(made)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise GrammarError(
            f"{where}: expected a list of schemas, found {short(value)}; correct it"
        )
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise GrammarError(
            f"{where}: expected schemas under their names, found {short(value)}; "
            "correct it"
        )
    return value
