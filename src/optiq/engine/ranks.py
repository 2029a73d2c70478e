"""Several processes, the ranks, that write the same answers with a model shared out among them.

Every rank runs the same loop over the same requests. What could differ between them is agreed on:
free memory is that of the rank that has least, seeds and drawn tokens are those of rank 0. Nothing
else that the loop does depends on anything but these; that is why there is no drafter, whose pace
follows clocks. A process that was not started by `mlx.launch` is alone, and then all this costs
nothing.
"""

from __future__ import annotations

import functools
import secrets
from pathlib import Path
from typing import Any, cast

from optiq import settings, upstream
from optiq.backend import mx, nn
from optiq.errors import EngineFailure, UnsupportedModel, UsageError

_WORD_BITS = 31


@functools.cache
def group() -> mx.distributed.Group | None:
    """All ranks; None where this process is alone. The first call waits for the others.

    Raises:
        EngineFailure: if they cannot be reached.
    """
    if settings.load().rank is None:
        return None
    try:
        found = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise EngineFailure(
            f"the ranks do not find each other ({error}); start all of them through mlx.launch, "
            "two or more"
        ) from None
    return found if found.size() > 1 else None


def count() -> int:
    """Number of ranks."""
    found = group()
    return 1 if found is None else found.size()


# -- agreeing ------------------------------------------------------------------------------------


def least(number: int) -> int:
    """The smallest of the numbers that the ranks have; all call it.

    Raises:
        EngineFailure: if a rank has ended.
    """
    found = group()
    if found is None:
        return number
    return _looked_at(mx.distributed.all_min(mx.array([number], mx.int64), group=found))[0]


def of_first(numbers: mx.array) -> mx.array:
    """Whole numbers as rank 0 has them, in an array that every rank has; unevaluated."""
    found = group()
    if found is None:
        return numbers
    # zeros would not follow from the pass of the model, in which the other ranks take part
    own = numbers * (found.rank() == 0)
    return mx.distributed.all_sum(own.astype(numbers.dtype), group=found)


def bytes_of_first(data: bytes) -> bytes:
    """Bytes as rank 0 has them; all call it with as many.

    Raises:
        EngineFailure: if a rank has ended.
    """
    return bytes(_looked_at(of_first(mx.array(list(data), mx.int32))))


def fresh_seed() -> int:
    """A random number of 62 bits, the same on all ranks; all call it.

    Raises:
        EngineFailure: if a rank has ended.
    """
    if group() is None:
        return secrets.randbits(2 * _WORD_BITS)
    words = mx.array([secrets.randbits(_WORD_BITS) for _ in range(2)], mx.int32)
    high, low = _looked_at(of_first(words))
    return high << _WORD_BITS | low


def _looked_at(agreed: mx.array) -> list[int]:
    try:
        return cast(list[int], agreed.tolist())
    except RuntimeError as error:
        raise EngineFailure(
            f"a rank has ended ({error}); look at its output, and start all of them again"
        ) from None


# -- sharing out ---------------------------------------------------------------------------------


def shard(tree: nn.Module, config: dict[str, Any]) -> None:
    """Leave this rank its part of a model; what is alone keeps the whole.

    Raises:
        UnsupportedModel: if mlx-lm cannot share models of the family out.
        UsageError: if heads or a size cannot be divided by the number of ranks.
    """
    found = group()
    if found is None:
        return
    try:
        own = upstream.sharding(tree)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}; start one process, without mlx.launch") from None
    _check_heads(config, found.size())
    try:
        own(found)
    except ValueError as error:
        raise UsageError(
            f"the model cannot be shared by {found.size()} ranks ({error}); start fewer"
        ) from None


def _check_heads(config: dict[str, Any], size: int) -> None:
    """Refuse heads that ranks cannot share evenly, which the sizes of matrices do not show."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name, heads in part.items():
            if name.endswith("_heads") and isinstance(heads, int) and heads % size:
                raise UsageError(
                    f"{heads} heads ({name} of config.json) cannot be shared by {size} ranks; "
                    "start as many ranks as divide them"
                )


def refuse_drafter(drafter: str | Path) -> None:
    """Refuse a drafter where there are several ranks.

    Raises:
        UsageError: naming it.
    """
    if count() > 1:
        raise UsageError(
            f"drafter {str(drafter)!r} cannot be used by {count()} ranks: how many drafts pay "
            "follows the clock of each; leave it out, or start one process"
        )
