"""Packages that an optional extra brings, imported when they are first needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from optiq.errors import UsageError


def load(module: str, *, extra: str, purpose: str) -> ModuleType:
    """An optional module.

    Args:
        module: dotted name.
        extra: extra of this distribution that installs it.
        purpose: what needs it, a noun phrase that begins the message.

    Raises:
        UsageError: if the module, or one that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{purpose} needs the Python package '{error.name}', which is not installed; run: "
            f"pip install 'mlx-optiq[{extra}]'"
        ) from None
