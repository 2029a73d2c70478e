"""Every verb: what it asks of the pipeline, and what it prints where."""

import json
import time
from pathlib import Path

import pytest

from optiq import settings
from optiq.artifacts import Acceptance, BitPlan, SensitivityTable, Speed
from optiq.cli import output
from optiq.cli.main import run
from optiq.configs import (
    AllocateConfig,
    BenchConfig,
    GenerateConfig,
    JudgeConfig,
    MeasureConfig,
    RunConfig,
)
from optiq.quant.allocate import allocate
from tests.unit.cli.fakes import make_fidelity, make_plan, make_sensitivity
from tests.unit.quant.tables import PROVENANCE, make_scores, make_table, moe_modules

JUDGE_KEYS = {
    *("kl_nats_per_token", "kl_se", "kl_p99", "top1_agreement", "perplexity_ratio", "bpw"),
    *("size_bytes", "num_tokens", "by_domain"),
}


@pytest.fixture
def sensitivity(tmp_path):
    path = tmp_path / "sensitivity.json"
    make_sensitivity().save(path)
    return path


def test_measure_saves_the_table(pipeline, tmp_path, capsys):
    out = tmp_path / "s.json"
    assert run(["measure", "src", "-o", str(out), "--effort", "quick", "--offline"]) == 0
    name, args, _ = pipeline.calls[-1]
    assert name == "measure"
    assert args[:3] == ("src", MeasureConfig(effort="quick"), RunConfig(offline=True))
    assert SensitivityTable.load(out) == make_sensitivity()
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "2 min" in captured.err


