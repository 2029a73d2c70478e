"""What the loop knows of a model: its past, the states after tokens, and their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from optiq.backend import mx, nn
from optiq.engine.kv_cache import SequenceCache
from optiq.errors import UnsupportedModel
from optiq.models.families.gemma4 import Gemma4
from optiq.upstream import make_prompt_cache


class Target(Protocol):
    """A model that writes.

    Attributes:
        vocab_size: logits of a token.
        image_token_id: id of a soft image token; None where it takes no images.
    """

    vocab_size: int
    image_token_id: int | None

    def make_cache(self, slack: int = 0) -> SequenceCache:
        """An empty past.

        Args:
            slack: tokens beyond their window that sliding layers keep.

        Raises:
            UnsupportedModel: naming a kind of cache that the engine does not know.
        """
        ...

    def states(
        self, tokens: mx.array, cache: SequenceCache, features: mx.array | None = None
    ) -> mx.array:
        """What `logits` takes, after each token: (B, N, any).

        Args:
            tokens: (B, N) int32.
            cache: takes them in.
            features: (P, H), of the P image tokens among them.
        """
        ...

    def logits(self, states: mx.array) -> mx.array:
        """Logits after the soft-cap: (..., vocab_size)."""
        ...

    def hidden(self, tokens: mx.array, cache: SequenceCache) -> mx.array:
        """States after the final norm: (B, N, H); text alone.

        Raises:
            UnsupportedModel: if the model does not give them.
        """
        ...


class TreeTarget:
    """A model of mlx-lm's; its states are its logits.

    Args:
        model: the module tree.
        vocab_size: logits of a token.
        kv_bits: see `SequenceCache`.
    """

    image_token_id: int | None = None

    def __init__(self, model: nn.Module, vocab_size: int, kv_bits: int | None = None) -> None:
        self.model, self.vocab_size, self._kv_bits = model, vocab_size, kv_bits

    def make_cache(self, slack: int = 0) -> SequenceCache:
        """See `Target`."""
        return SequenceCache(make_prompt_cache(self.model), slack, self._kv_bits)

    def states(
        self, tokens: mx.array, cache: SequenceCache, features: mx.array | None = None
    ) -> mx.array:
        """See `Target`."""
        assert features is None
        out: mx.array = self.model(tokens, cache=cache.layers)
        cache.length += tokens.shape[1]
        return out

    def logits(self, states: mx.array) -> mx.array:
        """See `Target`."""
        return states

    def hidden(self, tokens: mx.array, cache: SequenceCache) -> mx.array:
        """See `Target`."""
        body = getattr(getattr(self.model, "language_model", self.model), "model", None)
        if not isinstance(body, nn.Module):
            raise UnsupportedModel(
                f"{type(self.model).__module__} gives no states before its head; use another "
                "model for embeddings"
            )
        out: mx.array = body(tokens, cache=cache.layers)
        cache.length += tokens.shape[1]
        return out


class Gemma4Target:
    """A Gemma-4; its states are those after the final norm, which its drafter reads.

    Args:
        model: the text tower.
        kv_bits: see `SequenceCache`.
    """

    def __init__(self, model: Gemma4, kv_bits: int | None = None) -> None:
        self.model, self._kv_bits = model, kv_bits
        self.vocab_size = int(model.text.vocab_size)
        self.image_token_id = model.image_token_id

    def make_cache(self, slack: int = 0) -> SequenceCache:
        """See `Target`."""
        return SequenceCache(self.model.make_cache(), slack, self._kv_bits)

    def states(
        self, tokens: mx.array, cache: SequenceCache, features: mx.array | None = None
    ) -> mx.array:
        """See `Target`."""
        out = self.model.hidden(tokens, cache.layers, features)
        cache.length += tokens.shape[1]
        return out

    def logits(self, states: mx.array) -> mx.array:
        """See `Target`."""
        return self.model.logits(states)

    def hidden(self, tokens: mx.array, cache: SequenceCache) -> mx.array:
        """See `Target`."""
        return self.states(tokens, cache)


def as_row(tokens: Sequence[int]) -> mx.array:
    """Tokens of one sequence as `states` takes them: (1, N) int32."""
    return mx.array([list(tokens)], dtype=mx.int32)


def kv_note(target: Target, bits: int) -> str:
    """Which layers of a model hold keys and values in so many bits, in words.

    Raises:
        UnsupportedModel: if none does, or a head cannot be held so.
    """
    cache = target.make_cache()
    target.states(as_row([0]), cache)  # lazy: it tells sizes
    full = [leaf for leaf in cache.attention if leaf.window is None]
    if not full:
        raise UnsupportedModel(
            f"this model has no layer whose keys and values grow with the text, so kv_bits {bits} "
            "would change nothing; leave it out"
        )
    used = sum(leaf.column_bytes for leaf in full)
    plain = sum(side.nbytes for leaf in full for side in leaf.keys_and_values())
    sliding, states = len(cache.attention) - len(full), len(cache.states)
    others = [f"{kind} ({n})" for kind, n in (("sliding", sliding), ("states", states)) if n]
    stay = f", the others as they are: {', '.join(others)}" if others else ""
    return (
        f"keys and values take {bits} bits in layers of full attention ({len(full)}), {used} bytes "
        f"a token instead of {plain}{stay}"
    )


def vocabulary_of(config: dict[str, Any]) -> int:
    """`vocab_size` of a config.

    Raises:
        UnsupportedModel: if there is none.
    """
    text = config.get("text_config")
    inner = text.get("vocab_size") if isinstance(text, dict) else None
    size = config.get("vocab_size", inner)
    if not isinstance(size, int):
        raise UnsupportedModel(
            f"config.json of model_type '{config.get('model_type')}' has no vocab_size; add it"
        )
    return size
