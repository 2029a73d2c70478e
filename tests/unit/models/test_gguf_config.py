"""Metadata of GGUF files -> config.json: all of it, or a refusal that names the key."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType

from optiq.errors import UnsupportedModel, UsageError
from optiq.models.gguf_config import model_config, tensor_names
from optiq.models.gguf_file import decimal, open_gguf
from optiq.upstream import build_model
from tests.unit.models.ggufs import MODEL_TYPES, Recipe, recipe

GEMMA_SLIDES = "gemma3.attention.sliding_window_pattern"


@pytest.fixture
def config_of(tmp_path):
    """A function: recipe -> config.json."""

    def run(made: Recipe) -> dict[str, Any]:
        return model_config(open_gguf(made.write(tmp_path / "model.gguf")))

    return run


@pytest.fixture
def refusal(config_of):
    """A function: recipe and kind of error -> its sentence."""

    def run(made: Recipe, kind: type[UsageError] = UnsupportedModel) -> str:
        with pytest.raises(kind) as caught:
            config_of(made)
        assert type(caught.value) is kind
        message = str(caught.value)
        assert "model.gguf" in message
        assert len(message.splitlines()) == 1
        return message

    return run


# What every file says


@pytest.mark.parametrize("arch", MODEL_TYPES)
def test_the_config_is_the_original(arch, config_of):
    made = recipe(arch)
    config = config_of(made)
    without = {"torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
    expected = {key: value for key, value in made.config.items() if key not in without}
    assert {key: config[key] for key in expected} == expected
    assert not without & set(config)
    (name,) = config["architectures"]
    assert (
        name
        == {
            "llama": "LlamaForCausalLM",
            "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM",
            "gemma3": "Gemma3ForCausalLM",
        }[arch]
    )
    assert config["hidden_act"] == ("gelu_pytorch_tanh" if arch == "gemma3" else "silu")
    assert "rope_scaling" not in config


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_means_untied(tied, config_of):
    assert config_of(recipe(tie_word_embeddings=tied))["tie_word_embeddings"] is tied


@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias"])
def test_biases_of_llama_are_told_from_the_tensors(name, config_of):
    config = config_of(recipe(**{name: True}))
    assert {key: config[key] for key in ("attention_bias", "mlp_bias")} == {
        "attention_bias": name == "attention_bias",
        "mlp_bias": name == "mlp_bias",
    }


def test_float32_becomes_the_decimal_that_was_meant(config_of):
    made = recipe(rms_norm_eps=1e-5, rope_theta=1e6)
    config = config_of(made)
    assert config["rms_norm_eps"] == 1e-5  # not 9.999999747378752e-06
    assert config["rope_theta"] == 1e6


@pytest.mark.parametrize("value", [1e-6, 3.14159, 500000.0, 1 / 3])
def test_a_decimal_gives_its_float32_back(value):
    assert np.float32(decimal(np.float32(value))) == np.float32(value)


def test_without_optional_keys_the_values_of_llama_cpp_count(config_of):
    made = recipe(head_dim=32)
    optional = ("rope.freq_base", "rope.dimension_count", "attention.head_count_kv", "vocab_size")
    for suffix in (*optional, "attention.key_length", "attention.value_length"):
        del made.fields[f"llama.{suffix}"]
    config = config_of(made)
    assert config["rope_theta"] == 10000.0
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
    assert config["head_dim"] == 128 // 4
    assert config["vocab_size"] == 320


@pytest.mark.parametrize(
    "suffix",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_key_is_refused_by_name(suffix, refusal):
    made = recipe()
    del made.fields[f"llama.{suffix}"]
    assert f"'llama.{suffix}'" in refusal(made, UsageError)


@pytest.mark.parametrize(
    ("suffix", "value"),
    [
        ("block_count", 0),
        ("block_count", -1),
        ("block_count", 2.0),
        ("block_count", True),
        ("embedding_length", "128"),
        ("attention.head_count", [4, 4]),
        ("attention.head_count", 256),  # more heads than dimensions
        ("attention.layer_norm_rms_epsilon", "small"),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("rope.freq_base", 0.0),
        ("rope.freq_base", -1.0),
        ("rope.freq_base", float("inf")),
        ("rope.scaling.factor", 0.0),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(suffix, value, refusal):
    made = recipe()
    if suffix == "attention.head_count" and value == 256:
        del made.fields["llama.attention.key_length"]
        suffix, made.fields["llama.attention.head_count"].value = "attention.key_length", value
    else:
        made.set(f"llama.{suffix}", value)
    message = refusal(made, UsageError)
    assert f"'llama.{suffix}'" in message


def test_a_whole_number_may_stand_for_a_decimal(config_of):
    made = recipe()
    made.set("llama.rope.freq_base", 10000, GGUFValueType.UINT32)
    assert config_of(made)["rope_theta"] == 10000.0


# What would change the model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.scale", 0.5),
        ("llama.expert_count", 8),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.attention.causal", False),
        ("llama.embedding_scale", 12.0),
        ("llama.something.new", "value"),
        ("llama.attention.sliding_window", 4096),
        ("llama.rope.dimension_count", 32),
        ("llama.attention.value_length", 32),
    ],
)
def test_a_key_that_the_config_cannot_say_is_refused_by_name(key, value, refusal):
    made = recipe()
    made.set(key, value)
    message = refusal(made)
    assert f"'{key}' = {value!r}" in message


@pytest.mark.parametrize(
    ("suffix", "value"),
    [
        ("expert_count", 0),
        ("final_logit_softcapping", 0.0),
        ("attention.causal", True),
        ("attention.sliding_window", 0),
        ("rope.scaling.attn_factor", 1.0),
        ("tensor_data_layout", "Meta AI original pth"),
    ],
)
def test_a_key_without_effect_is_accepted(suffix, value, config_of):
    made = recipe()
    expected = config_of(made)
    made.set(f"llama.{suffix}", value)
    assert config_of(made) == expected


def test_keys_of_others_are_not_looked_at(config_of):
    made = recipe()
    expected = config_of(made)
    made.set("general.quantized_by", "somebody")
    made.set("quantize.imatrix.entries_count", 7)
    assert config_of(made) == expected


def test_heads_of_qwen2_must_fill_the_embedding(refusal, config_of):
    made = recipe("qwen2")
    made.set("qwen2.attention.key_length", 32)
    assert config_of(made)["head_dim"] == 32
    made.set("qwen2.attention.key_length", 64)
    assert "'qwen2.attention.key_length' = 64" in refusal(made)


# Rotary scaling


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 1.0}, None),
        ({"type": "linear", "factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 4096, "finetuned": True},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
    ],
)
def test_rope_scaling_by_keys(keys, expected, config_of):
    made = recipe()
    for key, value in keys.items():
        made.set(f"llama.rope.scaling.{key}", value)
    config = config_of(made)
    assert config.get("rope_scaling") == expected
    build_model(config)  # mlx-lm knows the type


def test_the_older_key_of_a_linear_factor(config_of):
    made = recipe()
    made.set("llama.rope.scale_linear", 2.0)
    assert config_of(made)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_other_rope_scaling_is_refused_by_name(refusal):
    made = recipe()
    made.set("llama.rope.scaling.type", "longrope")
    assert "longrope" in refusal(made)


def test_yarn_needs_its_original_context(refusal):
    made = recipe()
    made.set("llama.rope.scaling.type", "yarn")
    assert "'llama.rope.scaling.original_context_length'" in refusal(made, UsageError)


def llama3(factor: float = 8.0, context: int = 8192) -> Recipe:
    """A file with the factors that mlx-lm's own Llama 3 has."""
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }
    made = recipe(rope_theta=500000.0, rope_scaling=scaling)
    plain = 500000.0 ** (np.arange(0, 64, 2) / 64)
    scaled = np.array(build_model(made.config).layers[0].self_attn.rope._freqs)
    made.tensors["rope_freqs.weight"] = (scaled / plain).astype(np.float32)
    return made


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_llama_3_become_its_scaling(factor, config_of):
    made = llama3(factor)
    factors = made.tensors["rope_freqs.weight"]
    assert len(np.unique(factors)) > 3  # plain, scaled and in between
    assert config_of(made)["rope_scaling"] == made.config["rope_scaling"]


