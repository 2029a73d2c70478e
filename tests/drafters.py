"""Drafters of the tests: one that is right as often as it is told, and one to compare them by."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optiq.backend import mx
from optiq.engine.drafters.base import Pairing
from optiq.engine.kv_cache import SequenceCache


class Forced:
    """Knows the answers, and gives a wrong token where a coin says so.

    Args:
        answers: prompt -> tokens of the answer.
        chance: of a right draft.
        vocab_size: wrong drafts lie below it.
    """

    name = "forced"
    reads_states = False

    def __init__(
        self, answers: dict[tuple[int, ...], list[int]], chance: float, vocab_size: int
    ) -> None:
        self._answers, self._chance, self._size = answers, chance, vocab_size
        self._coin = np.random.default_rng(0)

    def start(self) -> "Forced":
        return self

    def propose(
        self, tokens: Sequence[int], state: mx.array | None, cache: SequenceCache, count: int
    ) -> list[int]:
        del state, cache
        for size in range(1, len(tokens) + 1):
            answer = self._answers.get(tuple(tokens[:size]))
            if answer is not None and list(tokens[size:]) == answer[: len(tokens) - size]:
                truth = answer[len(tokens) - size :][:count]
                right = self._coin.random(len(truth)) < self._chance
                return [
                    t if ok else (t + 1) % self._size for t, ok in zip(truth, right, strict=True)
                ]
        return [0] * count

    def logits(self, *_: Any) -> mx.array:
        return mx.zeros((1, self._size))


def open_silent(path: Path | None, pairing: Pairing) -> Forced:
    """A drafter of a plug-in: never right."""
    del path
    return Forced({}, 0.0, pairing.target.vocab_size)
