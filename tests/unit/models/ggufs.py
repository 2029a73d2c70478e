"""Tiny GGUF files, written as llama.cpp's converter writes them.

Names of tensors and metadata come from the gguf package, never from optiq.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType, GGUFWriter, TokenType
from gguf.gguf_writer import GGUFValue
from gguf.quants import quantize
from tokenizers import pre_tokenizers

from optiq.backend import mx
from tests.tiny import SPECIALS, TEMPLATE, VOCAB, tiny_config, tiny_weights

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}

# No value is a default of optiq or mlx-lm, so that one which gets lost shows.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "gemma3": {
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 8,
        "rope_local_base_freq": 300.0,
    },
}
COMMON = {"rope_theta": 700.0, "rms_norm_eps": 1e-3}

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["t h", "th e", "Ġ the", "1 2", "3 4", "12 34", "Ġ Ġ", "Ã ©", "Ċ Ċ", "T T", "' T"]
TOOL_TOKEN = "<tool_call>"
TOOL_ID = len(ALPHABET) + len(SPECIALS) + len(MERGES)
SPM_MERGES = ["h e", "l l", "he ll", "hell o", "\u2581 hello", "o r", "\u2581 w"]

Array = np.ndarray[Any, Any]


@dataclasses.dataclass
class Packed:
    """Bytes of a tensor, `(..., bytes of a row)` uint8, and their type."""

    data: Array
    kind: Kind


@dataclasses.dataclass
class Recipe:
    """What a file will hold; a test changes it before it writes.

    Attributes:
        arch: `general.architecture`.
        config: config.json of the model.
        weights: its weights under Hugging Face's names, float32.
        fields: metadata by key.
        tensors: float32, or packed, by their names in the file.
    """

    arch: str
    config: dict[str, Any]
    weights: dict[str, Array]
    fields: dict[str, GGUFValue]
    tensors: dict[str, Array | Packed]

    def set(self, key: str, value: Any, kind: GGUFValueType | None = None) -> None:
        """Add or replace a metadata value."""
        self.fields[key] = GGUFValue(value, kind or GGUFValueType.get_type(value))

    def pack(self, kind: Kind) -> None:
        """Give all matrices a type; vectors stay float32, as they do in llama.cpp."""
        for number, (name, values) in enumerate(self.tensors.items()):
            if not isinstance(values, Packed) and values.ndim > 1:
                self.tensors[name] = packed(values, kind, seed=number)

    def write(self, path: Path) -> Path:
        """Write the file."""
        writer = GGUFWriter(path, self.arch)
        for key, field in self.fields.items():
            writer.add_key_value(key, field.value, field.type, field.sub_type)
        for name, values in self.tensors.items():
            if isinstance(values, Packed):
                writer.add_tensor(name, values.data, raw_dtype=values.kind)
            else:
                writer.add_tensor(name, values.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def recipe(arch: str = "llama", *, seed: int = 0, **overrides: Any) -> Recipe:
    """A tiny random model with a byte-level vocabulary; `overrides` are of its config."""
    config = tiny_config(MODEL_TYPES[arch], **(COMMON | CONFIGS[arch] | overrides))
    weights = {name: value.copy() for name, value in _weights(json.dumps(config), seed).items()}
    writer = GGUFWriter(None, arch)
    _add_config(writer, arch, config)
    fields = {k: v for k, v in writer.kv_data[0].items() if k != "general.architecture"}
    made = Recipe(arch, config, weights, fields, _converted(arch, config, weights))
    add_byte_level(made)
    return made


@functools.cache
def _weights(config: str, seed: int) -> dict[str, Array]:
    weights = tiny_weights(json.loads(config), seed)
    return {name: np.array(value.astype(mx.float32)) for name, value in weights.items()}


def _add_config(writer: GGUFWriter, arch: str, config: dict[str, Any]) -> None:
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if arch != "qwen2":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if arch == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config["head_dim"])
    if arch == "gemma3":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 3)
        writer.add_float32("gemma3.rope.freq_base_swa", config["rope_local_base_freq"])


def _converted(
    arch: str, config: dict[str, Any], weights: dict[str, Array]
) -> dict[str, Array | Packed]:
    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[arch],
        config["num_hidden_layers"],
    )
    tensors: dict[str, Array | Packed] = {}
    for hf_name, value in weights.items():
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        if arch == "llama" and ".q_proj." in hf_name:
            value = permuted(value, config["num_attention_heads"])
        if arch == "llama" and ".k_proj." in hf_name:
            value = permuted(value, config["num_key_value_heads"])
        if arch == "gemma3" and hf_name.endswith("norm.weight"):
            value = value + 1
        tensors[name] = value.copy()
    return tensors


def permuted(value: Array, num_heads: int) -> Array:
    """Rows in the order of pairwise rotation, as the converter's `permute` leaves them."""
    halves = value.reshape(num_heads, 2, value.shape[0] // num_heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def add_byte_level(made: Recipe, pre: str = "gpt-2") -> None:
    """The vocabulary of `tests.tiny`, and behind it merges, a user's token and unused ones."""
    tokens = [*ALPHABET, *SPECIALS, *("".join(merge.split()) for merge in MERGES), TOOL_TOKEN]
    types = [TokenType.NORMAL] * len(tokens)
    types[256:260] = [TokenType.CONTROL] * 4
    types[-1] = TokenType.USER_DEFINED
    for number in range(len(tokens), VOCAB):
        tokens.append(f"[PAD{number}]")
        types.append(TokenType.UNUSED)
    made.set("tokenizer.ggml.model", "gpt2")
    made.set("tokenizer.ggml.pre", pre)
    made.set("tokenizer.ggml.tokens", tokens)
    made.set("tokenizer.ggml.token_type", [int(kind) for kind in types])
    made.set("tokenizer.ggml.merges", list(MERGES))
    made.set("tokenizer.ggml.bos_token_id", 256)
    made.set("tokenizer.ggml.eos_token_id", 258)
    made.set("tokenizer.ggml.padding_token_id", 259)
    made.set("tokenizer.ggml.add_bos_token", False)
    made.set("tokenizer.chat_template", TEMPLATE)


def add_sentencepiece(made: Recipe) -> None:
    """A vocabulary as SentencePiece makes it: bytes for what the pieces lack, merges beside."""
    pieces = ["\u2581", *"abcdehlnorstwy", *("".join(merge.split()) for merge in SPM_MERGES)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    types += [TokenType.NORMAL] * len(pieces)
    for key in [key for key in made.fields if key.startswith("tokenizer.")]:
        del made.fields[key]
    made.set("tokenizer.ggml.model", "llama")
    made.set("tokenizer.ggml.tokens", tokens)
    made.set("tokenizer.ggml.scores", [-float(number) for number in range(len(tokens))])
    made.set("tokenizer.ggml.token_type", [int(kind) for kind in types])
    made.set("tokenizer.ggml.merges", list(SPM_MERGES))
    made.set("tokenizer.ggml.unknown_token_id", 0)
    made.set("tokenizer.ggml.bos_token_id", 1)
    made.set("tokenizer.ggml.eos_token_id", 2)


# Where the float16 scales of a block lie.
_SCALES_AT = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}


def packed(values: Array, kind: Kind, seed: int = 0) -> Packed:
    """Values in a type; types that the gguf package cannot write get random blocks instead."""
    if kind in _SCALES_AT:
        return Packed(random_blocks(values.shape, kind, seed), kind)
    data = quantize(values.astype(np.float32), kind)
    return Packed(data.view(np.uint8), kind)


def random_blocks(shape: tuple[int, ...], kind: Kind, seed: int) -> Array:
    """Blocks with random codes and small finite scales, `(rows, bytes of a row)` uint8."""
    values, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // values, size_bytes), dtype=np.uint8)
    for at in _SCALES_AT.get(kind, ()):
        scales = rng.uniform(1e-4, 1e-2, blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)
