"""Prompt lookup: the text goes on as it did the last time that its end was there.

It costs next to nothing and pays where answers repeat their prompt: edits, quotes, code, JSON.

Reference: Saxena, Prompt Lookup Decoding (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from optiq.backend import mx
from optiq.engine.drafters.base import Pairing
from optiq.engine.kv_cache import SequenceCache
from optiq.errors import UsageError

_LONGEST, _SHORTEST = 4, 2


class NgramSession:
    """The n-grams of one sequence, and where they were last."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 0

    def propose(
        self, tokens: Sequence[int], state: mx.array | None, cache: SequenceCache, count: int
    ) -> list[int]:
        """What followed the longest n-gram that ends the text, the last time before; see `Session`.

        Cost: constant, and as much for every token that is new since the last call.
        """
        del state, cache
        end = len(tokens)
        for at in range(max(self._known, _SHORTEST), end):  # n-grams that end before the last token
            for size in range(_SHORTEST, min(_LONGEST, at) + 1):
                self._after[tuple(tokens[at - size : at])] = at
        self._known = max(self._known, end)
        for size in range(min(_LONGEST, end), _SHORTEST - 1, -1):
            found = self._after.get(tuple(tokens[end - size :]))
            if found is not None:
                return list(tokens[found : found + count])
        return []


class NgramDrafter:
    """Drafts from the text itself."""

    name = "ngram"
    reads_states = False

    def start(self) -> NgramSession:
        """See `Drafter`."""
        return NgramSession()

    def logits(
        self,
        tokens: Sequence[int],
        state: mx.array | None,
        cache: SequenceCache,
        count: int,
    ) -> NoReturn:
        """See `Drafter`.

        Raises:
            UsageError: always.
        """
        del tokens, state, cache, count
        raise UsageError("the drafter 'ngram' copies text and has no logits")


def open_drafter(path: Path | None, pairing: Pairing) -> NgramDrafter:
    """See `Opener`.

    Raises:
        UsageError: if a directory is given.
    """
    del pairing
    if path is not None:
        raise UsageError(f"the drafter 'ngram' needs no directory, and {path} was given")
    return NgramDrafter()
