"""Whether a function call is one of the accepted ones, by the rules of BFCL for Python."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from optiq.evals.task import ToolCall

_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_IGNORED = re.compile(r"[ ,./\-_*^]")
_OMITTED = ""  # among accepted values: the argument may be left out

_Fit = Literal["as declared", "as accepted"]


def mismatch(
    call: ToolCall, function: Mapping[str, Any], accepted: Mapping[str, Sequence[Any]]
) -> str | None:
    """Why a call is wrong, or None where it is right.

    Args:
        call: what the model called.
        function: its schema, with Python's names of types.
        accepted: accepted values of every argument; an empty text among them means that it may be
            left out.
    """
    declared = function["parameters"]["properties"]
    if call.name != function["name"]:
        return f"calls '{call.name}' instead of '{function['name']}'"
    if not isinstance(call.arguments, Mapping):
        return "the arguments are no object"
    for name in function["parameters"].get("required", []):
        if name not in call.arguments:
            return f"'{name}' is required and missing"
    for name, value in call.arguments.items():
        if name not in declared or name not in accepted:
            return f"'{name}' is unexpected"
        if not _is_accepted(value, declared[name], accepted[name]):
            return f"'{name}' has a wrong type or value"
    for name, values in accepted.items():
        if name not in call.arguments and _OMITTED not in values:
            return f"'{name}' is missing and may not be"
    return None


def _is_accepted(value: Any, declared: Mapping[str, Any], accepted: Sequence[Any]) -> bool:  # noqa: ANN401  any JSON value
    """Whether one argument has an accepted type and value."""
    kind = _TYPES[declared["type"]]
    inner = _TYPES[declared["items"]["type"]] if declared["type"] in {"array", "tuple"} else None
    if declared["type"] == "tuple" and type(value) is tuple:
        value = list(value)
    if declared["type"] == "float" and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            return False
    fit = _type_fit(value, accepted, kind, inner)
    if fit is None:
        return False
    if fit == "as accepted":  # e.g. the name of a variable in place of a number
        return value in accepted
    if kind is dict:
        return any(_same_dict(value, one) for one in accepted if one != _OMITTED)
    if kind is list and inner is dict:
        return any(_same_dicts(value, one) for one in accepted)
    if kind is str:
        return _normal(value) in [_normal(one) for one in accepted if type(one) is str]
    if kind is list:
        return [_normal(v) for v in value] in [[_normal(v) for v in one] for one in accepted]
    return value in accepted


def _type_fit(
    value: Any,  # noqa: ANN401  any JSON value
    accepted: Sequence[Any],
    kind: type,
    inner: type | None,
) -> _Fit | None:
    """Which type a value has: the declared one, that of the accepted values, or neither.

    Types are compared exactly, so that True is no integer. Elements of a list are held against the
    elements of some accepted list; deeper levels are not.
    """
    natural: type | None = next((type(one) for one in accepted if one != _OMITTED), None)
    fit: _Fit = "as declared" if natural in {None, kind} else "as accepted"
    is_declared = type(value) is kind
    if is_declared and inner is not None:
        fits = any(
            type(one) is not list or all(_type_fit(v, one, inner, None) for v in value)
            for one in accepted
        )
        return fit if fits else None
    if is_declared:
        return fit
    return "as accepted" if type(value) is natural else None


def _normal(value: Any) -> Any:  # noqa: ANN401  any JSON value
    """A text without case, blanks and light punctuation, with double quotes; others unchanged."""
    if type(value) is not str:
        return value
    return _IGNORED.sub("", value).lower().replace("'", '"')


def _same_dict(value: Mapping[str, Any], accepted: Mapping[str, Sequence[Any]]) -> bool:
    """Whether a dictionary has an accepted value at every key and lacks none it must have."""
    return (
        isinstance(value, Mapping)
        and isinstance(accepted, Mapping)
        and all(
            key in accepted and _normal(one) in [_normal(a) for a in accepted[key]]
            for key, one in value.items()
        )
        and all(key in value or _OMITTED in values for key, values in accepted.items())
    )


def _same_dicts(value: Sequence[Any], accepted: Sequence[Any]) -> bool:
    return len(value) == len(accepted) and all(map(_same_dict, value, accepted))
