"""Gemma-4's forward pass for text and images, over mlx-lm's own module tree and caches.

mlx-lm's trees run text alone. What is here drives the same modules with image features in place of
embeddings and with the mask that Gemma-4 was trained with: tokens of one image see each other in
sliding layers, while full layers stay causal.

Reference: google-deepmind/gemma, Gemma-4. transformers' own `forward` joins the tokens of an image
in every layer instead; `image_mask="all"` is that mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.gemma4 import Model as OuterModel
from mlx_lm.models.gemma4_text import Gemma4TextModel, logit_softcap
from mlx_lm.models.gemma4_text import Model as TextModel

from optiq.backend import mx, nn
from optiq.errors import UsageError
from optiq.models.families import Config
from optiq.models.families.gemma4_config import FULL, SLIDING, text_config

ImageMask = Literal["sliding", "all", "causal"]


class Cache(Protocol):
    """Keys and values of one layer, as mlx-lm's caches have them."""

    offset: int

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add the keys and values of new tokens; return all that they may see, they the last."""
        ...

    def make_mask(self, N: int, *, window_size: int | None, return_array: bool) -> Any:  # noqa: ANN401
        """The causal mask of N new tokens over what `update_and_fetch` will return."""
        ...


@runtime_checkable
class Ordered(Protocol):
    """A cache that can say what came last."""

    def last(self, count: int | None) -> tuple[mx.array, mx.array]:
        """The last keys and values, oldest first; `count` at most, None for all."""
        ...


class KeyValues(NamedTuple):
    """Keys and values of a layer, after norm and RoPE: (B, heads, tokens, head_dim)."""

    keys: mx.array
    values: mx.array


class Gemma4:
    """A Gemma-4 text tower that also takes image features.

    Args:
        model: mlx-lm's tree for `gemma4` or `gemma4_text`, dense or quantized, weights loaded.
        config: its config.json.
        image_mask: who sees whom within an image: `sliding`, as trained: each other, in sliding
            layers; `all`: each other, in every layer and beyond the window; `causal`: no exception.
            Default: what the config says.

    Attributes:
        text: the text tower.
        image_token_id: id of a soft image token; None where the config has none.
    """

    def __init__(
        self, model: nn.Module, config: Config, image_mask: ImageMask | None = None
    ) -> None:
        inner = model.language_model if isinstance(model, OuterModel) else model
        if not isinstance(inner, TextModel):
            raise UsageError(
                f"{type(model).__module__} is no Gemma-4 tree; give a gemma4 or gemma4_text model"
            )
        self._model = inner
        self.text: Gemma4TextModel = inner.model
        self.image_token_id: int | None = config.get("image_token_id")
        trained = text_config(config).get("use_bidirectional_attention") == "vision"
        self.image_mask: ImageMask = image_mask or ("sliding" if trained else "causal")
        self._pad = int(text_config(config).get("pad_token_id") or 0)

    @property
    def window(self) -> int:
        """Tokens that a sliding layer sees, the token itself included."""
        return int(self.text.window_size)

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the activations."""
        return self.text.norm.weight.dtype

    # -- caches ----------------------------------------------------------------------------------

    def make_cache(self, slack: int = 0) -> list[Cache]:
        """An empty cache for every layer that has keys of its own.

        Args:
            slack: tokens that sliding layers keep beyond their window.
        """
        rotating = self.window + slack
        caches = [
            KVCache() if layer.layer_type == FULL else RotatingKVCache(max_size=rotating)
            for layer in self._own_layers
        ]
        return cast(list[Cache], caches)

    @property
    def _own_layers(self) -> list[Any]:
        """Layers that compute keys; those after them read the keys of these."""
        return [layer for layer in self.text.layers if layer.self_attn.has_kv]

    def shared_layers(self) -> dict[str, int]:
        """The last layer of each kind that has keys of its own: what a drafter reads."""
        return {layer.layer_type: i for i, layer in enumerate(self._own_layers)}

    # -- forward ---------------------------------------------------------------------------------

    def embed(self, tokens: mx.array) -> mx.array:
        """Scaled embeddings of tokens, as the first layer and the drafter take them: (..., H)."""
        rows: mx.array = self.text.embed_tokens(tokens)
        scale: float = self.text.embed_scale
        return rows * scale

    def hidden(
        self,
        tokens: mx.array,
        cache: Sequence[Cache] | None = None,
        features: mx.array | None = None,
    ) -> mx.array:
        """States after the final norm: (B, N, H).

        Args:
            tokens: (B, N) int32, one id for each soft token of an image. An image lies in one call
                as a whole: its tokens see each other.
            cache: of earlier calls; it takes in these tokens. None: no earlier tokens, none kept.
            features: (P, H), for the P image tokens of `tokens` in reading order; None: all are
                text, whatever their ids.

        Raises:
            UsageError: if there are not as many features as image tokens.
        """
        is_image = None if features is None else self._image_tokens(tokens, features)
        ids = tokens if is_image is None else mx.where(is_image, self._pad, tokens)
        h = self.embed(ids)
        if is_image is not None and features is not None:
            at = mx.cumsum(is_image.reshape(-1).astype(mx.int32)) - 1
            rows = features.astype(h.dtype)[mx.maximum(at, 0)].reshape(h.shape)
            h = mx.where(is_image[..., None], rows, h)
        caches: list[Cache | None] = list(cache) if cache is not None else []
        caches += [None] * (len(self.text.layers) - len(caches))
        return self._run(h, self._per_layer_inputs(ids, h), caches, is_image)

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits after the soft-cap: (..., V)."""
        model = self._model
        head = self.text.embed_tokens.as_linear if model.tie_word_embeddings else model.lm_head
        out: mx.array = head(hidden)
        cap = model.final_logit_softcapping
        return out if cap is None else cast(mx.array, logit_softcap(cap, out))

    def prefill(
        self,
        tokens: Sequence[int],
        cache: Sequence[Cache],
        features: mx.array | None = None,
        chunk: int = 512,
    ) -> Iterator[mx.array]:
        """States of a prompt, a chunk at a time: (1, n, H) each.

        Args:
            tokens: the prompt.
            cache: takes it in.
            features: (P, H), of all its image tokens.
            chunk: tokens of a chunk; one with an image in it may be longer.

        Raises:
            UsageError: if there are not as many features as image tokens.
        """
        count = sum(token == self.image_token_id for token in tokens)
        _check_features(count, 0 if features is None else len(features))
        used = 0
        for part in chunks(tokens, chunk, self.image_token_id):
            ids = tokens[part]
            own = sum(token == self.image_token_id for token in ids)
            given = features[used : used + own] if features is not None and own else None
            used += own
            yield self.hidden(mx.array([list(ids)], dtype=mx.int32), cache, given)

    def _image_tokens(self, tokens: mx.array, features: mx.array) -> mx.array:
        """Where the image tokens are; as many as there are features."""
        found = tokens == (-1 if self.image_token_id is None else self.image_token_id)
        _check_features(int(cast(int, found.sum().item())), len(features))
        return found

    def _per_layer_inputs(self, ids: mx.array, h: mx.array) -> list[mx.array | None]:
        """What E2B and E4B add in every layer, from the ids and the embeddings."""
        text = self.text
        size = text.hidden_size_per_layer_input
        if not size:
            return [None] * len(text.layers)
        shape = (*ids.shape, len(text.layers), size)
        own = text.embed_tokens_per_layer(ids) * text.embed_tokens_per_layer_scale
        projected = text.per_layer_model_projection(h) * text.per_layer_projection_scale
        normed = text.per_layer_projection_norm(projected.reshape(shape))
        mixed = (normed + own.reshape(shape)) * text.per_layer_input_scale
        return [mixed[:, :, i] for i in range(len(text.layers))]

    def _run(
        self,
        h: mx.array,
        inputs: Sequence[mx.array | None],
        caches: Sequence[Cache | None],
        is_image: mx.array | None,
    ) -> mx.array:
        text = self.text
        masks: dict[str, Any] = {}
        for layer, cache in zip(text.layers, caches, strict=True):
            if layer.layer_type not in masks:
                masks[layer.layer_type] = self._mask(layer.layer_type, h, cache, is_image)
        made: list[tuple[Any, Any]] = [(None, None)] * len(text.layers)
        for index, layer in enumerate(text.layers):
            shared, offset = made[text.previous_kvs[index]]
            h, *kept = layer(
                h,
                masks[layer.layer_type],
                caches[index],
                per_layer_input=inputs[index],
                shared_kv=shared,
                offset=offset,
            )
            made[index] = (kept[0], kept[1])
        return cast(mx.array, text.norm(h))

    def _mask(self, kind: str, h: mx.array, cache: Cache | None, is_image: mx.array | None) -> Any:  # noqa: ANN401  mlx-lm's masks: an array, a word or None
        """mlx-lm's causal mask, and what the tokens of an image see besides."""
        num_tokens = h.shape[1]
        window = self.window if kind == SLIDING else None
        joined = self.image_mask == "all" or (self.image_mask == "sliding" and kind == SLIDING)
        if cache is None:
            cache = cast(Cache, KVCache())
        if is_image is None or not joined or num_tokens == 1:
            return cache.make_mask(num_tokens, window_size=window, return_array=False)
        mask = cache.make_mask(num_tokens, window_size=window, return_array=True)
        overlay = same_image(is_image)
        if self.image_mask == "sliding":
            overlay = overlay & ahead(num_tokens)
        past = mask.shape[-1] - num_tokens
        return mask | mx.pad(overlay[:, None], [(0, 0), (0, 0), (0, 0), (past, 0)])