def test_factors_for_another_context(config_of, refusal):
    made = llama3(context=4096)
    assert "not those of Llama 3" in refusal(made)
    made.set("llama.rope.scaling.original_context_length", 4096)
    assert config_of(made)["rope_scaling"] == made.config["rope_scaling"]


def test_factors_of_one_scale_nothing(config_of):
    made = recipe()
    made.tensors["rope_freqs.weight"] = np.ones(32, np.float32)
    assert "rope_scaling" not in config_of(made)


@pytest.mark.parametrize("change", ["one value", "length", "nan"])
def test_other_factors_are_refused(change, refusal):
    made = llama3()
    factors = made.tensors["rope_freqs.weight"]
    if change == "length":
        made.tensors["rope_freqs.weight"] = factors[:-1]
    else:
        factors[20] = factors[20] * 1.01 if change == "one value" else np.nan
    assert "not those of Llama 3" in refusal(made)


def test_factors_beside_other_scaling_are_refused(refusal):
    made = llama3()
    made.set("llama.rope.scaling.factor", 2.0)
    assert "contradict" in refusal(made)


# Gemma's sliding layers


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (2, 2),
        ([True, True, False], 3),
        ([True, False, True], 2),
        ([False, False, False], 1),
        (None, 6),  # what llama.cpp takes where the file says nothing
    ],
)
def test_which_layers_of_gemma_slide(value, pattern, config_of):
    made = recipe("gemma3")
    del made.fields[GEMMA_SLIDES]
    if value is not None:
        made.set(GEMMA_SLIDES, value)
    assert config_of(made)["sliding_window_pattern"] == pattern


