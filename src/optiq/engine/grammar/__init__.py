"""Grammars that an answer can be made to obey."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer has to be; plain data.

    Attributes:
        kind: how `value` is read.
        value: None for `json_object`; a schema for `json_schema`; a pattern for `regex`; texts for
            `choice`; a grammar for `lark`.
    """

    kind: Kind
    value: Mapping[str, Any] | bool | str | tuple[str, ...] | None = None
