"""Metadata of a GGUF file -> config.json, and its tensor names -> Hugging Face names."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf.quants import dequantize

from optiq.errors import UnsupportedModel, UsageError
from optiq.models.gguf_file import GGUFFile, short

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
_BLOCK_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOP = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What a GGUF architecture is in Hugging Face's terms.

    Attributes:
        model_type: of config.json.
        class_name: `architectures` of config.json.
        hidden_act: activation of the MLP.
        block: stems of the tensors of a block -> module names.
        interleaved: rows of q and k are stored in the order of pairwise rotation.
        norm_offset: what the file's norm weights have on top.
    """

    model_type: str
    class_name: str
    block: Mapping[str, str]
    hidden_act: str = "silu"
    interleaved: bool = False
    norm_offset: float = 0.0


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _BLOCK, interleaved=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _BLOCK),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _BLOCK | _QK_NORMS),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _BLOCK | _QK_NORMS | _GEMMA_NORMS,
        hidden_act="gelu_pytorch_tanh",
        norm_offset=1.0,
    ),
}

_READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
# The number of rows of the embedding counts; the other two say how the file was made.
_WITHOUT_EFFECT = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
# Keys that change the model, but not at this value.
_NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "final_logit_softcapping": 0.0,
    "pooling_type": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}

# What Llama 3.1 and later fix; a file holds only the factors that follow.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192
_GEMMA_PATTERN = 6
_GEMMA_27B_BLOCKS = 62


def family_of(file: GGUFFile) -> Family:
    """The family of a file.

    Raises:
        UnsupportedModel: if it is none that optiq reads.
    """
    name = file.architecture
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"{file.path} is of architecture {short(name)}; of GGUF files optiq reads "
            f"{list(FAMILIES)}, so give a Hugging Face directory instead"
        )
    return FAMILIES[name]


def model_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json that a file's metadata stand for, without token ids and dtype.

    Raises:
        UsageError: if metadata are missing or of the wrong type.
        UnsupportedModel: if the file asks for something that the config cannot say.
    """
    family = family_of(file)
    reader = _Reader(file)
    reader.check_keys()
    hidden, heads = reader.positive("embedding_length"), reader.positive("attention.head_count")
    head_dim = reader.positive("attention.key_length", hidden // heads)
    reader.expect("attention.value_length", head_dim)
    reader.expect("rope.dimension_count", head_dim)
    config: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "hidden_act": family.hidden_act,
        "hidden_size": hidden,
        "intermediate_size": reader.positive("feed_forward_length"),
        "num_hidden_layers": reader.positive("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.positive("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": reader.positive("context_length"),
        "rope_theta": reader.number("rope.freq_base", 10000.0),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": HEAD not in file.tensors,
    }
    scaling = _rope_scaling(reader, head_dim, config["rope_theta"])
    if scaling is not None:
        config["rope_scaling"] = scaling
    match family.model_type:
        case "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
            config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
        case "qwen2":
            reader.expect("attention.key_length", hidden // heads)
        case "gemma3_text":
            config |= _gemma_attention(reader, hidden, heads, head_dim)
    if family.model_type != "gemma3_text":
        reader.expect("attention.sliding_window", 0)
    return config


def tensor_names(file: GGUFFile) -> dict[str, str]:
    """GGUF name -> Hugging Face name of every weight, in the order of the file.

    Raises:
        UnsupportedModel: if a tensor has no place in the family.
    """
    block = family_of(file).block
    names = {}
    for name in file.tensors:
        match = _BLOCK_TENSOR.fullmatch(name)
        if name in _TOP:
            names[name] = _TOP[name]
        elif match is not None and match[2] in block:
            names[name] = f"model.layers.{match[1]}.{block[match[2]]}.{match[3]}"
        elif name != ROPE_FACTORS:
            raise UnsupportedModel(
                f"{file.path}: tensor '{name}' has no place in architecture "
                f"'{file.architecture}' as optiq knows it; give a Hugging Face directory instead"
            )
    return names


class _Reader:
    """Metadata under the prefix of the architecture."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def key(self, suffix: str) -> str:
        return f"{self.file.architecture}.{suffix}"

    def number(self, suffix: str, default: float | None = None) -> float:
        """A positive number; required without a default."""
        key = self.key(suffix)
        if default is None:
            value = self.file.required(key, float)
        else:
            value = self.file.optional(key, float, default)
        if not 0.0 < value < math.inf:
            raise UsageError(f"{self.file.path}: '{key}' is {value}; convert the model again")
        return value

    def positive(self, suffix: str, default: int | None = None) -> int:
        """A number of things; required without a default."""
        key = self.key(suffix)
        if default is None:
            value = self.file.required(key, int)
        else:
            value = self.file.optional(key, int, default)
        if value < 1:
            raise UsageError(f"{self.file.path}: '{key}' is {value}; convert the model again")
        return value

    def expect(self, suffix: str, value: int) -> None:
        """Refuse a key with another value."""
        found = self.file.optional(self.key(suffix), int, value)
        if found != value:
            raise self.unsupported(suffix, found)

    def check_keys(self) -> None:
        """Refuse keys that change the model in a way the config would not say."""
        prefix = self.key("")
        for key, value in self.file.fields.items():
            suffix = key.removeprefix(prefix)
            if suffix == key or suffix in _READ or suffix in _WITHOUT_EFFECT:
                continue
            if suffix not in _NEUTRAL or value != _NEUTRAL[suffix]:
                raise self.unsupported(suffix, value)

    def unsupported(self, suffix: str, value: object) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.file.path}: '{self.key(suffix)}' = {short(value)} is not supported; give a "
            f"Hugging Face directory instead"
        )


