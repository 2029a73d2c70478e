"""Gemma-4 targets and their drafters, from model directories to what runs."""

from __future__ import annotations

from pathlib import Path

from optiq.backend import is_cpu, nn
from optiq.errors import UsageError
from optiq.models.families import check_standalone, is_drafter
from optiq.models.families.gemma4 import Gemma4, ImageMask
from optiq.models.families.gemma4_assistant import Drafting, Gemma4Drafter, Model
from optiq.models.load import load_tree
from optiq.upstream import dense_float32


def load_target(path: Path, image_mask: ImageMask | None = None) -> Gemma4:
    """The text tower of a Gemma-4 directory, source or artifact; dense float32 on the CPU.

    Raises:
        UsageError: if it is none, or a drafter.
    """
    model, config = load_tree(path)
    check_standalone(config)
    return Gemma4(_ready(model), config, image_mask)


def load_drafter(path: Path, target: Gemma4, drafting: Drafting | None = None) -> Gemma4Drafter:
    """The drafter of a directory, source or artifact, for a target; dense float32 on the CPU.

    Raises:
        UsageError: if it is no drafter, or one of another target.
    """
    model, config = load_tree(path)
    if not is_drafter(config) or not isinstance(model, Model):
        raise UsageError(
            f"{path} is a {config.get('model_type')}, not the drafter of a Gemma-4 model; give "
            "the -assistant that belongs to the target"
        )
    ready = _ready(model)
    assert isinstance(ready, Model)
    return Gemma4Drafter(ready, target, drafting)


def _ready(model: nn.Module) -> nn.Module:
    return dense_float32(model) if is_cpu() else model
