"""Gemma-4 configs in all their forms."""

import json
import shutil

import pytest

from optiq.errors import UnsupportedModel, UsageError
from optiq.models.families import FAMILIES, Family, family_of, normalized
from optiq.models.load import open_source, read_config
from tests.gemma4 import TARGET, source
from tests.tiny import tiny_config

RAW = json.loads((TARGET / "config.json").read_text())
TEXT = RAW["text_config"]


def changed(gone=(), **text):
    """The published config without some text fields, and with others."""
    kept = {key: value for key, value in TEXT.items() if key not in gone}
    return RAW | {"text_config": kept | text}


def resaved(config=RAW):
    """As transformers writes it from 5.15 on: by layer, and without what equals its defaults."""
    text = dict(config["text_config"])
    shape = {
        "head_dim": text.pop("global_head_dim"),
        "num_key_value_heads": text.pop("num_global_key_value_heads"),
    }
    full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    for name in ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block"):
        text.pop(name)
    for name in ("num_kv_shared_layers", "use_double_wide_mlp", "tie_word_embeddings"):
        text.pop(name)
    text["per_layer_config"] = {f"{i:02d}": shape for i in full}
    top = {key: value for key, value in config.items() if key != "vocab_size"}
    return top | {"text_config": text, "transformers_version": "5.20.0"}


def test_the_published_form_says_the_same_as_before():
    made = normalized(RAW)
    assert {key: made[key] for key in RAW if key != "text_config"} == {
        key: value for key, value in RAW.items() if key != "text_config"
    }
    assert {key: made["text_config"][key] for key in TEXT} == TEXT


def test_the_saved_form_is_the_published_one_again():
    made, published = normalized(resaved())["text_config"], normalized(RAW)["text_config"]
    for name in published:
        assert made[name] == published[name], name
    assert normalized(resaved())["vocab_size"] == 512


@pytest.mark.parametrize("form", [RAW, resaved()], ids=["published", "saved"])
def test_a_checkpoint_in_both_forms(tmp_path, form):
    folder = shutil.copytree(TARGET, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(form))
    opened = open_source(str(folder))
    assert opened.parameters == source().parameters
    assert opened.modules == source().modules


def test_normalizing_twice_changes_nothing_and_the_input_is_left_alone():
    before = json.dumps(RAW)
    assert normalized(normalized(RAW)) == normalized(RAW)
    assert json.dumps(RAW) == before


def test_defaults_are_those_of_transformers():
    made = normalized({"model_type": "gemma4_unified", "text_config": {}})
    text = made["text_config"]
    assert made["vocab_size"] == text["vocab_size"] == 262_144
    assert text["hidden_size_per_layer_input"] == 0
    assert (text["sliding_window"], text["max_position_embeddings"]) == (1024, 262_144)
    assert (text["global_head_dim"], text["num_global_key_value_heads"]) == (512, None)
    assert text["num_kv_shared_layers"] == 0
    assert text["use_double_wide_mlp"] is False
    assert text["final_logit_softcapping"] is None
    kinds = text["layer_types"]
    assert [i for i, kind in enumerate(kinds) if kind == "full_attention"] == [5, 11, 17, 23, 29]
    older = normalized({"model_type": "gemma4", "text_config": {"num_hidden_layers": 8}})
    assert older["text_config"]["hidden_size_per_layer_input"] == 256
    assert older["text_config"]["sliding_window"] == 512
    assert older["text_config"]["layer_types"][5:] == [
        "full_attention",
        "sliding_attention",
        "full_attention",
    ]


def test_the_unified_text_model_is_the_text_model():
    made = normalized(TEXT | {"architectures": ["Gemma4UnifiedForCausalLM"]})
    assert made["model_type"] == "gemma4_text"
    assert made["architectures"] == ["Gemma4ForCausalLM"]
    assert made["sliding_window"] == 16
    assert "text_config" not in made


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed(hidden_activation="silu"), "with the activation 'silu'"),
        (changed(use_bidirectional_attention="all"), "generates no text"),
        (changed(layer_types=["full_attention"]), "are not 12 of"),
        (changed(layer_types=["linear"] * 12), "are not 12 of"),
        (changed(per_layer_config={"05": {"head_dim": 64}}), "differs within one kind of layer"),
        (changed(per_layer_config={"01": {"head_dim": 64}}), "differs within one kind of layer"),
        (
            changed(per_layer_config={str(i): {"sliding_window": 1} for i in (5, 11)}),
            "holds more than head_dim",
        ),
        (
            changed(
                per_layer_config={str(i): {"num_key_value_heads": 1} for i in (5, 11)},
                attention_k_eq_v=False,
            ),
            "need attention_k_eq_v",
        ),
    ],
)
def test_configs_that_mlx_lm_cannot_run(config, words):
    with pytest.raises(UnsupportedModel, match=words):
        normalized(config)


@pytest.mark.parametrize(
    "config",
    [
        changed(per_layer_config={"x": {}}),
        changed(per_layer_config=[1]),
        changed(num_hidden_layers="12", layer_types=None),
    ],
)
def test_configs_with_values_of_another_kind(config):
    with pytest.raises(UsageError, match="cannot be read"):
        normalized(config)


def test_other_families_are_left_alone():
    config = tiny_config("llama")
    assert normalized(config) is config
    assert family_of({"model_type": 3}) is None


@pytest.mark.parametrize("name", FAMILIES.names())
def test_every_family(name):
    family = FAMILIES.get(name)
    assert isinstance(family, Family)
    assert family.drafter == name.endswith("_assistant")
    made = normalized({"model_type": name})
    assert family_of(made) is not None


def test_read_config_normalizes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(resaved()))
    assert read_config(tmp_path)["text_config"]["global_head_dim"] == 64