def same_image(is_image: mx.array) -> mx.array:
    """Pairs of tokens in one image, an unbroken run of image tokens: (B, N) -> (B, N, N) bool."""
    before = mx.pad(is_image[:, :-1], [(0, 0), (1, 0)])
    run = mx.where(is_image, mx.cumsum((is_image & ~before).astype(mx.int32), axis=1), 0)
    return (run[:, :, None] == run[:, None, :]) & is_image[:, :, None]


def ahead(num_tokens: int) -> mx.array:
    """Keys that come after the query: (N, N) bool. Those before it are the causal mask's affair."""
    at = mx.arange(num_tokens)
    return at[None] > at[:, None]


def chunks(tokens: Sequence[int], size: int, image_token_id: int | None) -> list[slice]:
    """Parts of a prompt of at most `size` tokens, but for those that hold a longer image whole.

    A part that would end within an image ends before it, or takes it whole where the part begins
    with it.
    """
    if size < 1:
        raise UsageError(f"a prefill chunk must have at least 1 token, not {size}")
    inside = [a == b == image_token_id for a, b in itertools.pairwise(tokens)]
    cuts = [0, *(i + 1 for i, joined in enumerate(inside) if not joined), len(tokens)]
    parts, start = [], 0
    for cut, after in itertools.pairwise(cuts):
        if after - start > size and cut > start:
            parts.append(slice(start, cut))
            start = cut
    if start < len(tokens):
        parts.append(slice(start, len(tokens)))
    return parts


