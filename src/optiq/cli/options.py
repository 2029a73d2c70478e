"""Flags made from the dataclasses of `optiq.configs`, and the values a command gets from them."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from optiq.cli import toml
from optiq.configs import (
    AllocateConfig,
    BenchConfig,
    ConvertConfig,
    EvalConfig,
    GenerateConfig,
    JudgeConfig,
    MeasureConfig,
    RunConfig,
    ServeConfig,
    ServedConfig,
)

T = TypeVar("T")

SECTIONS: Mapping[str, type[Any]] = {
    "run": RunConfig,
    "measure": MeasureConfig,
    "allocate": AllocateConfig,
    "convert": ConvertConfig,
    "judge": JudgeConfig,
    "bench": BenchConfig,
    "generate": GenerateConfig,
    "eval": EvalConfig,
    "served": ServedConfig,
    "serve": ServeConfig,
}
"""TOML section -> dataclass; the order of the documentation."""

_TITLES = {
    RunConfig: "Run",
    MeasureConfig: "Measuring",
    AllocateConfig: "Budget and bits",
    ConvertConfig: "Output",
    JudgeConfig: "Judging",
    BenchConfig: "Timing",
    GenerateConfig: "Writing",
    EvalConfig: "Benchmarks",
    ServedConfig: "Model behind a URL",
    ServeConfig: "Serving",
}


class Configs:
    """The dataclasses of one command line; `configs[MeasureConfig]` is typed."""

    def __init__(self, values: Mapping[type[Any], Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, config_type: type[T]) -> T:
        """The dataclass of that type; its defaults where the command has no flags for it."""
        value = self._values.get(config_type)
        return typing.cast(T, config_type() if value is None else value)


class _ConfigOption(click.Option):
    """A flag that is listed under the title of its dataclass."""

    def __init__(self, *names: Any, title: str, **keywords: Any) -> None:  # noqa: ANN401  click's
        super().__init__(*names, **keywords)
        self.title = title


class ConfigCommand(click.Command):
    """A command whose help lists flags by dataclass."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own flags, then the others under the title of their dataclass."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                title = parameter.title if isinstance(parameter, _ConfigOption) else "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def flag_name(field_name: str) -> str:
    """`target_bpw` -> `--target-bpw`."""
    return "--" + field_name.replace("_", "-")


def config_options(
    *config_types: type[Any], without: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of dataclasses and `--config FILE.toml`.

    The command function receives `configs: Configs` in their place. A flag on the command line wins
    over the file, the file over the default.

    Args:
        config_types: dataclasses of `optiq.configs`, in the order of the help.
        without: fields that the command cannot honour and therefore does not take.
    """
    taken = [
        (config_type, field)
        for config_type in config_types
        for field in dataclasses.fields(config_type)
        if field.name not in without
    ]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(config_file: Path | None, **values: Any) -> Any:  # noqa: ANN401  click's values
            context = click.get_current_context()
            from_file = toml.read(config_file, SECTIONS) if config_file else {}
            chosen: dict[type[Any], dict[str, Any]] = {t: {} for t in config_types}
            for config_type, field in taken:
                value = values.pop(field.name)
                source = context.get_parameter_source(field.name)
                if source is ParameterSource.COMMANDLINE:
                    chosen[config_type][field.name] = value
                elif field.name in from_file.get(config_type, {}):
                    chosen[config_type][field.name] = from_file[config_type][field.name]
            configs = Configs({t: t(**fields) for t, fields in chosen.items()})
            return function(configs=configs, **values)

        decorated: Callable[..., Any] = wrapper
        for config_type, field in reversed(taken):
            decorated = _flag(config_type, field)(decorated)
        help_text = "TOML file of options; `optiq config` prints one. Flags win over it."
        return click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path, dir_okay=False, exists=True),
            metavar="FILE.toml",
            help=help_text,
        )(decorated)

    return decorate


def _flag(
    config_type: type[Any], field: dataclasses.Field[Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The click option of one field."""
    return click.option(
        flag_name(field.name),
        field.name,
        cls=_ConfigOption,
        title=_TITLES[config_type],
        default=field.default,
        metavar=field.metadata.get("metavar"),
        help=field.metadata["help"],
        show_default=field.default not in {None, False, ()},
        **_keywords(typing.get_type_hints(config_type)[field.name]),
    )


def _keywords(hint: Any) -> dict[str, Any]:  # noqa: ANN401  a type hint
    """What click must know of a field's type."""
    hint = toml.without_none(hint)
    if hint is bool:
        return {"is_flag": True}
    if typing.get_origin(hint) is typing.Literal:
        return {"type": click.Choice(typing.get_args(hint))}
    if typing.get_origin(hint) is tuple:
        return {"multiple": True, "type": typing.get_args(hint)[0]}
    if hint is Path:
        return {"type": click.Path(path_type=Path)}
    return {"type": hint}
