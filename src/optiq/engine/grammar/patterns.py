"""Patterns of JSON schemas as llguidance reads them: searched for, not matched whole."""

from __future__ import annotations

import re

_DAY = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
_CLOCK = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"

FORMATS = {
    "date": _DAY,
    "time": _CLOCK,
    "date-time": f"{_DAY}T{_CLOCK}",
    "email": r"[a-z0-9_\-]{1,32}(\.[a-z0-9_\-]{1,32}){0,3}@[a-z0-9]{1,32}(\.[a-z0-9]{1,32}){1,3}",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
}
"""Texts of a format, a part of them: every day has a 1st to a 28th."""

_ANYTHING = "(?s:.*)"
_ASCII = {r"\d": "0-9", r"\w": "0-9A-Za-z_"}
_LITERAL = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}


def terminal(pattern: str) -> str:
    """A terminal of Lark for texts that are what a pattern says."""
    found = re.sub(r"\\.|/|\n", lambda m: _LITERAL.get(m[0], m[0]), pattern, flags=re.DOTALL)
    return f"/{found}/"


def searched(pattern: str) -> str:
    """A terminal of Lark for texts in which the pattern of a schema is found.

    Digits and letters of words are those of ASCII, as in JavaScript.

    Raises:
        ValueError: if the pattern has an anchor within it.
    """
    parts = [""]
    in_class, depth = False, 0
    for piece in re.findall(r"\\.|.", pattern, flags=re.DOTALL):
        if piece in _ASCII:
            parts[-1] += _ASCII[piece] if in_class else f"[{_ASCII[piece]}]"
            continue
        if in_class:
            in_class = piece != "]"
        elif piece == "|" and not depth:
            parts.append("")
            continue
        else:
            in_class = piece == "["
            depth += (piece == "(") - (piece == ")")
            if depth and piece in {"^", "$"}:
                raise ValueError("it has an anchor within a group")
        parts[-1] += piece
    return terminal("|".join(map(_anchored, parts)))


def _anchored(part: str) -> str:
    """An alternative with anything where it has no anchor."""
    head = part.startswith("^")
    tail = re.search(r"(?<!\\)(\\\\)*\$$", part) is not None
    inner = part[head : len(part) - tail]
    return f"{'' if head else _ANYTHING}({inner}){'' if tail else _ANYTHING}"
