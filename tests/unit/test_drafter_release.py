"""`convert` on a drafter: its weights by themselves, its acceptance with its target."""

import json
import subprocess
import sys

import numpy as np
import pytest

from optiq import pipeline
from optiq.artifacts import Acceptance, BitPlan
from optiq.backend import mx
from optiq.configs import AllocateConfig, ConvertConfig, JudgeConfig, MeasureConfig, RunConfig
from optiq.errors import UsageError
from optiq.events import Notice, no_emit
from optiq.models.gemma4 import load_drafter, load_target
from optiq.models.load import open_quantized, size_on_disk
from tests.gemma4 import ASSISTANT, TARGET, source

JUDGE = JudgeConfig(window=32, max_windows=6)


def convert(out, bpw=5.0, measure=None, emit=no_emit, path=ASSISTANT, **options):
    return pipeline.convert(
        str(path),
        out,
        measure=measure or MeasureConfig(effort="quick"),
        allocate=AllocateConfig(target_bpw=bpw),
        convert=ConvertConfig(**options),
        judge=JUDGE,
        run=RunConfig(work=out.parent / "work"),
        emit=emit,
    )


def test_a_drafter_on_a_grid_keeps_it(tmp_path):
    told = []
    release = convert(tmp_path / "out", emit=told.append)
    said = [event.text for event in told if isinstance(event, Notice)]
    assert said[0].startswith("a drafter does not run alone, so its matrices are scored without")
    assert said[1].startswith("23 of 23 matrices lie on a 4-bit grid, 23 of them exactly")
    assert release.fidelity is None
    assert release.acceptance is None
    assert release.plan.bpw == 5.0
    weights = open_quantized(release.path).weights()
    for name, value in source(ASSISTANT).weights().items():
        np.testing.assert_array_equal(
            np.array(weights[name].astype(mx.float32)), np.array(value.astype(mx.float32))
        )
    assert BitPlan.load(release.path / "optiq" / "plan.json") == release.plan
    assert size_on_disk(release.path) <= release.plan.model_bytes
    text = release.card.read_text()
    assert "It drafts for its target and generates nothing alone." in text
    assert "How often it is right" not in text
    assert (release.path / "tokenizer.json").is_file()


def test_acceptance_beside_its_source(tmp_path, gemma_release):
    """On its grid it makes the drafts of its source; at 3 bits other ones."""
    same = convert(tmp_path / "same", drafter_target=gemma_release.path).acceptance
    assert (same.tried, same.accepted) == (same.source_tried, same.source_accepted)
    assert same.num_tokens == 6 * 32
    assert Acceptance.load(tmp_path / "same" / "optiq" / "acceptance.json") == same
    assert "| 1 |" in (tmp_path / "same" / "README.md").read_text()
    release = convert(tmp_path / "less", bpw=3.3, drafter_target=TARGET)
    assert release.plan.bpw <= 3.3
    assert release.acceptance.source_tried[0] == same.source_tried[0]


def test_what_was_written_drafts(tmp_path):
    release = convert(tmp_path / "out", bpw=4.4)
    drafter = load_drafter(release.path, load_target(TARGET))
    quantized = json.loads((release.path / "config.json").read_text())["quantization"]
    assert {"model.embed_tokens", "pre_projection", "post_projection"} <= set(quantized)
    assert drafter.model.pre_projection.weight.shape == (64, 256)


@pytest.mark.parametrize(
    ("options", "measure", "words"),
    [
        ({"rival": True}, None, "--rival compares models that run alone"),
        ({}, MeasureConfig(verify=True), "--verify runs the model"),
        ({"drafter_target": ASSISTANT}, None, "load the target and pass it as drafter="),
        ({"drafter_target": "gone"}, None, "has no config.json"),
    ],
)
def test_what_a_drafter_cannot(tmp_path, options, measure, words):
    if options.get("drafter_target") == "gone":
        options = {"drafter_target": tmp_path / "gone"}
    with pytest.raises(UsageError, match=words):
        convert(tmp_path / "out", measure=measure, **options)
    assert not (tmp_path / "out").exists()


def test_a_target_is_for_drafters_alone(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match="--drafter-target is for drafters"):
        convert(tmp_path / "out", path=tiny_llama, drafter_target=TARGET)


def test_verbs_that_need_a_model(tmp_path):
    release = convert(tmp_path / "out")
    with pytest.raises(UsageError, match="pass it as drafter="):
        pipeline.generate(release.path, "Hello")
    with pytest.raises(UsageError, match="pass it as drafter="):
        pipeline.bench(release.path)
    with pytest.raises(UsageError, match="pass it as drafter="):
        pipeline.judge(release.path)


def test_measuring_a_drafter(tmp_path):
    config = MeasureConfig(effort="quick", rounding="rtn")
    table = pipeline.measure(str(ASSISTANT), config, RunConfig(work=tmp_path))
    assert (table.method, table.rounding) == ("static", "rtn")
    assert len(table.modules) == 23
    default = pipeline.measure(str(ASSISTANT), run=RunConfig(work=tmp_path))
    assert default.rounding == "search"


@pytest.mark.assets
def test_a_drafter_on_no_grid(shared, tmp_path):
    tool = shared / "tools" / "tiny_gemma4.py"
    command = [sys.executable, str(tool), str(tmp_path), "--weights-only", "--off-lattice"]
    subprocess.run(command, check=True)
    release = convert(tmp_path / "out", path=tmp_path / "assistant")
    assert release.plan.bpw <= 5.0
    assert "lattice" not in {entry.option.key for entry in release.plan.entries}


def test_the_same_files_again(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        convert(tmp_path / name / "out")
    for file in sorted((tmp_path / "a" / "out").rglob("*")):
        if file.is_file() and file.name != "run.json":
            twin = tmp_path / "b" / file.relative_to(tmp_path / "a")
            assert twin.read_bytes() == file.read_bytes(), file