@pytest.mark.usefixtures("pipeline")
def test_measure_json_is_lines_that_end_in_the_result(tmp_path, capsys):
    out = tmp_path / "s.json"
    assert run(["measure", "src", "-o", str(out), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["event"] == "Result"
    assert lines[-1]["sensitivity"] == str(out)


def test_measure_refuses_a_directory_before_it_measures(pipeline, tmp_path, capsys):
    assert run(["measure", "src", "-o", str(tmp_path)]) == 2
    assert pipeline.calls == []
    assert "is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["measure", "convert"])
def test_dry_run_prints_the_preflight_alone(verb, pipeline, tmp_path, capsys):
    out = tmp_path / "out"
    assert run([verb, "src", "-o", str(out), "--dry-run"]) == 0
    assert [name for name, *_ in pipeline.calls] == ["preflight"]
    assert capsys.readouterr().out == "time    2 min\nmemory  1 GB\n"
    assert run([verb, "src", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == {"time": "2 min", "memory": "1 GB"}
    assert not out.exists()


@pytest.mark.parametrize("verb", ["measure", "convert"])
def test_a_refusal_stops_before_the_work(verb, pipeline, tmp_path, capsys):
    pipeline.refusal = "needs 3 GB of disk, 1 GB is free; give another --work"
    assert run([verb, "src", "-o", str(tmp_path / "out")]) == 1
    assert [name for name, *_ in pipeline.calls] == ["preflight"]
    assert "error: needs 3 GB" in capsys.readouterr().err


def test_convert_passes_every_config_and_prints_what_came_out(pipeline, tmp_path, capsys):
    out = tmp_path / "model"
    words = ["--target-bpw", "4.5", "--effort", "quick", "--force", "--window", "64"]
    assert run(["convert", "src", "-o", str(out), *words]) == 0
    _, args, kwargs = pipeline.calls[-1]
    assert args == ("src", out)
    assert kwargs["measure"].effort == "quick"
    assert kwargs["allocate"] == AllocateConfig(target_bpw=4.5)
    assert kwargs["convert"].force
    assert kwargs["judge"] == JudgeConfig(window=64)
    text = capsys.readouterr().out
    for part in ("4.990 bpw, 90.0 MB", "0.0123 +- 0.0009", "95.0%", str(out / "README.md")):
        assert part in text
    assert f"{make_plan().predicted_kl:.4g}" in text


@pytest.mark.usefixtures("pipeline")
def test_convert_json(tmp_path, capsys):
    assert run(["convert", "src", "-o", str(tmp_path / "m"), "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "Result"
    assert set(last["fidelity"]) >= JUDGE_KEYS


def test_convert_shows_the_acceptance_of_a_drafter(pipeline, tmp_path, capsys):
    counts = (10, 4, 0), (9, 2, 0), (10, 4, 0), (10, 3, 0)
    pipeline.acceptance = Acceptance("dir", "target", "text", 100, *counts, PROVENANCE)
    words = ["convert", "src", "-o", str(tmp_path / "m"), "--drafter-target", "target"]
    assert run(words) == 0
    assert pipeline.calls[-1][2]["convert"].drafter_target == Path("target")
    text = capsys.readouterr().out
    assert "90.0%, 50.0%, - (drafts 1 to 3)" in text
    assert "100.0%, 75.0%, - (drafts 1 to 3)" in text
    assert run([*words, "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["fidelity"] is None
    assert last["acceptance"]["accepted"] == [9, 2, 0]


def test_plan_shows_curve_and_plan_and_writes_it(sensitivity, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert run(["plan", str(sensitivity), "--target-bpw", "4.5", "-o", str(out)]) == 0
    plan = BitPlan.load(out)
    assert plan == allocate(make_sensitivity(), AllocateConfig(target_bpw=4.5))
    text = capsys.readouterr().out
    assert text.count("<- plan") == 1
    assert f"{plan.bpw:.4f} bpw" in text
    assert "optimality gap" in text


def test_plan_json_is_the_artifact(sensitivity, capsys):
    assert run(["plan", str(sensitivity), "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert BitPlan.from_dict(parsed, "stdout").target == "5 bpw"


def test_plan_shows_the_floor_of_routers(tmp_path, capsys):
    path = tmp_path / "s.json"
    rows = [make_scores(m, [0.1 / 4**n for n in range(18)]) for m in moe_modules(2)]
    make_table(rows).save(path)
    assert run(["plan", str(path), "--target-bpw", "5"]) == 0
    assert "2 modules, router: at least 8 bits" in capsys.readouterr().out
    assert run(["plan", str(path), "--target-bpw", "5", "--free-routers"]) == 0
    assert "router" not in capsys.readouterr().out


def test_plan_below_the_smallest_names_it_and_writes_nothing(sensitivity, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert run(["plan", str(sensitivity), "--target-bpw", "1", "-o", str(out)]) == 2
    assert "the smallest" in capsys.readouterr().err
    assert not out.exists()


def test_plan_with_a_wrong_picture_writes_nothing(sensitivity, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert run(["plan", str(sensitivity), "-o", str(out), "--plot", "x.pdf"]) == 2
    assert ".svg or .png" in capsys.readouterr().err
    assert not out.exists()


def test_plan_is_fast(tmp_path):
    """One measurement of a small model; the whole command, without start-up."""
    path = tmp_path / "s.json"
    make_sensitivity().save(path)
    start = time.process_time()
    assert run(["plan", str(path)]) == 0
    assert time.process_time() - start < 1.0


@pytest.mark.usefixtures("pipeline")
def test_judge_json_has_the_promised_keys(capsys):
    assert run(["judge", "model", "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert set(parsed) >= JUDGE_KEYS
    assert "baselines" not in parsed
    assert parsed["by_domain"][0]["domain"] == "prose"


def test_judge_puts_baselines_beside(pipeline, capsys):
    words = ["judge", "model", "--baseline", "a", "--baseline", "b", "--against", "src"]
    assert run([*words, "--text", "held.jsonl", "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert [rival["model"] for rival in parsed["baselines"]] == ["a", "b"]
    _, args, kwargs = pipeline.calls[-1]
    assert args == (Path("model"),)
    assert kwargs["against"] == "src"
    assert kwargs["config"] == JudgeConfig(text=Path("held.jsonl"))
    assert run(words) == 0
    captured = capsys.readouterr()
    assert all(f"\n{name} " in captured.out for name in ("model", "a", "b"))
    assert "prose" in captured.out
    assert "noise floor" in captured.err


@pytest.mark.usefixtures("pipeline")
def test_baseline_prints_both_sizes(capsys):
    words = ["baseline", "src", "--like", "m", "-o", "out"]
    assert run(words) == 0
    text = capsys.readouterr().out
    assert "95.0" in text
    assert "90.0" in text
    assert "uniform 5/64" in text
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] == 95 * 10**6


def test_bench_writes_the_artifact(pipeline, tmp_path, capsys):
    assert run(["bench", str(tmp_path), "--repeats", "2"]) == 0
    assert pipeline.calls[-1][1][1] == BenchConfig(repeats=2)
    assert Speed.load(tmp_path / "optiq" / "speed.json").decode_tps == 20.0
    assert "100.0 tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        (["m", "why?"], "why?"),
        (["m", "-5 + 3?"], "-5 + 3?"),
        (["m", "-5"], "-5"),
        (["m", "- a list item", "--max-tokens", "7"], "- a list item"),
        (["--max-tokens", "7", "m", "--what is this"], "--what is this"),
        (["m", "--", "--raw"], "--raw"),
    ],
)
def test_generate_takes_any_prompt(words, prompt, pipeline, capsys):
    assert run(["generate", *words]) == 0
    _, (model, text, config, run_config, _), _ = pipeline.calls[-1]
    assert (model, text) == (Path("m"), prompt)
    assert config == GenerateConfig(max_tokens=7 if "--max-tokens" in words else None)
    assert run_config == RunConfig()
    out, err = capsys.readouterr()
    assert out == "Blue light.\n"
    assert "Hm." in err
    assert "5 of 8 drafts accepted, 2.50 a round; 0.38 passes a token, 1.50 times" in err


def test_generate_passes_what_it_is_given(pipeline):
    words = ["--image", "a.png", "--image", "b.png", "--drafter", "ngram", "--num-drafts", "4"]
    words += ["--stop", "END", "--temperature", "0", "--memory-limit", "8GB"]
    assert run(["generate", "m", "why?", *words]) == 0
    _, (_, _, config, run_config, _), _ = pipeline.calls[-1]
    assert config == GenerateConfig(
        image=(Path("a.png"), Path("b.png")),
        drafter="ngram",
        num_drafts="4",
        stop=("END",),
        temperature=0.0,
    )
    assert run_config == RunConfig(memory_limit="8GB")


@pytest.mark.usefixtures("pipeline")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-drafts", "4"], "needs --drafter"),
        (["--drafter", "ngram", "--num-drafts", "many"], "give a number, or auto"),
        (["--image-detail", "huge"], "low, auto, high"),
        (["--raw", "--thinking"], "chat template"),
        (["--max-tokens", "0"], "positive"),
    ],
)
def test_generate_refuses(words, message, capsys):
    assert run(["generate", "m", "why?", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("pipeline")
def test_generate_still_knows_a_misspelt_flag(capsys):
    assert run(["generate", "m", "why?", "--max-token", "7"]) == 2
    assert "--max-tokens" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_the_variable_of_the_shell(shell, capsys):
    assert run(["completion", shell]) == 0
    assert f"_OPTIQ_COMPLETE={shell}_source optiq" in capsys.readouterr().out


def test_cache_lists_and_clears_its_own_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPTIQ_CACHE", str(tmp_path))
    for name in ("work/abc", "gguf/def", "other/ghi"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "data").write_bytes(b"x" * 1_000_000)
    assert settings.load().cache_dir == tmp_path
    assert run(["cache", "list"]) == 0
    text = capsys.readouterr().out
    assert "work/abc" in text
    assert "ghi" not in text
    assert run(["cache", "clear", "work/nothing"]) == 2
    assert run(["cache", "clear", "work/abc"]) == 0
    assert not (tmp_path / "work/abc").exists()
    assert (tmp_path / "gguf/def").exists()
    assert run(["cache", "clear"]) == 0
    assert not (tmp_path / "gguf/def").exists()
    assert (tmp_path / "other/ghi/data").exists()


def test_cache_of_a_fresh_machine_is_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPTIQ_CACHE", str(tmp_path / "none"))
    assert run(["cache", "list"]) == 0
    assert capsys.readouterr().out == ""


def test_table_aligns_numbers_to_the_right():
    rows = [("a", "1"), ("long", "10")]
    assert output.table(rows, ("name", "n")) == "name   n\na      1\nlong  10"
    assert output.table([]) == ""


def test_fidelity_survives_its_json():
    assert output.as_dict(make_fidelity())["kl_se"] == 0.0009
