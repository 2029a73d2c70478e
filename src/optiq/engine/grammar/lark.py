"""Pieces of text in llguidance's dialect of Lark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_COMPACT = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}


def quoted(text: str) -> str:
    """A literal."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Any, *, spaced: bool = False) -> str:  # noqa: ANN401  any JSON schema
    """What is JSON and valid under a schema, without white space.

    Args:
        schema: it.
        spaced: one space after commas and colons.
    """
    if not isinstance(schema, Mapping):
        schema = {}
    options: dict[str, Any] = dict(_COMPACT)
    if spaced:
        options |= {"item_separator": ", ", "key_separator": ": "}
    return f"%json {json.dumps(dict(schema) | {'x-guidance': options})}"
