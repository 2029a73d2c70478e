"""Functions whose calls obey a grammar."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optiq.engine.grammar.lark import json_rule, quoted
from optiq.engine.grammar.limits import check_schema
from optiq.errors import UsageError

Tool = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Function:
    """A function in a grammar.

    Attributes:
        name: of it.
        parameters: JSON schema of its arguments, an object; None for any object.
    """

    name: str
    parameters: Mapping[str, Any] | None


Block = Callable[[Sequence[Function]], str]
"""Lark of what stands between the markers of a call of one of the functions."""


def functions_of(tools: Sequence[Tool]) -> dict[str, Tool]:
    """Functions of OpenAI tools, by name."""
    found = [tool.get("function", tool) for tool in tools]
    return {str(function.get("name")): function for function in found}


def is_strict(function: Tool) -> bool:
    """Whether the arguments of a function have to be valid."""
    return function.get("strict") is True


def enforced(function: Tool) -> Function:
    """A function whose arguments have to be valid.

    Raises:
        UsageError: if its parameters are no schema of an object.
    """
    name, schema = str(function["name"]), function.get("parameters")
    if schema is None:
        schema = {"type": "object", "properties": {}, "additionalProperties": False}
    check_schema(schema)
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise UsageError(f"the parameters of {name} must be a schema of type object")
    return Function(name, schema)


def json_block(functions: Sequence[Function], around: str = "") -> str:
    """Calls that are JSON objects with `name` and `arguments`.

    Properties that a function does not describe are left out, unless it asks for them.

    Args:
        functions: that may be called.
        around: text before and after the object.
    """
    rules = []
    for number, function in enumerate(functions):
        schema: dict[str, Any] = {"type": "object", **(function.parameters or {})}
        if "properties" in schema and not {"allOf", "$ref"} & set(schema):
            schema.setdefault("additionalProperties", False)
        head = quoted(f'{around}{{"name": {quoted(function.name)}, "arguments": ')
        rules.append(f"call_{number}: {head} arguments_{number} {quoted('}' + around)}")
        rules.append(f"arguments_{number}: {json_rule(schema, spaced=True)}")
    start = " | ".join(f"call_{number}" for number in range(len(functions)))
    return "\n".join([f"start: {start}", *rules, ""])
