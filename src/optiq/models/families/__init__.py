"""What mlx-lm lacks, by `model_type`: how a config is read, and module trees that it does not have.

A family is an entry of the table below and a file beside this one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from optiq.backend import nn
from optiq.errors import UsageError
from optiq.registry import Registry
from optiq.upstream import build_model

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """What optiq does itself for some model types.

    Attributes:
        normalize: config.json as it is -> as mlx-lm reads it with the same meaning. The input is
            left alone.
        build: the module tree of a normalized config; None where mlx-lm has it.
        drafter: it drafts for a target and cannot run alone.
    """

    normalize: Callable[[Config], Config]
    build: Callable[[Config], nn.Module] | None = None
    drafter: bool = False


_GEMMA4 = "optiq.models.families.gemma4_config:FAMILY"
_ASSISTANT = "optiq.models.families.gemma4_assistant:FAMILY"

FAMILIES: Registry[Family] = Registry(
    "family",
    {
        "gemma4": _GEMMA4,
        "gemma4_text": _GEMMA4,
        "gemma4_unified": _GEMMA4,
        "gemma4_unified_text": _GEMMA4,
        "gemma4_assistant": _ASSISTANT,
        "gemma4_unified_assistant": _ASSISTANT,
    },
)


def family_of(config: Config) -> Family | None:
    """The family of a config, or None where mlx-lm needs no help."""
    model_type = config.get("model_type")
    return FAMILIES.get(model_type) if model_type in FAMILIES.names() else None


def normalized(config: Config) -> Config:
    """A config as mlx-lm reads it with the meaning that it has in transformers.

    Raises:
        UsageError: if a value is of a kind that it cannot be.
        UnsupportedModel: if the family says no.
    """
    family = family_of(config)
    if family is None:
        return config
    try:
        return family.normalize(config)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UsageError(
            f"config.json of model_type '{config['model_type']}' cannot be read ({error!r}); get "
            "it again"
        ) from None


def build_tree(config: Config) -> nn.Module:
    """The module tree of a normalized config: the family's own, else mlx-lm's.

    Raises:
        UnsupportedModel: if neither has it, or the config is not complete.
    """
    family = family_of(config)
    return build_model(config, family.build if family else None)


def is_drafter(config: Config) -> bool:
    """Whether a model only drafts for another one."""
    family = family_of(config)
    return family is not None and family.drafter


def check_standalone(config: Config) -> None:
    """Refuse a model that only drafts for another one.

    Raises:
        UsageError: for a drafter.
    """
    if is_drafter(config):
        raise UsageError(
            f"a {config['model_type']} drafts for a target and generates nothing alone; load the "
            "target and pass it as drafter="
        )
