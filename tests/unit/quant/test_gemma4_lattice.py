"""A checkpoint trained for 4 bits keeps its grid through `convert`."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from optiq import pipeline
from optiq.artifacts import SensitivityTable
from optiq.backend import load_arrays, mx, save_arrays
from optiq.configs import AllocateConfig, JudgeConfig, MeasureConfig, RunConfig
from optiq.events import Notice
from optiq.models.load import open_quantized, open_source
from optiq.quant import sensitivity
from tests.gemma4 import TARGET, source

SMALL = sensitivity.Effort(window=32, num_windows=4, rounding_windows=4, verify_pairs=2)
EMBEDDING = "language_model.model.embed_tokens.weight"


def converted(folder, path, monkeypatch, **measure):
    """The release of a checkpoint at 5.0 bits a weight, and what was said on the way."""
    monkeypatch.setitem(sensitivity.EFFORTS, "quick", SMALL)
    told = []
    release = pipeline.convert(
        str(path),
        folder / "out",
        measure=MeasureConfig(effort="quick", **measure),
        allocate=AllocateConfig(target_bpw=5.0),
        judge=JudgeConfig(window=32, max_windows=4),
        run=RunConfig(work=folder / "work"),
        emit=lambda event: told.append(event.text) if isinstance(event, Notice) else None,
    )
    return release, told


def dense(path):
    """Matrices of an artifact, dequantized in float32, by name."""
    weights = open_quantized(path).weights()
    return {name: np.array(value) for name, value in weights.items() if value.ndim == 2}


def originals(opened):
    return {m.path + ".weight": opened.weights()[m.path + ".weight"] for m in opened.modules}


def test_every_matrix_is_bit_exact_at_5_bits(gemma_release):
    assert gemma_release.plan.bpw == 5.0
    assert {entry.option.key for entry in gemma_release.plan.entries} == {"lattice"}
    stored = dense(gemma_release.path)
    expected = originals(source())
    assert len(expected) == 83
    for name, value in expected.items():
        np.testing.assert_array_equal(stored[name], np.array(value.astype(mx.float32)), name)
    assert gemma_release.fidelity.kl_nats_per_token <= 1e-9


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.parametrize("seed", ["0", "7"])
def test_scales_that_use_all_of_bfloat16(shared, tmp_path, monkeypatch, seed):
    """The checkpoint's products were rounded: equal after rounding again."""
    tool = shared / "tools" / "tiny_gemma4.py"
    command = [sys.executable, str(tool), str(tmp_path), "--weights-only", "--scale-bits", "8"]
    subprocess.run([*command, "--seed", seed], check=True)
    release, told = converted(tmp_path, tmp_path / "target", monkeypatch)
    assert told[0].startswith("83 of 83 matrices lie on a 4-bit grid, 83 of them exactly")
    assert {entry.option.key for entry in release.plan.entries} == {"lattice"}
    stored = dense(release.path)
    for name, value in originals(open_source(str(tmp_path / "target"))).items():
        again = np.array(mx.array(stored[name]).astype(mx.bfloat16).astype(mx.float32))
        np.testing.assert_array_equal(again, np.array(value.astype(mx.float32)), name)


@pytest.mark.slow
@pytest.mark.assets
def test_weights_on_no_grid_are_rounded_and_that_is_said(shared, tmp_path, monkeypatch):
    tool = shared / "tools" / "tiny_gemma4.py"
    command = [sys.executable, str(tool), str(tmp_path), "--weights-only", "--off-lattice"]
    subprocess.run(command, check=True)
    release, told = converted(tmp_path, tmp_path / "target", monkeypatch)
    assert "no matrix lies on a 4-bit grid, so all of them are rounded" in told
    assert "lattice" not in {entry.option.key for entry in release.plan.entries}
    assert release.plan.bpw <= 5.0


def test_a_few_odd_rows_of_an_embedding_do_not_lose_it(tmp_path, monkeypatch):
    """Rows that no training moved lie on no grid; the others stay as they are."""
    folder = shutil.copytree(TARGET, tmp_path / "model")
    name = "model.language_model.embed_tokens.weight"
    odd = np.array([300, 301, 470])  # that the text never meets
    for file in folder.glob("*.safetensors"):
        weights = load_arrays(file)
        mx.eval(weights)
        if name in weights:
            rows = np.array(weights[name].astype(mx.float32))
            rows[odd] = np.random.default_rng(0).normal(size=(3, 128)) * 0.01
            weights[name] = mx.array(rows).astype(mx.bfloat16)
            save_arrays(file, weights)
    release, told = converted(tmp_path, folder, monkeypatch)
    assert told[0].startswith("83 of 83 matrices lie on a 4-bit grid, 82 of them exactly")
    assert {entry.option.key for entry in release.plan.entries} == {"lattice"}
    table = SensitivityTable.load(release.path / "optiq" / "sensitivity.json")
    report = table.modules[0].lattice
    assert (report.kind, report.exact, report.blocks) == ("q4_0", False, 1 - 3 / 512)
    found, expected = dense(release.path)[EMBEDDING], originals(open_source(str(folder)))[EMBEDDING]
    expected = np.array(expected.astype(mx.float32))
    kept = np.setdiff1d(np.arange(512), odd)
    np.testing.assert_array_equal(found[kept], expected[kept])
    assert 0 < np.abs(found[odd] - expected[odd]).max() < 0.005
