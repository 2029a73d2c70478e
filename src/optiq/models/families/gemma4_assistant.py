"""Gemma-4's drafter: four layers of queries that read the keys and values of the target.

`gemma4_assistant` and `gemma4_unified_assistant`, which mlx-lm does not have. The blocks are
mlx-lm's own Gemma-4 layers; every one takes its keys from the target's last layer of its kind.

Reference: transformers `Gemma4UnifiedAssistantForCausalLM`. Implementations differ in the position
of a draft and in how many sliding keys it sees past the window; both are arguments here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

from mlx_lm.models.gemma4_text import DecoderLayer, ModelArgs

from optiq.backend import mx, nn
from optiq.errors import UnsupportedModel, UsageError
from optiq.models.families import Config, Family
from optiq.models.families.gemma4 import Cache, Gemma4, KeyValues, last_keys
from optiq.models.families.gemma4_config import FULL, SLIDING, normalized_text

_TARGET_HIDDEN = {"gemma4_assistant": 1536, "gemma4_unified_assistant": 3840}


class Draft(NamedTuple):
    """What one step of the drafter gives.

    Attributes:
        logits: (B, 1, V); there is no soft-cap.
        hidden: (B, 1, H of the target), the `hidden` of the next step.
    """

    logits: mx.array
    hidden: mx.array


class _Body(nn.Module):
    """Embedding, layers and norm, under the names of the files."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args, i) for i in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class _Centroids(nn.Module):
    """The head of the small drafters: only tokens near the best of a few thousand centroids count.

    Args:
        args: of the text part.
        num_centroids: they share the vocabulary evenly.
        top_k: centroids whose tokens get their own logits; all others get one below the least.
    """

    def __init__(self, args: ModelArgs, num_centroids: int, top_k: int) -> None:
        super().__init__()
        self.centroids = nn.Linear(args.hidden_size, num_centroids, bias=False)
        self.token_ordering = mx.zeros((args.vocab_size,), dtype=mx.int32)
        self._top_k = top_k

    def __call__(self, h: mx.array, embed: nn.Module) -> mx.array:
        scores: mx.array = self.centroids(h)
        best = mx.argpartition(-scores, self._top_k - 1, axis=-1)[..., : self._top_k]
        clusters = self.token_ordering.reshape(scores.shape[-1], -1)
        ids = clusters[best].reshape(*h.shape[:-1], -1)
        logits = (embed(ids) @ h[..., None])[..., 0]
        shape = (*h.shape[:-1], self.token_ordering.shape[0])
        rest = mx.broadcast_to(logits.min() - 1, shape)
        return mx.put_along_axis(rest, ids, logits, axis=-1)


class Model(nn.Module):
    """The module tree of a drafter.

    Args:
        config: normalized.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        args = ModelArgs.from_dict(config["text_config"])
        target = config["backbone_hidden_size"]
        self.args = args
        self.model = _Body(args)
        self.pre_projection = nn.Linear(2 * target, args.hidden_size, bias=False)
        self.post_projection = nn.Linear(args.hidden_size, target, bias=False)
        if config.get("use_ordered_embeddings"):
            sizes = config["num_centroids"], config["centroid_intermediate_top_k"]
            self.masked_embedding = _Centroids(args, *sizes)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The weights without a copy of the tied embedding."""
        return {name: value for name, value in weights.items() if name != "lm_head.weight"}

    @property
    def layers(self) -> list[DecoderLayer]:
        """The blocks."""
        return self.model.layers

    def __call__(
        self,
        embedded: mx.array,
        hidden: mx.array,
        shared: Mapping[str, KeyValues],
        position: int | mx.array,
        masks: Mapping[str, mx.array] | None = None,
    ) -> Draft:
        """One draft step.

        Args:
            embedded: (B, 1, H) of the target: its scaled embedding of the last token.
            hidden: (B, 1, H) of the target: its state after the final norm at the position that
                predicted that token; from the second step on, `Draft.hidden` of the step before.
            shared: keys and values of the target by kind of layer.
            position: of the query, the same for all steps of a round; one for all sequences, or
                (B,) int32.
            masks: (B, 1, 1, keys) bool by kind of layer, where not all keys are visible.
        """
        h = self.pre_projection(mx.concatenate([embedded, hidden.astype(embedded.dtype)], axis=-1))
        for layer in self.layers:
            kv = shared[layer.layer_type]
            mask = None if masks is None else masks[layer.layer_type]
            h, _, _ = layer(h, mask, None, shared_kv=(kv.keys, kv.values), offset=position)
        h = self.model.norm(h)
        return Draft(self._logits(h), self.post_projection(h))

    def _logits(self, h: mx.array) -> mx.array:
        embed = self.model.embed_tokens
        if "masked_embedding" in self:
            return self.masked_embedding(h, embed)
        return cast(mx.array, embed.as_linear(h))


