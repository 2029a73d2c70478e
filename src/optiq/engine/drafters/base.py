"""What the loop knows of a drafter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from optiq.backend import mx
from optiq.engine.kv_cache import SequenceCache
from optiq.engine.target import Target
from optiq.errors import UsageError
from optiq.upstream import TokenizerWrapper


@dataclasses.dataclass(frozen=True)
class Pairing:
    """The target that a drafter is to draft for.

    Attributes:
        target: the model.
        tokenizer: its tokenizer.
        suppressed: tokens that it never writes.
        position_base: see `families.gemma4_assistant.Drafting`.
        sliding_keys: see there.
    """

    target: Target
    tokenizer: TokenizerWrapper
    suppressed: tuple[int, ...] = ()
    position_base: int = 1
    sliding_keys: int | None = None


class Session(Protocol):
    """A drafter at work on one sequence."""

    def propose(
        self, tokens: Sequence[int], state: mx.array | None, cache: SequenceCache, count: int
    ) -> list[int]:
        """Tokens that may come next.

        Args:
            tokens: of the sequence so far; those after `cache.length` are not in the cache.
            state: (1, 1, any), of the target, after the last but one of `tokens`; None where it is
                not known, as where a prompt is one token.
            cache: of the target; not to be changed.
            count: how many at most.
        """
        ...


class Drafter(Protocol):
    """A drafter that is bound to its target.

    Attributes:
        name: of `DRAFTERS`.
        reads_states: whether it drafts from states of the target.
    """

    name: str
    reads_states: bool

    def start(self) -> Session:
        """Begin a sequence."""
        ...

    def logits(
        self,
        tokens: Sequence[int],
        state: mx.array | None,
        cache: SequenceCache,
        count: int,
    ) -> mx.array:
        """Logits of the first drafts of a round, each from the most likely one before: (count, V).

        Args:
            tokens: as for `Session.propose`.
            state: as for `Session.propose`.
            cache: as for `Session.propose`.
            count: how many.

        Raises:
            UsageError: if it has no logits.
        """
        ...


Opener = Callable[[Path | None, Pairing], Drafter]
"""Directory, if it needs one, and target -> drafter; an error where they do not fit."""


def needed(path: Path | None, name: str) -> Path:
    """The directory, which this drafter needs.

    Raises:
        UsageError: if there is none.
    """
    if path is None:
        raise UsageError(f"the drafter '{name}' is a model; give its directory")
    return path


def check_tokenizer(path: Path, own: TokenizerWrapper, target: TokenizerWrapper) -> None:
    """Refuse a drafter that reads tokens differently.

    Raises:
        UsageError: naming the first token that differs.
    """
    ours, theirs = _vocabulary(own), _vocabulary(target)
    if ours == theirs:
        return
    other = min(
        (t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)),
        key=lambda token: (ours.get(token, 1 << 62), token),
    )
    raise UsageError(
        f"{path} has another tokenizer than the target: token {other!r} is {ours.get(other)} "
        f"there and {theirs.get(other)} in the target; give a drafter with the same tokenizer"
    )


def _vocabulary(tokenizer: Any) -> dict[str, int]:  # noqa: ANN401  transformers' tokenizers
    found: dict[str, int] = tokenizer.get_vocab()
    return found
