"""Tiny models in float32 as the engine runs them, without files."""

import functools
from collections.abc import Sequence
from typing import Any

from mlx.utils import tree_unflatten

from optiq.backend import mx
from optiq.engine.events import Event, Finished, FinishReason, Tokens, Usage
from optiq.engine.kv_cache import SequenceCache
from optiq.engine.loop import Loop
from optiq.engine.requests import Request
from optiq.engine.sampling import Sampling
from optiq.engine.target import Gemma4Target, Target, TreeTarget, as_row
from optiq.models.families import normalized
from optiq.models.families.gemma4 import Gemma4
from optiq.upstream import build_model
from tests.tiny import VOCAB, tiny_config, tiny_weights

_SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}

CONFIGS: dict[str, dict[str, Any]] = {
    "full": tiny_config("llama", **_SMALL, num_key_value_heads=1),
    "sliding": tiny_config("gemma3_text", **_SMALL, sliding_window=6, num_key_value_heads=1),
    "shared": tiny_config("gemma4_text", **_SMALL, sliding_window=6, hidden_size_per_layer_input=8),
    "arrays": {
        "model_type": "lfm2",
        "vocab_size": VOCAB,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 32,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv"],
        "rope_theta": 1e4,
        **_SMALL,
    },
    "several": {
        "model_type": "falcon_h1",
        "vocab_size": VOCAB,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "mamba_d_ssm": 32,
        "mamba_d_head": 16,
        "mamba_n_heads": 2,
        "mamba_d_state": 8,
        "rope_theta": 1e4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        **_SMALL,
    },
}
"""Kind of past -> config of a model that has it."""

_WIDE = {"hidden_size": 64, "block_dim": 64, "head_dim": 32}  # heads that can be quantized


@functools.cache
def tiny_target(
    kind: str, seed: int = 0, scale: float = 1.0, *, kv_bits: int | None = None, wide: bool = False
) -> Target:
    """A random model; `scale` multiplies its embeddings, so that its choices are clearer.

    With `kv_bits`, or if it is `wide`, its heads are wide enough for those.
    """
    config = normalized(CONFIGS[kind])
    if wide or kv_bits:
        config = config | {n: size for n, size in _WIDE.items() if n in config}
    weights = {
        name: value.astype(mx.float32) * (scale if "embed" in name and value.ndim > 1 else 1)
        for name, value in tiny_weights(config, seed).items()
    }
    model = build_model(config)
    model.update(tree_unflatten(list(weights.items())))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    if kind == "shared":
        return Gemma4Target(Gemma4(model, config), kv_bits)
    return TreeTarget(model, VOCAB, kv_bits)


def uncached(target: Target, tokens: Sequence[int]) -> mx.array:
    """Logits after every token, by mlx-lm's module or ours, without any cache: (N, V)."""
    if isinstance(target, Gemma4Target):
        return target.logits(target.model.hidden(as_row(tokens)))[0]
    assert isinstance(target, TreeTarget)
    return target.model(as_row(tokens))[0]


def read(target: Target, cache: SequenceCache, tokens: Sequence[int]) -> mx.array:
    """Logits after more tokens of a sequence: (N, V)."""
    return target.logits(target.states(as_row(tokens), cache))[0]


class Silent:
    """A reader that makes no text."""

    stopped: str | None = None

    def feed(self, tokens: Sequence[int]) -> list[Event]:
        del tokens
        return []

    def finish(self, reason: FinishReason, usage: Usage | None = None) -> list[Event]:
        return [Finished(reason, usage or Usage())]


def request(prompt: Sequence[int], max_tokens: int = 24, **settings: Any) -> Request:
    """A request that nothing but its length ends."""
    fields = {k: settings.pop(k) for k in list(settings) if k in Request.__dataclass_fields__}
    return Request(tuple(prompt), Sampling(**{"seed": 0, **settings}), max_tokens, **fields)


def written(loop: Loop, *requests: Request) -> list[list[int]]:
    """The tokens of requests that are run together."""
    sequences = [loop.add(each, Silent()) for each in requests]
    while not loop.idle:
        loop.step()
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    return [
        [token for event in s.events if isinstance(event, Tokens) for token in event.ids]
        for s in sequences
    ]
