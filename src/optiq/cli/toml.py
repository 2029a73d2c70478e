"""The TOML form of the options: read and checked, and a commented example."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optiq.errors import UsageError

Sections = Mapping[str, type[Any]]


def without_none(hint: Any) -> Any:  # noqa: ANN401  a type hint
    """`X` of `X | None`; other hints as they are."""
    if isinstance(hint, types.UnionType):
        (hint,) = (member for member in typing.get_args(hint) if member is not types.NoneType)
    return hint


def read(path: Path, sections: Sections) -> dict[type[Any], dict[str, Any]]:
    """Values of a file by dataclass, checked against its fields.

    Raises:
        UsageError: for a file that is no TOML, an unknown section or key, or a value of another
            type; names the key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from None
    return {
        sections[_known(name, sections, f"{path}: section")]: _section(
            table, sections[name], f"{path} [{name}]"
        )
        for name, table in data.items()
    }


def _known(name: str, names: Mapping[str, Any], what: str) -> str:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"
        raise UsageError(f"{what} '{name}' is unknown; {hint}")
    return name


def _section(table: object, config_type: type[Any], where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise UsageError(f"{where} must be a section with keys, not {table!r}")
    hints = typing.get_type_hints(config_type)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(config_type)}
    return {
        key: _value(value, without_none(fields[_known(key, fields, f"{where}: key")]), where, key)
        for key, value in table.items()
    }


def _value(value: object, hint: Any, where: str, key: str) -> Any:  # noqa: ANN401  any field
    """A TOML value as the field's type."""
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        wanted = f"one of {', '.join(choices)}"
    elif typing.get_origin(hint) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(map(typing.get_args(hint)[0], value))
        wanted = "a list of strings"
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
        wanted = "a string with a path"
    elif hint is float and type(value) is int:
        return float(value)
    elif type(value) is hint:
        return value
    else:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(
            hint, "a string"
        )
    raise UsageError(f"{where}: {key} must be {wanted}, not {value!r}")


def example(sections: Sections) -> str:
    """A TOML file with every option commented out at its default, under its help text."""
    lines = ["# Options of optiq. Take away a '#' to set one; a flag on the command line wins."]
    for name, config_type in sections.items():
        lines += ["", f"[{name}]"]
        hints = typing.get_type_hints(config_type)
        for field in dataclasses.fields(config_type):
            lines.append(f"# {field.metadata['help']}")
            lines.append(f"# {field.name} = {_literal(field.default, hints[field.name])}")
    return "\n".join(lines) + "\n"


def _literal(default: object, hint: Any) -> str:  # noqa: ANN401  a type hint
    """A default as TOML; an example value where the default is to leave the key out."""
    if default is None:
        return {float: "1.0", int: "1", Path: '"path"'}.get(without_none(hint), '"value"')
    return json.dumps(list(default) if isinstance(default, tuple) else default)


def markdown(sections: Sections) -> str:
    """Every option as Markdown tables, one per section; the text of docs/options.md."""
    lines = [
        "# Options",
        "",
        "Made by `optiq config --markdown` from the dataclasses in `optiq.configs`. An option is a "
        "flag (`--target-bpw 4.5`),",
        "a key in a TOML file given with `--config` (`target_bpw = 4.5` under `[allocate]`), and a "
        "field of the dataclass.",
    ]
    for name, config_type in sections.items():
        title = f"## [{name}] {config_type.__name__}"
        lines += ["", title, "", "| key | flag | type | default | |", "|---|---|---|---|---|"]
        hints = typing.get_type_hints(config_type)
        lines += [_row(field, hints[field.name]) for field in dataclasses.fields(config_type)]
    return "\n".join(lines) + "\n"


def _row(field: dataclasses.Field[Any], hint: Any) -> str:  # noqa: ANN401  a type hint
    hint = without_none(hint)
    if typing.get_origin(hint) is typing.Literal:
        kind = ", ".join(typing.get_args(hint))
    else:
        kinds = {bool: "flag", int: "whole number", float: "number", Path: "path", str: "text"}
        kind = kinds.get(hint, "text, repeatable")
    default = "" if field.default in {None, ()} else f"`{json.dumps(field.default)}`"
    flag = "--" + field.name.replace("_", "-")
    return f"| `{field.name}` | `{flag}` | {kind} | {default} | {field.metadata['help']} |"
