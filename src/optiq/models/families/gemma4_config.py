"""Gemma-4 configs in all the forms they are found in -> the one that mlx-lm reads rightly.

transformers leaves out of config.json what equals its own defaults, and mlx-lm fills in other ones;
from 5.15 on it writes the shape of full layers layer by layer; and mlx-lm takes the vocabulary from
the top level. A normalized config says everything where mlx-lm looks for it.
"""

from __future__ import annotations

from optiq.errors import UnsupportedModel
from optiq.models.families import Config, Family

_DEFAULTS: Config = {
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": None,
    "num_attention_heads": 8,
    "num_experts": None,
    "num_hidden_layers": 30,
    "num_key_value_heads": 4,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_double_wide_mlp": False,
    "vocab_size": 262_144,
}
_DEFAULTS_OF: dict[str, Config] = {
    "gemma4_text": {
        "hidden_size_per_layer_input": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 512,
        "use_bidirectional_attention": None,
        "vocab_size_per_layer_input": 262_144,
    },
    "gemma4_unified_text": {
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 262_144,
        "sliding_window": 1024,
        "use_bidirectional_attention": "vision",
        "vocab_size_per_layer_input": 0,
    },
}
_ROPE: Config = {
    "full_attention": {
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
        "rope_type": "proportional",
    },
    "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
}
_GLOBAL_HEAD_DIM = 512
_FULL_EVERY = 6
FULL, SLIDING = "full_attention", "sliding_attention"


def text_config(config: Config) -> Config:
    """The part of a Gemma-4 config that is about the text tower."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def normalized(config: Config) -> Config:
    """A gemma4, gemma4_text, gemma4_unified or gemma4_unified_text config, as mlx-lm reads it.

    `gemma4_unified_text` becomes `gemma4_text`, which is the same model in mlx-lm.

    Raises:
        UnsupportedModel: if it asks for what no implementation in mlx-lm does.
    """
    kind = str(config["model_type"])
    if kind.endswith("_text"):
        named = config | {"model_type": "gemma4_text"}
        if kind == "gemma4_unified_text":
            named["architectures"] = ["Gemma4ForCausalLM"]
        return normalized_text(named, kind)
    text = normalized_text(text_config(config), f"{kind}_text")
    return config | {"text_config": text, "vocab_size": text["vocab_size"]}


def normalized_text(text: Config, kind: str) -> Config:
    """The text part with all that mlx-lm reads, for `gemma4_text` or `gemma4_unified_text`."""
    out: Config = _DEFAULTS | _DEFAULTS_OF[kind] | text
    if out["hidden_activation"] != "gelu_pytorch_tanh":
        raise UnsupportedModel(
            f"Gemma-4 with the activation '{out['hidden_activation']}' is not supported; "
            f"mlx-lm has gelu_pytorch_tanh"
        )
    if out["use_bidirectional_attention"] not in {None, "vision"}:
        raise UnsupportedModel(
            "Gemma-4 with use_bidirectional_attention "
            f"'{out['use_bidirectional_attention']}' generates no text; optiq does not run it"
        )
    out["layer_types"] = _layer_types(out)
    out["rope_parameters"] = out.get("rope_parameters") or _ROPE
    return out | _full_layers(out)


def _layer_types(text: Config) -> list[str]:
    given = text.get("layer_types")
    count = text["num_hidden_layers"]
    if given is None:
        full = [(i + 1) % _FULL_EVERY == 0 or i == count - 1 for i in range(count)]
        return [FULL if is_full else SLIDING for is_full in full]
    if not isinstance(given, list) or len(given) != count or set(given) - {FULL, SLIDING}:
        raise UnsupportedModel(
            f"layer_types of config.json are not {count} of '{FULL}' and '{SLIDING}'; get the "
            "model again"
        )
    return list(given)


def _full_layers(text: Config) -> Config:
    """Head size and KV heads of the full layers under their global names."""
    by_layer = text.pop("per_layer_config", None)
    if not by_layer:
        head_dim = text.get("global_head_dim") or _GLOBAL_HEAD_DIM
        return {
            "global_head_dim": head_dim,
            "num_global_key_value_heads": text.get("num_global_key_value_heads"),
        }
    own = {"head_dim": text["head_dim"], "num_key_value_heads": text["num_key_value_heads"]}
    kinds: dict[str, list[Config]] = {FULL: [], SLIDING: []}
    given = {int(number): dict(value) for number, value in by_layer.items()}
    for index, kind in enumerate(text["layer_types"]):
        kinds[kind].append(own | given.get(index, {}))
    full = kinds[FULL][0] if kinds[FULL] else own
    odd = [v for v in kinds[FULL] if v != full] + [v for v in kinds[SLIDING] if v != own]
    if odd or set(full) != set(own):
        raise UnsupportedModel(
            "per_layer_config of config.json differs within one kind of layer, or holds more than "
            f"head_dim and num_key_value_heads ({(odd or [full])[0]}); mlx-lm has one shape a kind"
        )
    heads = full["num_key_value_heads"]
    if heads != own["num_key_value_heads"] and not text["attention_k_eq_v"]:
        raise UnsupportedModel(
            f"full layers with {heads} KV heads of their own need attention_k_eq_v in mlx-lm; get "
            "the published config.json"
        )
    return {"global_head_dim": full["head_dim"], "num_global_key_value_heads": heads}


FAMILY = Family(normalized)
