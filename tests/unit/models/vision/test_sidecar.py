"""Side towers of several families, kept beside the text."""

import json

import numpy as np
import pytest
from mlx_lm import load as stock_load

from optiq.artifacts import KEEP, BitPlan, PlanEntry, QuantOption
from optiq.backend import mx
from optiq.errors import UnsupportedModel, UsageError
from optiq.events import no_emit
from optiq.models.load import open_quantized, open_source, read_config
from optiq.models.safetensors_io import INDEX_NAME, SIDECAR_NAME, read_headers, read_shard
from optiq.models.vision.gemma4 import Gemma4Vision
from optiq.models.vision.sidecar import has_sidecar, read_sidecar, side_tensors, write_sidecar
from optiq.quant.baseline import write_uniform
from optiq.quant.convert import write_model
from tests.gemma4 import TARGET, source
from tests.tiny import VOCAB, tiny_checkpoint, tiny_config, tiny_weights, write_tokenizer

TOWERS = {
    "gemma3": ("vision_tower.vision_model.encoder.w", "multi_modal_projector.w"),
    "qwen2_5_vl": ("visual.blocks.0.attn.qkv.weight", "visual.patch_embed.proj.weight"),
    "gemma4": ("model.vision_tower.encoder.w", "model.embed_vision.w", "model.audio_tower.w"),
}
TEXTS = {"gemma3": "gemma3_text", "qwen2_5_vl": "qwen2", "gemma4": "gemma4_text"}


def multimodal(folder, family):
    """A tiny checkpoint with a tower, as it is published."""
    config = {"model_type": family, "vocab_size": VOCAB, "eos_token_id": 258}
    config |= {"vision_config": {"model_type": "tower"}, "text_config": tiny_config(TEXTS[family])}
    prefix = {"gemma3": "language_model.", "qwen2_5_vl": "language_model."}.get(family, "")
    weights = {}
    for name, value in tiny_weights(config).items():
        plain = name.removeprefix("language_model.")
        if family == "gemma4":
            plain = plain.replace("model.", "model.language_model.", 1)
        weights[(prefix if family == "gemma3" else "") + plain] = value
    dtypes = (mx.bfloat16, mx.float16, mx.float32)
    for name, dtype in zip(TOWERS[family], dtypes, strict=False):
        weights[name] = mx.random.normal((4, 6), key=mx.random.key(len(name))).astype(dtype)
    out = folder / family
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    (out / "preprocessor_config.json").write_text('{"image_processor_type": "Some"}')
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "pt"})
    write_tokenizer(out)
    return out


def kept(source):
    """The plan that leaves every matrix as it is."""
    entries = tuple(PlanEntry(m.path, m.role, m.shape, KEEP, 0, 0.0) for m in source.modules)
    return BitPlan(source.info, entries, "16 bpw", "rtn", 16.0, 0, 0, 0.0, 0.0)


@pytest.fixture(params=list(TOWERS))
def family(request, tmp_path):
    """Name, source and an artifact with all matrices kept."""
    opened = open_source(str(multimodal(tmp_path, request.param)))
    out = tmp_path / "out"
    out.mkdir()
    write_model(opened, kept(opened), {}, out, no_emit)
    return request.param, opened, out


def test_towers_are_found_by_what_the_text_has_no_place_for(family):
    name, opened, _ = family
    assert sorted(side_tensors(opened)) == sorted(TOWERS[name])


def test_a_tower_is_kept_in_bfloat16_and_listed(family):
    name, opened, out = family
    stored = read_sidecar(out)
    for key, value in side_tensors(opened).items():
        assert stored[key].dtype == mx.bfloat16
        np.testing.assert_array_equal(
            np.array(stored[key].astype(mx.float32)),
            np.array(value.astype(mx.bfloat16).astype(mx.float32)),
        )
    index = json.loads((out / INDEX_NAME).read_text())
    listed = {key for key, file in index["weight_map"].items() if file == SIDECAR_NAME}
    assert listed == set(TOWERS[name])
    text = sum(header.size_bytes for header in read_headers(out).values())
    assert index["metadata"]["total_size"] == text + 4 * 6 * 2 * len(TOWERS[name])
    assert read_config(out)["vision_config"] == {"model_type": "tower"}
    assert (out / "preprocessor_config.json").read_text() == '{"image_processor_type": "Some"}'


def test_stock_mlx_lm_and_the_judge_read_the_text_with_or_without_it(family):
    _, opened, out = family
    tokens = mx.array([[1, 2, 3, 4]])
    expected = np.array(opened.model()(tokens).astype(mx.float32))
    for _ in range(2):
        model, _ = stock_load(str(out))
        np.testing.assert_array_equal(np.array(model(tokens).astype(mx.float32)), expected)
        assert open_quantized(out).parameters == opened.parameters
        (out / SIDECAR_NAME).unlink(missing_ok=True)
    assert not has_sidecar(out)
    with pytest.raises(UsageError, match="reads text alone"):
        read_sidecar(out)


def test_pictures_for_another_tower_are_refused(family):
    _, _, out = family
    with pytest.raises(UnsupportedModel, match="tower not supported by optiq"):
        Gemma4Vision(out, read_config(out))


def test_the_unified_model(gemma_release):
    stored = read_sidecar(gemma_release.path)
    original = side_tensors(source())
    assert len(stored) == 11
    assert set(stored) == set(original)
    for name, value in original.items():
        assert mx.array_equal(stored[name], value).item()
        assert stored[name].dtype == mx.bfloat16
    for name in ("processor_config.json", "preprocessor_config.json", "chat_template.jinja"):
        assert (gemma_release.path / name).read_bytes() == (TARGET / name).read_bytes()
    config = read_config(gemma_release.path)
    assert config["vision_config"] == source().config["vision_config"]
    assert config["eos_token_id"] == [1, 6, 14]


def test_the_file_is_the_same_each_time(tmp_path, gemma_release):
    out = tmp_path / "model"
    out.mkdir()
    index = {"metadata": {"total_size": 5}, "weight_map": {"a": "model.safetensors"}}
    (out / INDEX_NAME).write_text(json.dumps(index))
    write_sidecar(source(), out)
    written = (out / SIDECAR_NAME).read_bytes()
    assert written == (gemma_release.path / SIDECAR_NAME).read_bytes()


def test_a_text_model_has_none(tiny_source, tmp_path):
    assert side_tensors(tiny_source) == {}
    assert write_sidecar(tiny_source, tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_uniform_rival_is_as_stock_mlx_lm_writes_it(tmp_path):
    write_uniform(source(), QuantOption("affine", 4, 64), tmp_path / "out", no_emit)
    assert not has_sidecar(tmp_path / "out")


def test_headers_of_one_file(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    headers = read_shard(folder / "model.safetensors")
    assert {header.name for header in headers} == set(read_headers(folder))
    with pytest.raises(UsageError, match="no sound safetensors file"):
        read_shard(folder / "gone.safetensors")
