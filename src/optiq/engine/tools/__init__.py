"""Formats that models write calls of functions in."""

from __future__ import annotations

from optiq.engine.tools.base import CallFormat, CallFormatMaker
from optiq.registry import Registry
from optiq.upstream import TokenizerWrapper

CALL_FORMATS: Registry[CallFormatMaker] = Registry(
    "call_format",
    {
        "gemma4": "optiq.engine.tools.gemma4:call_format",
        "mlx_lm": "optiq.engine.tools.mlx_lm:call_format",
    },
)

_LAST = "mlx_lm"  # knows a parser for many models: asked after those that know one


def call_format(tokenizer: TokenizerWrapper) -> CallFormat | None:
    """The format of a model, by its tokens and template; None if it writes no calls."""
    names = [name for name in CALL_FORMATS.names() if name != _LAST]
    for name in [*names, _LAST]:
        found = CALL_FORMATS.get(name)(tokenizer)
        if found is not None:
            return found
    return None
