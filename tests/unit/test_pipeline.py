"""The spine on a tiny model: from a checkpoint to a directory that stock mlx-lm loads."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mlx_lm import load as stock_load

from optiq import pipeline
from optiq.artifacts import BitPlan, Fidelity, SensitivityTable
from optiq.backend import mx
from optiq.configs import (
    AllocateConfig,
    ConvertConfig,
    GenerateConfig,
    JudgeConfig,
    MeasureConfig,
    RunConfig,
)
from optiq.errors import ArtifactMismatch, BudgetInfeasible, OptiqError, TargetMissed, UsageError
from optiq.events import StageDone, no_emit
from optiq.models.load import size_on_disk
from optiq.quant import plots, sensitivity
from tests.tiny import tiny_checkpoint

SMALL = sensitivity.Effort(window=32, num_windows=12, rounding_windows=16, verify_pairs=6)
JUDGE = JudgeConfig(window=32, max_windows=6)


@pytest.fixture(autouse=True)
def small_effort(monkeypatch):
    monkeypatch.setitem(sensitivity.EFFORTS, "quick", SMALL)
    monkeypatch.setattr(plots, "can_plot", lambda: False)  # a second a card; see test_release


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return RunConfig(work=tmp_path_factory.mktemp("work"))


def convert(source, out, run, bpw=4.5, emit=no_emit, **options):
    return pipeline.convert(
        str(source),
        out,
        measure=MeasureConfig(effort="quick"),
        allocate=AllocateConfig(target_bpw=bpw),
        convert=ConvertConfig(**options),
        judge=JUDGE,
        run=run,
        emit=emit,
    )


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file but the one that holds dates."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "run.json"
    }


def test_a_model_within_the_budget_that_stock_mlx_lm_loads(tiny_llama, tmp_path, work):
    release = convert(tiny_llama, tmp_path / "out", work)
    assert release.path == tmp_path / "out"
    assert release.plan.bpw <= 4.5
    assert release.fidelity.bpw == pytest.approx(release.plan.bpw, abs=1e-9)
    assert size_on_disk(release.path) == release.fidelity.size_bytes <= release.plan.model_bytes
    model, tokenizer = stock_load(str(release.path))
    quantized = {p for p, m in model.named_modules() if hasattr(m, "scales")}
    assert quantized == {e.path for e in release.plan.entries if e.option.kind != "keep"}
    for entry in release.plan.entries:
        module = model
        for part in entry.path.split("."):
            module = module[int(part)] if isinstance(module, list) else getattr(module, part)
        assert (module.bits, module.group_size) == (entry.option.bits, entry.option.group_size)
    logits = model(mx.array([tokenizer.encode("Hello there")]))
    assert np.isfinite(np.array(logits.astype(mx.float32))).all()
    text = release.card.read_text()
    assert f"{release.fidelity.kl_nats_per_token:.4g}" in text
    assert f"{release.plan.bpw:.3f} stored bits per weight" in text
    assert Fidelity.load(release.path / "optiq" / "fidelity.json") == release.fidelity
    assert BitPlan.load(release.path / "optiq" / "plan.json") == release.plan


def test_equal_runs_give_equal_bytes_and_the_second_reuses_the_measurement(
    tiny_llama, tmp_path, work
):
    first = convert(tiny_llama, tmp_path / "a" / "out", work)
    events = []
    convert(tiny_llama, tmp_path / "b" / "out", work, emit=events.append)
    assert StageDone("sensitivity", reused=True) in events
    fresh = RunConfig(work=tmp_path / "work")
    convert(tiny_llama, tmp_path / "c" / "out", fresh)
    assert digests(first.path) == digests(tmp_path / "b" / "out")
    assert digests(first.path) == digests(tmp_path / "c" / "out")


def test_a_finished_run_leaves_only_the_table(tiny_llama, tmp_path):
    run = RunConfig(work=tmp_path / "work")
    convert(tiny_llama, tmp_path / "out", run)
    left = [f.name for f in (tmp_path / "work").rglob("*") if f.is_file()]
    assert len(left) == 1
    assert left[0].startswith("sensitivity-")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "work"]


def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(tiny_llama, tmp_path, work):
    wanted = digests(convert(tiny_llama, tmp_path / "w" / "out", work).path)
    run = RunConfig(work=tmp_path / "work")

    class Stop(BaseException):
        pass

    for point in (1, 3, 5, 8, 11, 14, 17, 21, 26, 31):
        seen = 0

        def emit(_event, point=point):
            nonlocal seen
            seen += 1
            if seen == point:
                raise Stop

        with pytest.raises(Stop):
            convert(tiny_llama, tmp_path / "out", run, emit=emit)
        assert not (tmp_path / "out").exists()
    assert digests(convert(tiny_llama, tmp_path / "out", run).path) == wanted


def test_rival_is_judged_beside_and_on_the_card(tiny_llama, tmp_path, work):
    release = convert(tiny_llama, tmp_path / "out", work, rival=True)
    (rival,) = release.rivals
    assert rival.size_bytes >= release.fidelity.size_bytes
    assert rival.model.startswith("uniform ")
    assert rival.num_tokens == release.fidelity.num_tokens
    assert f"| {rival.model} |" in release.card.read_text()


def test_a_kl_target_is_checked_after_converting(tiny_llama, tmp_path, work):
    def run(target, out, **options):
        return pipeline.convert(
            str(tiny_llama),
            tmp_path / out,
            measure=MeasureConfig(effort="quick"),
            allocate=AllocateConfig(target_kl=target),
            convert=ConvertConfig(**options),
            judge=JUDGE,
            run=work,
        )

    met = run(0.02, "met")
    assert met.fidelity.kl_nats_per_token <= 0.02
    assert met.plan.bpw < 16
    met.plan.save(tmp_path / "p.json")
    with pytest.raises(TargetMissed, match=r"above --target-kl 1e-06"):
        run(1e-6, "missed", plan=tmp_path / "p.json")
    assert (tmp_path / "missed" / "README.md").is_file()


def test_given_artifacts_are_used_and_checked(tiny_llama, tmp_path, work):
    table = pipeline.measure(str(tiny_llama), MeasureConfig(effort="quick"), work)
    table.save(tmp_path / "s.json")
    plan = pipeline.allocate(table, AllocateConfig(target_bpw=6.0))
    plan.save(tmp_path / "p.json")
    made = convert(tiny_llama, tmp_path / "a", work, bpw=3.5, sensitivity=tmp_path / "s.json")
    assert made.plan == pipeline.allocate(table, AllocateConfig(target_bpw=3.5))
    made = convert(tiny_llama, tmp_path / "b", work, plan=tmp_path / "p.json")
    assert made.plan == plan
    assert not (made.path / "optiq" / "sensitivity.json").exists()
    dataclasses.replace(table, rounding="rtn").save(tmp_path / "s.json")
    with pytest.raises(ArtifactMismatch, match="assumes the rounding 'rtn'"):
        convert(tiny_llama, tmp_path / "c", work, sensitivity=tmp_path / "s.json")
    other = tiny_checkpoint(tmp_path, seed=1)
    with pytest.raises(ArtifactMismatch, match="not for this source"):
        convert(other, tmp_path / "c", work, plan=tmp_path / "p.json")
    assert not (tmp_path / "c").exists()


def test_an_output_is_replaced_only_by_force_and_only_ours(tiny_llama, tmp_path, work):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "keep.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(UsageError, match="no model that optiq wrote"):
            convert(tiny_llama, foreign, work, force=force)
    assert (foreign / "keep.txt").read_text() == "mine"
    out = tmp_path / "out"
    convert(tiny_llama, out, work)
    before = digests(out)
    with pytest.raises(UsageError, match="--force"):
        convert(tiny_llama, out, work, bpw=6.0)
    assert digests(out) == before
    assert convert(tiny_llama, out, work, bpw=6.0, force=True).plan.bpw > 4.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "out"]


@pytest.mark.parametrize(
    ("budget", "error", "says"),
    [
        ({"target_bpw": 1.0}, BudgetInfeasible, "the smallest"),
        ({"target_bpw": 17.0}, UsageError, "above the source's own"),
        ({"target_size": "1kB"}, BudgetInfeasible, "the smallest"),
        ({"pin": ("*.nothing=4/64",)}, UsageError, "matches none"),
        ({"pin": ("*.v_proj=4/64", "*v_proj=8/64")}, UsageError, "both cover"),
        ({"pin": ("*.v_proj=lattice",)}, UsageError, "has no option lattice"),
    ],
)
def test_budgets_that_cannot_be_met_write_nothing(tiny_llama, tmp_path, work, budget, error, says):
    with pytest.raises(error, match=says):
        pipeline.convert(
            str(tiny_llama),
            tmp_path / "out",
            measure=MeasureConfig(effort="quick"),
            allocate=AllocateConfig(**budget),
            judge=JUDGE,
            run=work,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist"),
        ("", "holds no records"),
        ("{", "line 1 is not JSON"),
        ('{"text": "short"}\n', "give more text"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "role"),
    ],
)
def test_calibration_that_cannot_be_used(tiny_llama, tmp_path, work, text, says):
    path = tmp_path / "c.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=says):
        pipeline.measure(str(tiny_llama), MeasureConfig(effort="quick", calibration=path), work)


def test_a_tensor_that_is_not_finite_is_named(tmp_path, work):
    source = tiny_checkpoint(tmp_path)
    weights = mx.load(str(source / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name] * mx.array(float("nan"), mx.bfloat16)
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN"):
        convert(source, tmp_path / "out", work)
    assert not (tmp_path / "out").exists()


def test_judge_finds_the_source_again_and_says_when_it_is_gone(tmp_path, work, monkeypatch):
    source = tiny_checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    release = convert("llama", tmp_path / "out", work)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (found,) = pipeline.judge(release.path, config=JUDGE, run=work)
    assert found.kl_nats_per_token == release.fidelity.kl_nats_per_token
    moved = source.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="--against"):
        pipeline.judge(release.path, config=JUDGE, run=work)
    (again,) = pipeline.judge(release.path, against=str(moved), config=JUDGE, run=work)
    assert again.kl_nats_per_token == found.kl_nats_per_token
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rope_theta": 5000.0}))
    moved.rename(source)
    with pytest.raises(ArtifactMismatch, match="no longer what"):
        pipeline.judge(release.path, config=JUDGE, run=work)


def test_the_card_names_licence_command_and_rival(tmp_path, work):
    source = tiny_checkpoint(tmp_path)
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: own\n---\n# tiny\n")
    (source / "LICENSE").write_text("All rights kept")
    release = convert(source, tmp_path / "out", work, rival=True)
    text = release.card.read_text()
    assert "license: other\nlicense_name: own\n" in text
    assert (release.path / "LICENSE").read_text() == "All rights kept"
    command = "optiq convert llama -o out --effort quick --target-bpw 4.5 --rival --window 32"
    assert f"{command} --max-windows 6\n" in text
    (rival,) = release.rivals
    assert Fidelity.load(release.path / "optiq" / "rival.json") == rival
    table = SensitivityTable.load(release.path / "optiq" / "sensitivity.json")
    assert sum(table.calibration_mix.values()) == SMALL.num_windows
    assert pipeline.card(release.path) == release.card
    assert release.card.read_text() == text


def test_a_downloaded_directory_is_judged_without_the_record_of_its_run(tmp_path, work):
    source = tiny_checkpoint(tmp_path)
    release = convert(source, tmp_path / "out", work)
    (release.path / "optiq" / "run.json").unlink()
    (found,) = pipeline.judge(release.path, config=JUDGE, run=work)
    assert found.kl_nats_per_token == release.fidelity.kl_nats_per_token


def test_judge_of_a_foreign_directory_needs_a_source(tiny_llama, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_llama, folder)
    with pytest.raises(UsageError, match="--against"):
        pipeline.judge(folder)


def test_baseline_is_not_smaller(tiny_llama, tmp_path, work):
    release = convert(tiny_llama, tmp_path / "out", work)
    rival = pipeline.baseline(str(tiny_llama), release.path, tmp_path / "rival", run=work)
    assert rival.size_bytes == size_on_disk(tmp_path / "rival") >= rival.like_bytes
    assert rival.like_bytes == size_on_disk(release.path)


def test_generate_streams_text(tiny_llama, tmp_path, work):
    release = convert(tiny_llama, tmp_path / "out", work)
    result = pipeline.generate(release.path, "Hi", GenerateConfig(max_tokens=4)).result()
    assert 0 < len(result.token_ids) <= 4
    with pytest.raises(UsageError, match="empty"):
        pipeline.generate(release.path, " ")


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4_text", "llama_untied"])
def test_experts_and_per_layer_embeddings_are_inside_the_budget(tmp_path, work, family):
    source = tiny_checkpoint(tmp_path, family)
    release = convert(source, tmp_path / "out", work, bpw=4.6)
    roles = {entry.role for entry in release.plan.entries}
    assert "embedding" in roles
    assert ("expert" in roles) == (family == "qwen3_moe")
    assert 8 * release.plan.size_bytes <= 4.6 * sum(
        np.prod(entry.shape) for entry in release.plan.entries
    )
    model, tokenizer = stock_load(str(release.path))
    logits = model(mx.array([tokenizer.encode("Hello there")]))
    assert np.isfinite(np.array(logits.astype(mx.float32))).all()


def test_measured_table_has_every_option_and_its_checks(tiny_llama, work):
    config = MeasureConfig(effort="quick", verify=True)
    table = pipeline.measure(str(tiny_llama), config, work)
    assert isinstance(table, SensitivityTable)
    assert table.num_tokens == SMALL.window * SMALL.num_windows
    assert {"split_half", "verify_spearman", "verify_log_pearson", "verify_ratio"} <= set(
        table.checks
    )
    for row in table.modules:
        keys = {score.option.key for score in row.scores}
        assert keys == {f"{b}/{g}" for b in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)} | {"keep"}
        assert all(score.kl_nats_per_token >= 0 for score in row.scores)


def test_errors_are_ours(tmp_path):
    with pytest.raises(OptiqError, match="no directory, GGUF file or hub id"):
        pipeline.measure(str(tmp_path / "missing dir" / "x"))