def _check_features(num_tokens: int, num_features: int) -> None:
    if num_tokens != num_features:
        raise UsageError(
            f"the prompt has {num_tokens} image tokens and {num_features} image features were "
            "given; give the images of the prompt, and one placeholder id for each soft token"
        )


def last_keys(cache: Cache, count: int | None) -> KeyValues:
    """The last keys and values of a cache, oldest first.

    Args:
        cache: one of mlx-lm's, full or rotating, or one that is `Ordered`.
        count: how many at most; None for all.

    Raises:
        UsageError: if it no longer has as many.
    """
    if isinstance(cache, Ordered):
        return KeyValues(*cache.last(count))
    if isinstance(cache, RotatingKVCache):
        keys, values, offset, _, _, index = cache.state
        if index < min(offset, keys.shape[2]):
            order = [*range(index, min(offset, keys.shape[2])), *range(index)]
            keys, values = (x[:, :, mx.array(order)] for x in (keys, values))
        kept = min(offset, keys.shape[2])
    else:
        keys, values, offset = cast(KVCache, cache).state
        kept = offset
    wanted = offset if count is None else min(count, offset)
    if wanted > kept:
        raise UsageError(
            f"the cache keeps {kept} of {offset} tokens, fewer than the {wanted} asked for; make "
            "it with more slack"
        )
    return KeyValues(keys[:, :, kept - wanted : kept], values[:, :, kept - wanted : kept])
