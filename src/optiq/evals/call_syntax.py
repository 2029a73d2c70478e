"""Function calls written as text: a Python list of calls, or JSON."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from optiq.evals.task import ToolCall

_FENCE = re.compile(r"```[\w-]*[ \t]*\n(.*?)```", re.DOTALL)
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def read_calls(text: str) -> tuple[ToolCall, ...] | None:
    """The calls in a text, or None where it is no list of calls.

    Understood are `[name(argument=value), ...]`, the same without brackets, and a JSON object or
    list of `{"name": ..., "arguments": {...}}`; either may stand in a fence. Nothing is run.
    """
    fences = _FENCE.findall(text)
    body = (fences[-1] if fences else text).strip("` \t\r\n")
    if not body:
        return None
    try:
        return _from_json(json.loads(body))
    except (ValueError, RecursionError):
        pass
    try:
        return _from_python(body)
    except (ValueError, SyntaxError, RecursionError, MemoryError, ArithmeticError, TypeError):
        return None


def as_json(call: ToolCall) -> dict[str, Any]:
    """A call in JSON types: `{"name": ..., "arguments": {...}}`."""
    return {"name": call.name, "arguments": _plain(call.arguments)}


def _plain(value: Any) -> Any:  # noqa: ANN401  any value that `read_calls` makes
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool) or value is None else repr(value)


def _from_json(value: Any) -> tuple[ToolCall, ...]:  # noqa: ANN401  any JSON value
    calls = []
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict):
            raise ValueError("no call")
        call = call.get("function", call) if isinstance(call.get("function"), dict) else call
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):  # as OpenAI's interface has them
            arguments = json.loads(arguments)
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            raise ValueError("no call")
        calls.append(ToolCall(call["name"], arguments))
    return tuple(calls)


def _from_python(text: str) -> tuple[ToolCall, ...]:
    text = text if text.startswith("[") else f"[{text}]"
    body = ast.parse(text, mode="eval").body
    if not isinstance(body, ast.List):
        raise ValueError("no list")
    return tuple(_call(node) for node in body.elts)


def _call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call):
        raise ValueError("no call")
    parts = []
    name = node.func
    while isinstance(name, ast.Attribute):
        parts.append(name.attr)
        name = name.value
    if not isinstance(name, ast.Name):
        raise ValueError("no name")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("arguments without names")
        arguments[keyword.arg] = _value(keyword.value)
    return ToolCall(".".join([name.id, *reversed(parts)]), arguments)


def _value(node: ast.expr) -> Any:  # noqa: ANN401, C901  one line a kind of value
    match node:
        case ast.Constant(value=value):
            return "..." if value is ... else value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=elements):
            return [_value(one) for one in elements]
        case ast.Tuple(elts=elements):
            return tuple(_value(one) for one in elements)
        case ast.Dict(keys=keys, values=values):
            if any(key is None for key in keys):
                raise ValueError("a dictionary unpacked")
            return {_value(k): _value(v) for k, v in zip(keys, values, strict=True) if k}
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _number(_ARITHMETIC[type(op)](_number(_value(left)), _number(_value(right))))
        case ast.Name(id=name):  # a variable: its name stands for it
            return name
        case ast.Call(keywords=[_, *_]):
            inner = _call(node)
            return {inner.name: inner.arguments}
        case ast.Call() | ast.Subscript() | ast.Attribute():
            return ast.unparse(node)
    raise ValueError("no value")


def _number(value: Any) -> int | float:  # noqa: ANN401  any JSON value
    if type(value) is int or type(value) is float:
        return value
    raise ValueError("no number")
