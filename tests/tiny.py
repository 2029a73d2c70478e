"""Tiny random checkpoints of several families, with a byte-level tokenizer."""

import json
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from optiq.backend import mx
from optiq.upstream import build_model

VOCAB = 320
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": 259,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_untied": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "num_hidden_layers": 3,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "sliding_window_pattern": 3,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "global_head_dim": 64,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 128,
        "vocab_size_per_layer_input": VOCAB,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"tie_word_embeddings": False},
    "mistral3": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
}


def tiny_config(family: str = "llama", **overrides: Any) -> dict[str, Any]:
    """The config.json of a tiny model; `overrides` win over the table."""
    config = {"model_type": family} | _COMMON | FAMILIES[family] | overrides
    if family == "mistral3":
        outer = {"model_type": family, "torch_dtype": "bfloat16", "eos_token_id": 258}
        return outer | {"text_config": config | {"model_type": "llama"}}
    return config


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """A tokenizer with one id below 256 for each byte of UTF-8, and four special tokens."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[2],
        "pad_token": SPECIALS[3],
        "model_max_length": 100_000,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tiny_weights(config: dict[str, Any], seed: int = 0) -> dict[str, mx.array]:
    """Random bfloat16 parameters under the names of mlx-lm's module tree."""
    mx.random.seed(seed)  # of what the modules make themselves, such as biases
    key = mx.random.key(seed)
    weights = {}
    tied = config.get("tie_word_embeddings", False)
    for name, value in sorted(tree_flatten(build_model(config).parameters())):
        if tied and name == "lm_head.weight":
            continue  # gemma3_text makes it, and drops it when the checkpoint has none
        key, use = mx.random.split(key)
        noise = mx.random.normal(value.shape, key=use)
        weight = noise * value.shape[-1] ** -0.5 if value.ndim > 1 else value + 0.1 * noise
        weights[name] = weight.astype(mx.bfloat16)
    return weights


def tiny_checkpoint(
    folder: Path, family: str = "llama", *, seed: int = 0, **overrides: Any
) -> Path:
    """Write a checkpoint into `folder/family` and return that path.

    Args:
        folder: an existing directory.
        family: a name of `FAMILIES`.
        seed: of the weights.
        overrides: fields of the config.
    """
    out = folder / family
    out.mkdir()
    config = tiny_config(family, **overrides)
    (out / "config.json").write_text(json.dumps(config))
    weights = tiny_weights(config, seed)
    mx.save_safetensors(str(out / "model.safetensors"), weights, metadata={"format": "pt"})
    write_tokenizer(out)
    return out