@dataclasses.dataclass(frozen=True)
class Drafting:
    """Where implementations of the drafter differ.

    Attributes:
        position_base: the query stands at n - `position_base`, for n tokens with the one to be
            drafted from, which is not in the cache yet: 1 is the place of that token.
        sliding_keys: how many of the last keys a sliding layer sees; None: the window.
    """

    position_base: int = 1
    sliding_keys: int | None = None


class Gemma4Drafter:
    """A drafter bound to its target.

    Args:
        model: a tree of this module, weights loaded.
        target: the model it drafts for.
        drafting: position and visible keys.

    Raises:
        UsageError: if it was not made for such a target.
    """

    def __init__(self, model: Model, target: Gemma4, drafting: Drafting | None = None) -> None:
        self.model, self.target = model, target
        self.drafting = drafting or Drafting()
        self._layers = target.shared_layers()
        _check_pair(model, target)

    def shared(self, cache: Sequence[Cache]) -> dict[str, KeyValues]:
        """Keys and values that the drafter sees, from one of `target.make_cache`.

        Raises:
            UsageError: if the cache keeps fewer sliding keys than asked for.
        """
        sliding = self.drafting.sliding_keys or self.target.window
        counts = {FULL: None, SLIDING: sliding}
        return {kind: last_keys(cache[i], counts[kind]) for kind, i in self._layers.items()}

    def step(
        self, token: mx.array, hidden: mx.array, shared: Mapping[str, KeyValues], num_tokens: int
    ) -> Draft:
        """One draft step of a round.

        Args:
            token: (B, 1) int32, the last token, or the last draft.
            hidden: (B, 1, H), see `Model`.
            shared: of `shared`, the same for all steps of a round.
            num_tokens: n at the start of the round: cached tokens and the one after them.
        """
        position = num_tokens - self.drafting.position_base
        return self.model(self.target.embed(token), hidden, shared, position)

    def drafts(
        self, token: int, hidden: mx.array, shared: Mapping[str, KeyValues], num_tokens: int
    ) -> Iterator[Draft]:
        """The steps of a round without end, each from the most likely token of the one before."""
        last = mx.array([[token]])
        while True:
            draft = self.step(last, hidden, shared, num_tokens)
            yield draft
            last, hidden = draft.logits.argmax(axis=-1), draft.hidden


def _check_pair(model: Model, target: Gemma4) -> None:
    """Refuse a drafter of another target."""
    inputs = model.post_projection.weight.shape[0]
    hidden = target.text.norm.weight.shape[0]
    _agree("hidden size of the target", inputs, hidden)
    _agree("vocabulary", model.args.vocab_size, target.text.vocab_size)
    layers = [layer for layer in target.text.layers if layer.self_attn.has_kv]
    for layer in model.layers:
        kind = layer.layer_type
        if kind not in target.shared_layers():
            raise UsageError(f"the drafter reads a layer of kind '{kind}', the target has none")
        theirs = layers[target.shared_layers()[kind]].self_attn
        own = layer.self_attn
        _agree(f"head size of the {kind} layers", own.head_dim, theirs.head_dim)
        _agree(f"KV heads of the {kind} layers", own.n_kv_heads, theirs.n_kv_heads)


def _agree(what: str, drafter: int, target: int) -> None:
    if drafter != target:
        raise UsageError(
            f"the drafter was not made for this target: {what} is {drafter} in the drafter and "
            f"{target} in the target; give the assistant of the same model"
        )


def normalized(config: Config) -> Config:
    """A drafter's config with everything that `build` reads.

    Raises:
        UnsupportedModel: if it is of a kind that optiq does not run.
    """
    kind = str(config["model_type"])
    given = dict(config.get("text_config") or {})
    size = given.get("hidden_size_per_layer_input")
    text = normalized_text(given, kind.replace("_assistant", "_text"))
    text |= {"num_kv_shared_layers": text["num_hidden_layers"], "hidden_size_per_layer_input": 0}
    head = {
        "num_centroids": config.get("num_centroids", 2048),
        "centroid_intermediate_top_k": config.get("centroid_intermediate_top_k", 32),
    }
    if config.get("use_ordered_embeddings") and text["vocab_size"] % head["num_centroids"]:
        raise UnsupportedModel(
            f"{head['num_centroids']} centroids do not share a vocabulary of "
            f"{text['vocab_size']} evenly; get config.json again"
        )
    if size or text["enable_moe_block"] or text["use_double_wide_mlp"]:
        raise UnsupportedModel(
            "this drafter has per-layer inputs, experts or wide MLPs, which no Gemma-4 assistant "
            "has; get config.json again"
        )
    hidden = config.get("backbone_hidden_size", _TARGET_HIDDEN[kind])
    return config | head | {"text_config": text, "backbone_hidden_size": hidden}


def build(config: Config) -> nn.Module:
    """The module tree of a normalized config, with random parameters."""
    return cast(nn.Module, Model(config))


FAMILY = Family(normalized, build, drafter=True)
