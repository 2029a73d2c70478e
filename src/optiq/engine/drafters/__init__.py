"""Drafters: what proposes tokens for the target to check, by name.

A drafter is a file beside this one and an entry of the table. What it proposes changes the speed
and never the answer.
"""

from __future__ import annotations

from pathlib import Path

from optiq.engine.drafters.base import Drafter, Opener, Pairing
from optiq.errors import UsageError
from optiq.models.families import is_drafter
from optiq.models.load import read_config
from optiq.registry import Registry

__all__ = ["DRAFTERS", "Drafter", "Pairing", "drafter_kind", "open_drafter"]

DRAFTERS: Registry[Opener] = Registry(
    "drafter",
    {
        "draft_model": "optiq.engine.drafters.draft_model:open_drafter",
        "gemma4_assistant": "optiq.engine.drafters.gemma4_assistant:open_drafter",
        "ngram": "optiq.engine.drafters.ngram:open_drafter",
    },
)


def open_drafter(given: str | Path, pairing: Pairing) -> Drafter:
    """The drafter of a directory, or one that needs none, by name.

    Args:
        given: a model directory, of which the config says what it is, or a name of `DRAFTERS`.
        pairing: the target that it drafts for.

    Raises:
        UsageError: if it is neither, or was not made for this target.
    """
    kind = drafter_kind(given)
    path = Path(given)
    return DRAFTERS.get(kind)(path if (path / "config.json").is_file() else None, pairing)


def drafter_kind(given: str | Path) -> str:
    """The name in `DRAFTERS` of what `open_drafter` would open; nothing is read but a config.

    Raises:
        UsageError: if it is neither a model directory nor a name.
    """
    path = Path(given)
    if (path / "config.json").is_file():
        return "gemma4_assistant" if is_drafter(read_config(path)) else "draft_model"
    if str(given) in DRAFTERS.names():
        return str(given)
    raise UsageError(
        f"drafter '{given}' is no model directory and none of {DRAFTERS.names()}; give a "
        "directory, or ngram"
    )
