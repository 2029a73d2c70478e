"""What a grammar may cost, checked before anything is compiled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from optiq.engine.grammar import Grammar
from optiq.errors import UsageError

MAX_SCHEMA_CHARACTERS = 1 << 18
MAX_SCHEMA_DEPTH = 64
MAX_PATTERN_CHARACTERS = 1 << 13
MAX_LARK_CHARACTERS = 1 << 16
MAX_CHOICES = 4096


def check(grammar: Grammar) -> None:
    """Refuse a grammar that is not what its kind says, or is larger than any need.

    Raises:
        UsageError: if it is.
    """
    value = grammar.value
    if grammar.kind == "json_object":
        if value is not None:
            raise UsageError(f"a json_object grammar takes no value, not {_shown(value)}")
    elif grammar.kind == "json_schema":
        check_schema(value)
    elif grammar.kind == "choice":
        _check_choices(value)
    elif grammar.kind in {"regex", "lark"}:
        most = MAX_PATTERN_CHARACTERS if grammar.kind == "regex" else MAX_LARK_CHARACTERS
        _check_text(grammar.kind, value, most)
    else:
        raise UsageError(
            f"{grammar.kind!r} is no kind of grammar; there are json_object, json_schema, regex, "
            "choice and lark"
        )


def check_schema(schema: Any) -> None:  # noqa: ANN401  any JSON value
    """Refuse what is no JSON schema, or too large a one.

    Raises:
        UsageError: if it is.
    """
    if not isinstance(schema, Mapping | bool):
        raise UsageError(f"a JSON schema is an object or a truth value, not {_shown(schema)}")
    if schema is False:
        raise UsageError("the JSON schema false is valid for nothing; give another")
    depth = _depth(schema)
    if depth > MAX_SCHEMA_DEPTH:
        raise UsageError(
            f"the JSON schema is more than {MAX_SCHEMA_DEPTH} levels deep; put inner parts into "
            "$defs"
        )
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError) as error:
        raise UsageError(f"the schema is not JSON ({error})") from None
    if size > MAX_SCHEMA_CHARACTERS:
        raise UsageError(
            f"the JSON schema has {size} characters; at most {MAX_SCHEMA_CHARACTERS} are taken"
        )
    if isinstance(schema, Mapping) and "x-guidance" in schema:
        raise UsageError("the keyword x-guidance of JSON schemas is not supported; remove it")


def _check_choices(value: Any) -> None:  # noqa: ANN401
    if not isinstance(value, tuple) or not value:
        raise UsageError(f"a choice is between texts, at least one, not {_shown(value)}")
    if len(value) > MAX_CHOICES:
        raise UsageError(f"a choice is between at most {MAX_CHOICES} texts, not {len(value)}")
    for text in value:
        _check_text("choice", text, MAX_LARK_CHARACTERS)
    if sum(map(len, value)) > MAX_LARK_CHARACTERS:
        raise UsageError(f"the choices have more than {MAX_LARK_CHARACTERS} characters in all")


def _check_text(kind: str, value: Any, most: int) -> None:  # noqa: ANN401
    if not isinstance(value, str) or not value:
        raise UsageError(f"a {kind} grammar is a text that is not empty, not {_shown(value)}")
    if len(value) > most:
        raise UsageError(
            f"the {kind} grammar has {len(value)} characters; at most {most} are taken"
        )


def _depth(value: Any) -> int:  # noqa: ANN401  any JSON value
    """Levels of a value, as far as they matter."""
    level, depth = [value], 0
    while level and depth <= MAX_SCHEMA_DEPTH:
        depth += 1
        inner: list[Any] = []
        for one in level:
            if isinstance(one, Mapping):
                inner += one.values()
            elif isinstance(one, list | tuple):
                inner += one
        level = [one for one in inner if isinstance(one, Mapping | list | tuple)]
    return depth


def _shown(value: Any) -> str:  # noqa: ANN401
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