def _vocab_size(file: GGUFFile) -> int:
    if EMBEDDING not in file.tensors:
        raise UsageError(f"{file.path} lacks the tensor '{EMBEDDING}'; get it whole")
    return file.shape(EMBEDDING)[0]


def _gemma_attention(reader: _Reader, hidden: int, heads: int, head_dim: int) -> dict[str, Any]:
    """Sliding layers, their rotary base and the scale of queries, which the 27B has its own."""
    is_27b = reader.positive("block_count") == _GEMMA_27B_BLOCKS
    return {
        "sliding_window": reader.positive("attention.sliding_window"),
        "sliding_window_pattern": _gemma_pattern(reader),
        "rope_local_base_freq": reader.number("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": hidden // heads if is_27b else head_dim,
    }


def _gemma_pattern(reader: _Reader) -> int:
    """Every how many layers one sees the whole context; files say it as a number or by layer."""
    suffix = "attention.sliding_window_pattern"
    value = reader.file.fields.get(reader.key(suffix), _GEMMA_PATTERN)
    if not isinstance(value, list):
        return reader.positive(suffix, _GEMMA_PATTERN)
    slides = [bool(item) for item in value]
    pattern = slides.index(False) + 1 if False in slides else len(slides) + 1
    if slides != [(layer + 1) % pattern != 0 for layer in range(len(slides))]:
        raise reader.unsupported(suffix, value)
    return pattern


def _rope_scaling(reader: _Reader, head_dim: int, theta: float) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, from the keys or from the tensor of factors."""
    factor = reader.number("rope.scaling.factor", reader.number("rope.scale_linear", 1.0))
    kind = reader.file.optional(reader.key("rope.scaling.type"), str, "linear")
    scaling: dict[str, Any] | None = None
    if kind == "yarn":
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": reader.positive(
                "rope.scaling.original_context_length"
            ),
            "beta_fast": reader.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": reader.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    elif kind != "none":
        raise reader.unsupported("rope.scaling.type", kind)
    if ROPE_FACTORS not in reader.file.tensors:
        return scaling
    if scaling is not None:
        raise UnsupportedModel(
            f"{reader.file.path} has both '{ROPE_FACTORS}' and {short(kind)} rope scaling, which "
            f"contradict; give a Hugging Face directory instead"
        )
    return _llama3_scaling(reader, head_dim, theta)


def _llama3_scaling(reader: _Reader, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The parameters whose factors the file holds; None where it scales nothing."""
    tensor = reader.file.tensors[ROPE_FACTORS]
    factors = dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(-1)
    if np.all(factors == 1.0):
        return None
    context = reader.positive("rope.scaling.original_context_length", _LLAMA3_CONTEXT)
    factor = float(np.max(factors, initial=1.0))
    expected = _llama3_factors(head_dim, theta, factor, context)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedModel(
            f"{reader.file.path}: the factors in '{ROPE_FACTORS}' are not those of Llama 3; give a "
            f"Hugging Face directory instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": context,
    }


def _llama3_factors(head_dim: int, theta: float, factor: float, context: int) -> Any:  # noqa: ANN401
    """Factors by which Llama 3 divides the rotary frequencies, float64 `(head_dim / 2,)`."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = context / wavelengths
    smooth = np.clip((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
