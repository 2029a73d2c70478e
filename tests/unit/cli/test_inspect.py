"""What inspect reads from a directory, ours or not."""

import json

import pytest

from optiq.artifacts import KEEP, BitPlan
from optiq.backend import mx
from optiq.cli.main import run
from tests.unit.cli.fakes import make_fidelity, make_plan


def quantized(entries, path):
    """A directory with one packed or kept matrix per (name, shape, option)."""
    tensors, quantization = {}, {"bits": 4, "group_size": 64}
    for name, shape, option in entries:
        weight = mx.zeros(shape, mx.bfloat16)
        if option == KEEP:
            tensors[f"{name}.weight"] = weight
            continue
        packed = mx.quantize(weight, option.group_size, option.bits)
        for leaf, value in zip(("weight", "scales", "biases"), packed, strict=True):
            tensors[f"{name}.{leaf}"] = value
        quantization[name] = {"bits": option.bits, "group_size": option.group_size}
    tensors["model.norm.weight"] = mx.zeros(64, mx.bfloat16)
    path.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    config = {"model_type": "llama", "quantization": quantization}
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture
def ours(tmp_path):
    plan: BitPlan = make_plan()
    quantized([(e.path, e.shape, e.option) for e in plan.entries], tmp_path)
    plan.save(tmp_path / "optiq" / "plan.json")
    make_fidelity().save(tmp_path / "optiq" / "fidelity.json")
    return tmp_path


def test_ours_by_layer_with_its_provenance(ours, capsys):
    assert run(["inspect", str(ours)]) == 0
    text = capsys.readouterr().out
    assert "model.embed_tokens" in text
    assert f"{make_plan().bpw:.4f} bpw" in text
    assert str((ours / "model.safetensors").stat().st_size) in text
    assert "0.0123 +- 0.0009" in text
    assert "synthetic (llama, bfloat16)" in text


def test_bpw_is_counted_from_the_files_not_read_from_the_plan(ours, capsys):
    path = ours / "optiq" / "plan.json"
    wrong = json.loads(path.read_text()) | {"bpw": 1.0}
    path.write_text(json.dumps(wrong))
    assert run(["inspect", str(ours), "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["bpw"] == pytest.approx(make_plan().bpw, rel=1e-12)
    assert parsed["fidelity"]["kl_se"] == 0.0009


def test_a_picture_of_the_plan(ours, tmp_path):
    pytest.importorskip("matplotlib")
    assert run(["inspect", str(ours), "--plot", str(tmp_path / "plan.svg")]) == 0
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")


def test_a_foreign_directory_by_what_its_files_say(ours, capsys):
    for file in (ours / "optiq").iterdir():
        file.unlink()
    assert run(["inspect", str(ours)]) == 0
    text = capsys.readouterr().out
    assert "not written by optiq" in text
    assert f"{make_plan().bpw:.4f} bpw" in text
    assert run(["inspect", str(ours), "--plot", "x.svg"]) == 2
    assert "--plot needs a plan" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_what_is_no_model_directory(name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(["inspect", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