def test_layers_that_slide_without_a_pattern_are_refused(refusal):
    made = recipe("gemma3")
    made.set(GEMMA_SLIDES, [True, False, False])
    assert GEMMA_SLIDES in refusal(made)


def test_gemma_without_a_window_is_refused(refusal):
    made = recipe("gemma3")
    del made.fields["gemma3.attention.sliding_window"]
    assert "'gemma3.attention.sliding_window'" in refusal(made, UsageError)


def test_gemma_27b_scales_its_queries_by_another_number(config_of):
    made = recipe("gemma3")
    assert config_of(made)["query_pre_attn_scalar"] == 64
    made.set("gemma3.block_count", 62)
    assert config_of(made)["query_pre_attn_scalar"] == 128 // 4


# Names


@pytest.mark.parametrize("arch", MODEL_TYPES)
def test_names_are_those_of_the_gguf_package_reversed(arch, tmp_path):
    made = recipe(arch)
    names = tensor_names(open_gguf(made.write(tmp_path / "model.gguf")))
    assert list(names) == list(made.tensors)
    kinds = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    package = gguf.get_tensor_name_map(kinds[arch], made.config["num_hidden_layers"])
    for name, hf_name in names.items():
        assert package.get_name(hf_name, (".weight", ".bias")) == name
    assert set(names.values()) == set(made.weights)


def test_factors_of_rope_are_no_weight(tmp_path):
    path: Path = llama3().write(tmp_path / "model.gguf")
    assert "rope_freqs.weight" not in tensor_names(open_gguf(path))


# Reading of single values


def test_arrays_are_checked_for_their_type(tmp_path):
    made = recipe()
    made.set("numbers", [1, 2, 3])
    made.set("flags", [True, False])
    made.set("floats", [0.5])
    file = open_gguf(made.write(tmp_path / "model.gguf"))
    assert file.array("numbers", int) == [1, 2, 3]
    assert file.array("flags", bool) == [True, False]
    assert file.array("floats", float) == [0.5]
    assert file.array("absent", str) == []
    for key, kind in (("numbers", str), ("flags", int), ("general.name", str)):
        with pytest.raises(UsageError, match=f"'{key}' is no array of {kind.__name__}"):
            file.array(key, kind)


def test_a_value_in_a_message_is_cut(tmp_path):
    made = recipe()
    made.set("llama.block_count", "x" * 500)
    file = open_gguf(made.write(tmp_path / "model.gguf"))
    with pytest.raises(UsageError) as caught:
        file.required("llama.block_count", int)
    assert len(str(caught.value)) < 200 + len(str(file.path))
