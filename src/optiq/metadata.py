"""The metadata block of model cards, and the licence that a model directory names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_BLOCK = re.compile(r"\A\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|\Z)", re.DOTALL)
_LICENSE_KEYS = ("license", "license_name", "license_link")
# the hub's name -> what only that licence begins with, white space aside
_TITLES = {
    "apache-2.0": r"Apache License Version 2\.0, January 2004",
    "mit": r"(The )?MIT License( \(MIT\))? (Copyright|Permission is hereby granted)",
    "bsd-3-clause": r"BSD 3-Clause License",
    "gemma": r"Gemma Terms of Use",
    "llama3": r"META LLAMA 3 COMMUNITY LICENSE AGREEMENT",
    "llama3.1": r"LLAMA 3\.1 COMMUNITY LICENSE AGREEMENT",
    "llama3.2": r"LLAMA 3\.2 COMMUNITY LICENSE AGREEMENT",
    "llama3.3": r"LLAMA 3\.3 COMMUNITY LICENSE AGREEMENT",
}
_HEAD_BYTES = 4096


def block(fields: Mapping[str, Any]) -> str:
    """YAML between the fences, without fields that are empty."""
    given = {key: value for key, value in fields.items() if value}
    text: str = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    return text.rstrip("\n")


def read_block(card: Path) -> dict[str, Any]:
    """The metadata of a README.md; empty where it has none that can be read."""
    try:
        found = _BLOCK.match(card.read_text(encoding="utf-8-sig"))
        data = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def license_of(folder: Path) -> dict[str, str]:
    """The licence of a model directory, under the keys of a card.

    It is what the metadata of its README.md says, else what its LICENSE begins with, if that is a
    licence the hub has a name for; else nothing is said.
    """
    found = read_block(folder / "README.md")
    if isinstance(found.get("license"), str):
        return {key: found[key] for key in _LICENSE_KEYS if isinstance(found.get(key), str)}
    for file in sorted(folder.glob("LICENSE*")):
        if file.is_file() and (name := _named(file)):
            return {"license": name}
    return {}


def _named(file: Path) -> str | None:
    """The hub's name of the licence in a file."""
    with file.open("rb") as opened:
        head = " ".join(opened.read(_HEAD_BYTES).decode(errors="replace").split())
    for name, title in _TITLES.items():
        if re.match(title, head, flags=re.IGNORECASE):
            return name
    return None
