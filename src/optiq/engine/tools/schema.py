"""The types that a JSON schema wants, and values written another way brought to them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from optiq.engine.tools.base import Tool

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_LONGEST_NUMBER = 300  # digits; readers of JSON refuse longer ones
_WORDS = {"true", "false", "null"}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_MOST_REFERENCES = 32  # a schema that goes deeper refers to itself
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_UNIONS = ("anyOf", "oneOf", "allOf")


@dataclasses.dataclass(frozen=True)
class Schema:
    """A place in a JSON schema; nothing is known of a place that it does not describe.

    Attributes:
        node: the schema of the place.
        root: the whole, which `$ref` looks into.
    """

    node: Any
    root: Any

    @classmethod
    def of_function(cls, tools: Sequence[Tool], name: str) -> Schema:
        """The parameters of a function."""
        for tool in tools:
            function = tool.get("function", tool)
            if isinstance(function, Mapping) and function.get("name") == name:
                return cls(function.get("parameters"), function.get("parameters"))
        return cls(None, None)

    def property(self, key: str) -> Schema:
        """The schema of a property."""
        for node in self._nodes():
            properties = node.get("properties")
            if isinstance(properties, Mapping) and key in properties:
                return Schema(properties[key], self.root)
        extra = [node["additionalProperties"] for node in self._nodes() if _has_extra(node)]
        return Schema(extra[0] if extra else None, self.root)

    def items(self) -> Schema:
        """The schema of the items."""
        found = [node["items"] for node in self._nodes() if "items" in node]
        return Schema(found[0] if found else None, self.root)

    def types(self) -> frozenset[str] | None:
        """Names of the types that it allows; None for any."""
        names: set[str] = set()
        for node in self._nodes():
            kind = node.get("type")
            names.update(str(name).lower() for name in (kind if isinstance(kind, list) else [kind]))
            if kind is None:
                names.update(_kinds(node))
            if node.get("nullable") is True:
                names.add("null")
        names.discard("none")
        return frozenset(names) or None

    def _nodes(self) -> list[Mapping[str, Any]]:
        """The node itself, what it refers to, and the members of its unions."""
        out: list[Mapping[str, Any]] = []
        waiting = [self.node]
        while waiting and len(out) < _MOST_REFERENCES:
            node = waiting.pop(0)
            if not isinstance(node, Mapping):
                continue
            out.append(node)
            waiting += [self._target(node["$ref"])] if "$ref" in node else []
            for union in _UNIONS:
                members = node.get(union)
                waiting += members if isinstance(members, list) else []
        return out

    def _target(self, reference: Any) -> Any:  # noqa: ANN401  any JSON value
        node = self.root
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return None
        for part in reference.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(node, list):
                node = node[int(key)] if key.isdecimal() and int(key) < len(node) else None
            else:
                node = node.get(key) if isinstance(node, Mapping) else None
        return node


def _kinds(node: Mapping[str, Any]) -> set[str]:
    """Types of the values that a schema lists."""
    values = node.get("enum", [node["const"]] if "const" in node else [])
    return {_TYPES[type(value)] for value in values if type(value) in _TYPES}


def _has_extra(node: Mapping[str, Any]) -> bool:
    return isinstance(node.get("additionalProperties"), Mapping)


def bare_json(text: str, types: frozenset[str] | None) -> str:
    """JSON of a value that was written without quotes.

    `null` is null. Anything else that the schema wants as a string is one; then numbers, true and
    false, as JSON or Python write them, are what they are. The rest is a string.
    """
    literal = _literal(text)
    if literal is None:
        return json.dumps(text, ensure_ascii=False)
    if types is None or text == "null" or "string" not in types or _is_allowed(literal, types):
        return literal
    return json.dumps(text, ensure_ascii=False)


def quoted_json(text: str, types: frozenset[str] | None) -> str:
    """JSON of a value that was written with quotes.

    It stays a string, unless the schema allows no string and the text is what it does allow.
    """
    if types is not None and "string" not in types:
        literal = _literal(text.strip())
        if literal is not None and _is_allowed(literal, types):
            return literal
        if types & {"array", "object"} and (nested := _nested(text, types)) is not None:
            return nested
    return json.dumps(text, ensure_ascii=False)


def _literal(text: str) -> str | None:
    """JSON of a number, truth value or null; None if the text is none of these."""
    if text in _WORDS or (len(text) <= _LONGEST_NUMBER and _NUMBER.fullmatch(text)):
        return text
    return _PYTHON_WORDS.get(text)


def _is_allowed(literal: str, types: frozenset[str]) -> bool:
    if literal in {"true", "false"}:
        return "boolean" in types
    if literal == "null":
        return "null" in types
    return "number" in types or ("integer" in types and float(literal).is_integer())


def _nested(text: str, types: frozenset[str]) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    fits = ("array" in types and isinstance(value, list)) or (
        "object" in types and isinstance(value, dict)
    )
    return json.dumps(value, ensure_ascii=False) if fits else None
