"""Which tokens may come next, as arrays over the vocabulary.

A grammar gives one bit a token. The bits become truth values in plain MLX operations, compiled into
one kernel, so they work wherever MLX does.
"""

from __future__ import annotations

import functools
from collections.abc import Collection

import numpy as np

from optiq.backend import mx

_BITS = 32


class Masks:
    """Masks of one model.

    Args:
        vocab_size: width of its logits.
        stop: tokens that end an answer.
    """

    def __init__(self, vocab_size: int, stop: Collection[int]) -> None:
        self.vocab_size = vocab_size
        self.stop = frozenset(stop)
        self.only = functools.lru_cache(256)(self._only)
        self.all_but = functools.lru_cache(256)(self._all_but)

    def of_bits(self, bits: bytes) -> mx.array:
        """(vocabulary,) bool of bits, lowest first; there may be more of them than tokens."""
        words = mx.array(np.frombuffer(bits, dtype=np.uint32))
        return _expanded(words)[: self.vocab_size]

    def _only(self, tokens: frozenset[int]) -> mx.array:
        """True for these tokens: (vocabulary,) bool. The arrays are kept, not made anew."""
        found = np.zeros(self.vocab_size, dtype=bool)
        found[list(tokens)] = True
        return mx.array(found)

    def _all_but(self, tokens: frozenset[int]) -> mx.array:
        """True for all other tokens: (vocabulary,) bool. The arrays are kept, not made anew."""
        found = np.ones(self.vocab_size, dtype=bool)
        found[list(tokens)] = False
        return mx.array(found)


@functools.partial(mx.compile, shapeless=False)
def _expanded(words: mx.array) -> mx.array:
    places = mx.arange(_BITS, dtype=mx.uint32)
    return ((words[:, None] >> places) & 1).astype(mx.bool_).reshape(-1)
