"""The uniform rival against stock mlx-lm."""

import contextlib
import io
import json

import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from optiq.artifacts import BITS, GROUP_SIZES, QuantOption
from optiq.backend import mx
from optiq.errors import UsageError
from optiq.events import no_emit
from optiq.models.load import open_source, size_on_disk
from optiq.quant.baseline import pick_uniform, uniform_candidates, write_uniform
from tests.tiny import tiny_checkpoint


def stock(source, bits, group_size):
    """Weights and config as stock mlx-lm quantizes the same source."""
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(source.model(), source.config, group_size, bits)
    return dict(tree_flatten(model.parameters())), config


def on_disk(folder):
    weights = {}
    for file in folder.glob("model*.safetensors"):
        weights |= mx.load(str(file))
    return weights


@pytest.mark.parametrize(
    ("family", "key"),
    [("llama", "4/64"), ("llama_untied", "3/32"), ("qwen2", "8/128"), ("qwen3_moe", "5/64")],
)
def test_files_hold_what_stock_mlx_lm_makes(tmp_path, family, key):
    source = open_source(str(tiny_checkpoint(tmp_path, family)))
    option = QuantOption.parse(key)
    write_uniform(source, option, tmp_path / "out", no_emit)
    found = on_disk(tmp_path / "out")
    wanted, config = stock(source, option.bits, option.group_size)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert mx.array_equal(found[name], value), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization"] == config["quantization"]
    assert written["quantization_config"] == config["quantization"]


def test_rows_that_the_group_does_not_divide_stay(tmp_path):
    source = open_source(str(tiny_checkpoint(tmp_path, intermediate_size=192)))
    write_uniform(source, QuantOption("affine", 4, 128), tmp_path / "out", no_emit)
    found = on_disk(tmp_path / "out")
    assert set(found) == set(stock(source, 4, 128)[0])
    assert "model.layers.0.mlp.up_proj.scales" in found
    assert "model.layers.0.mlp.down_proj.scales" not in found


def test_the_dtype_of_the_config_is_taken_as_stock_does(tmp_path):
    source = open_source(str(tiny_checkpoint(tmp_path, torch_dtype="float16")))
    write_uniform(source, QuantOption("affine", 4, 64), tmp_path / "out", no_emit)
    scales = on_disk(tmp_path / "out")["model.layers.0.mlp.up_proj.scales"]
    assert scales.dtype == mx.float16


def test_stock_loads_it_with_tokenizer_and_it_runs(tmp_path, tiny_source):
    write_uniform(tiny_source, QuantOption("affine", 4, 64), tmp_path / "out", no_emit)
    model, _ = load_model(tmp_path / "out", lazy=True)
    logits = model(mx.array([[1, 2, 3]])).astype(mx.float32)
    assert np.isfinite(np.array(logits)).all()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_source.path / name).read_bytes()


def test_sizes_are_those_of_the_written_files(tmp_path, tiny_source):
    candidates = uniform_candidates(tiny_source)
    assert len(candidates) == len(BITS) * len(GROUP_SIZES)
    for option, size_bytes in candidates[::5]:
        out = tmp_path / option.key.replace("/", "-")
        assert write_uniform(tiny_source, option, out, no_emit) == size_bytes
        assert size_on_disk(out) == size_bytes


def test_the_pick_is_the_smallest_that_is_not_smaller(tiny_source):
    candidates = uniform_candidates(tiny_source)
    sizes = [c.size_bytes for c in candidates]
    assert sizes == sorted(sizes)
    assert pick_uniform(tiny_source, 0) == candidates[0].option
    assert pick_uniform(tiny_source, sizes[4]) == candidates[4].option
    assert pick_uniform(tiny_source, sizes[4] + 1) == candidates[5].option
    assert (
        pick_uniform(tiny_source, sizes[-1] + 1)
        == candidates[-1].option
        == QuantOption("affine", 8, 32)
    )


def test_an_output_that_exists_is_refused_and_kept(tmp_path, tiny_source):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        write_uniform(tiny_source, QuantOption("affine", 4, 64), out, no_emit)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path, tiny_source):
    def fail(_event):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_uniform(tiny_source, QuantOption("affine", 4, 64), tmp_path / "out", fail)
    assert list(tmp_path.iterdir()) == []


def test_no_group_divides_anything(tmp_path):
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 2, "head_dim": 24}
    source = open_source(str(tiny_checkpoint(tmp_path, num_key_value_heads=2, **sizes)))
    with pytest.raises(UsageError, match="no uniform quantization"):
        uniform_candidates(source)
