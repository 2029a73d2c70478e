"""What a checkpoint says about generating: where to stop, what never to say, how to draw."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from optiq.errors import UsageError
from optiq.models.load import read_config

_NAME = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """generation_config.json, with what is missing taken from config.json.

    Attributes:
        bos: token that a raw prompt begins with, if the model has one.
        stop: tokens that end an answer.
        suppressed: tokens that are never written, in no step and by no drafter.
        temperature: 0 where the checkpoint does not sample; None where it does not say.
        top_k: of sampling; None for all tokens.
        top_p: of sampling; None for all tokens.
        min_p: of sampling; None for all tokens.
        repetition_penalty: None for none.
    """

    bos: int | None
    stop: tuple[int, ...]
    suppressed: tuple[int, ...]
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_generation(folder: Path) -> GenerationDefaults:
    """What a model directory says about generating.

    Raises:
        UsageError: if a value is none that it can be.
    """
    config = read_config(folder)
    text = config.get("text_config")
    given = (text if isinstance(text, dict) else {}) | config | _file(folder)
    return GenerationDefaults(
        bos=next(iter(_tokens(given, "bos_token_id")), None),
        stop=_tokens(given, "eos_token_id"),
        suppressed=_tokens(given, "suppress_tokens"),
        temperature=0.0 if given.get("do_sample") is False else _number(given, "temperature"),
        top_k=_whole(given, "top_k"),
        top_p=_number(given, "top_p"),
        min_p=_number(given, "min_p"),
        repetition_penalty=_number(given, "repetition_penalty"),
    )


def _file(folder: Path) -> dict[str, Any]:
    file = folder / _NAME
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read ({error}); get it again") from None
    if not isinstance(data, dict):
        raise UsageError(f"{file} is not a JSON object; get it again")
    return {name: value for name, value in data.items() if value is not None}


def _tokens(given: dict[str, Any], name: str) -> tuple[int, ...]:
    value = given.get(name)
    items = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and item >= 0 for item in items):
        raise UsageError(f"{name} of {_NAME} is {value!r}, which are no token ids; get it again")
    return tuple(dict.fromkeys(items))


def _number(given: dict[str, Any], name: str) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} of {_NAME} is {value!r}, which is no number; get it again")
    if value < 0:
        raise UsageError(f"{name} of {_NAME} is {value!r}, below 0; get it again")
    return float(value)


def _whole(given: dict[str, Any], name: str) -> int | None:
    """A whole number; 0 means the same as nothing."""
    value = _number(given, name)
    if value is not None and value != int(value):
        raise UsageError(f"{name} of {_NAME} is {value!r}, which is not whole; get it again")
    return int(value) or None if value is not None else None
