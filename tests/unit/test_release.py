"""Cards of model directories: a snapshot, and what is there only if it was measured.

After a wanted change: `python tests/unit/test_release.py`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from optiq import release
from optiq.artifacts import EvalLog, Fidelity, SubjectInfo
from optiq.cli.main import run
from optiq.configs import EvalConfig
from optiq.errors import ArtifactMismatch, UsageError
from optiq.eval_artifacts import Comparison
from optiq.evals.run import options_of
from optiq.quant import plots
from tests.unit.directories import MADE, make_bare, make_logs, make_whole
from tests.unit.evals.logs import write_logs

GOLDEN = Path(__file__).parents[1] / "golden" / "card"
PICTURES = {"optiq/bits.svg", "optiq/kl.svg"}


def whole_card(folder):
    """The card of a directory with everything."""
    logs, baseline = make_logs(folder)
    model = make_whole(folder / "mine-4.5bpw")
    return release.card(model, logs=logs, baseline_logs=baseline, name="me/mine-4.5bpw")


def bare_card(folder):
    return release.card(make_bare(folder / "bare"))


CARDS = {"whole": whole_card, "bare": bare_card}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take a second: they are drawn for the recorded cards alone."""
    monkeypatch.setattr(plots, "can_plot", lambda: False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The card of everything, with pictures: it is made before `no_pictures` is."""
    return whole_card(tmp_path_factory.mktemp("whole"))


def test_the_whole_card_is_as_recorded(whole):
    assert whole.read_text() == (GOLDEN / "whole.md").read_text()


def test_the_bare_card_is_as_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "can_plot", lambda: True)
    card = bare_card(tmp_path)
    assert card.read_text() == (GOLDEN / "bare.md").read_text()
    picture = (card.parent / "optiq/bits.svg").read_bytes()
    assert release.card(card.parent) == card
    assert (card.parent / "optiq/bits.svg").read_bytes() == picture


def front(card):
    return yaml.safe_load(card.read_text().split("---")[1])


def test_the_metadata_is_what_the_hub_knows(whole):
    assert front(whole) == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "mlx",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
        "tags": ["mlx", "optiq", "quantized"],
    }


def test_metadata_of_a_local_source_names_no_base_and_no_licence(tmp_path):
    assert set(front(bare_card(tmp_path))) == {"library_name", "pipeline_tag", "tags"}


def test_every_measured_figure_is_on_the_card(whole):
    text = whole.read_text()
    folder = whole.parent / "optiq"
    found = Comparison.load(folder / "evals" / "comparison.json")
    for row in found.benchmarks:
        assert f"| {row.score_percent:.2f} ± " in text
        assert f"| {row.rival_percent:.2f} | {row.delta_points:+.2f} |" in text
        assert f"| {row.ci_points[0]:+.2f} to {row.ci_points[1]:+.2f} |" in text
    assert f"**{found.overall.score_percent:.2f}**" in text
    assert found.reason in text
    fidelity = Fidelity.load(folder / "fidelity.json")
    assert f"| {fidelity.kl_nats_per_token:.4g} ±" in text
    assert "250,000 bytes" in text
    assert "prose 50%, code 38%, agent 12%" in text
    assert "optiq convert org/base -o mine-4.5bpw --revision" in text
    assert "--pin '*.o_proj=6/64'" in text


def test_pictures_are_drawn_and_referred_to(whole):
    named = set(re.findall(r"!\[.*?\]\((.*?)\)", whole.read_text()))
    assert named == PICTURES
    for name in named:
        assert (whole.parent / name).read_text().startswith("<?xml")
    assert ">this model<" in re.sub(
        "<!-- (.*?) -->", r">\1<", (whole.parent / "optiq/kl.svg").read_text()
    )


def test_without_matplotlib_there_is_no_picture_and_no_word_of_one(tmp_path):
    model = make_whole(tmp_path / "m")
    for name in PICTURES:
        (model / name).write_text("of an older plan")
    card = release.card(model)
    assert "![" not in card.read_text()
    assert not any((card.parent / name).exists() for name in PICTURES)


def test_logs_are_copied_and_kept_for_later_cards(tmp_path):
    logs, baseline = make_logs(tmp_path)
    model = make_whole(tmp_path / "m")
    first = release.card(model, logs=logs).read_text()
    assert "Capability Score" in first
    assert "95% interval" not in first
    evals = model / "optiq" / "evals"
    assert (evals / "mmlu.jsonl").read_bytes() == (logs / "mmlu.jsonl").read_bytes()
    second = release.card(model, baseline_logs=baseline).read_text()
    assert "95% interval" in second
    assert release.card(model).read_text() == second
    assert release.card(model, logs=evals, baseline_logs=evals / "baseline").read_text() == second


def drop_mmlu(logs):
    report = json.loads((logs / "report.json").read_text())
    del report["benchmarks"]["mmlu"]
    (logs / "report.json").write_text(json.dumps(report))
    (logs / "mmlu.jsonl").unlink()


def test_new_logs_take_the_place_of_all_old_ones(tmp_path):
    logs, baseline = make_logs(tmp_path)
    model = make_whole(tmp_path / "m")
    release.card(model, logs=logs, baseline_logs=baseline)
    drop_mmlu(logs)
    text = release.card(model, logs=logs).read_text()
    assert not (model / "optiq" / "evals" / "mmlu.jsonl").exists()
    assert "are not comparable: mine has no results of mmlu" in text
    drop_mmlu(baseline)
    text = release.card(model, baseline_logs=baseline).read_text()
    assert "| **mean of 5** |" in text
    assert "Capability Score" not in text


def test_the_verdict_is_a_sentence(tmp_path):
    _, baseline = make_logs(tmp_path)
    card = release.card(make_whole(tmp_path / "m"), logs=baseline, baseline_logs=baseline)
    assert "**No difference between this model and uniform 4/64 was found: " in card.read_text()


def test_what_cannot_be_compared_keeps_its_own_score(tmp_path):
    logs, baseline = make_logs(tmp_path)
    items = (logs / "bfcl.jsonl").read_text().splitlines()
    (logs / "bfcl.jsonl").write_text("\n".join(items[:50]) + "\n")
    (logs / "gsm8k.jsonl").write_text('{"id": "0", "score": null}\n' + "\n".join(items[1:]))
    text = release.card(make_whole(tmp_path / "m"), logs=logs, baseline_logs=baseline).read_text()
    assert re.search(r"\| BFCL-V3 simple \| 1\+chat \| 50 \| \S+ ± \S+ \|  \|  \|  \|  \|", text)
    assert re.search(r"\| MMLU \| .* to ", text)
    assert "| GSM8K" not in text
    assert "Capability Score" not in text
    assert "are not comparable: gsm8k: the harness failed on 1 items" in text


def write_header(logs, task, cut, **options):
    """The header of a log of 200 items, of which `cut` answers were cut off."""
    EvalLog(
        task=task,
        title=task,
        version="1+chat",
        fingerprint="0" * 16,
        options=options_of(EvalConfig(tasks=("all",), data_dir=Path("/home/me/data"), **options)),
        subject=SubjectInfo("local", "mine", "0" * 64),
        items="0" * 16,
        prompts="0" * 16,
        num_items=200,
        num_samples=1,
        provenance=MADE,
        complete=True,
        num_answers=200,
        num_truncated=cut,
    ).save(logs / f"{task}.json")


def test_how_the_benchmarks_were_asked(tmp_path):
    logs, _ = make_logs(tmp_path)
    for task, cut in (("gsm8k", 30), ("ifeval", 0)):
        write_header(logs, task, cut, limit=200, max_tokens=96)
    write_header(logs, "mmlu", 0)
    text = release.card(make_whole(tmp_path / "m"), logs=logs, name="me/m").read_text()
    assert "\noptiq eval me/m --tasks mmlu\n" in text
    assert "\noptiq eval me/m --tasks gsm8k,ifeval --limit 200 --max-tokens 96\n" in text
    assert "cut off at the most tokens allowed: GSM8K 15%.\n" in text
    assert not [file for file in tmp_path.glob("m/**/*.*") if b"/home/me" in file.read_bytes()]


def test_small_samples_and_scores_without_spread_are_named(tmp_path):
    scores = {"mmlu": [1, 0] * 50, "gsm8k": [0, 1], "ifeval": [0] * 100}
    logs = write_logs(tmp_path / "logs", scores)
    text = release.card(make_whole(tmp_path / "m"), logs=logs).read_text()
    assert "Of fewer than 100 items, so small samples: GSM8K. " in text
    assert "Every item scored the same, so ± 0 says nothing: IFEval." in text


def test_refusals_change_nothing(tmp_path):
    logs, baseline = make_logs(tmp_path)
    model = make_whole(tmp_path / "m")
    before = sorted(model.rglob("*"))
    with pytest.raises(UsageError, match="give --logs"):
        release.card(model, baseline_logs=baseline)
    with pytest.raises(UsageError, match="no finished logs"):
        release.card(model, logs=tmp_path)
    (baseline / "mmlu.json").write_text("{}")
    with pytest.raises(ArtifactMismatch, match=r"mmlu\.json is no optiq\.eval_log"):
        release.card(model, logs=logs, baseline_logs=baseline)
    (baseline / "bfcl.jsonl").write_text("{")
    with pytest.raises(UsageError, match="line 1 is no response"):
        release.card(model, logs=logs, baseline_logs=baseline)
    assert sorted(model.rglob("*")) == before
    with pytest.raises(UsageError, match="not written by optiq"):
        release.card(tmp_path)
    (model / "optiq" / "speed.json").write_text("{}")
    with pytest.raises(ArtifactMismatch, match=r"speed\.json is no optiq\.speed"):
        release.card(model)
    assert not (model / "README.md").exists()


def test_a_licence_that_somebody_wrote_into_the_card_stays(tmp_path):
    model = make_bare(tmp_path / "m")
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# x\n")
    card = release.card(model)
    assert front(card)["license_name"] == "mine"
    assert front(release.card(model))["license"] == "other"


def test_the_command(tmp_path, capsys):
    logs, _ = make_logs(tmp_path)
    model = make_whole(tmp_path / "m")
    assert run(["card", str(model), "--logs", str(logs), "--repo", "me/m"]) == 0
    assert capsys.readouterr().out == f"{model / 'README.md'}\n"
    assert "# me/m\n" in (model / "README.md").read_text()
    assert run(["card", str(model), "--repo", "a b"]) == 2
    assert "no hub id" in capsys.readouterr().err
    assert run(["card", str(tmp_path)]) == 2


if __name__ == "__main__":
    for each, make in CARDS.items():
        with tempfile.TemporaryDirectory() as scratch:
            (GOLDEN / f"{each}.md").write_text(make(Path(scratch)).read_text())


WIDTHS = """
from optiq.artifacts import LATTICE, BitPlan, PlanEntry, QuantOption, SourceInfo
from optiq.card import widths

options = [QuantOption("affine", 4, 32), LATTICE, QuantOption("affine", 4, 64)]
source = SourceInfo("s", None, "f", "llama", "bfloat16", 1, 1)
entries = [PlanEntry(f"m.{n}", "linear", (64, 64), o, 9, 0.0) for n, o in enumerate(options)]
print(widths(BitPlan(source, tuple(entries), "5 bpw", "gptq", 5.0, 27, 99, 0.0, 0.0)))
"""


def test_options_of_equal_width_have_an_order():
    """Hashes of strings differ from process to process, and so does the order of a set."""
    tables = {
        subprocess.run(
            [sys.executable, "-c", WIDTHS],
            env={"PYTHONHASHSEED": str(seed)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in range(6)
    }
    assert len(tables) == 1
    assert "source's grid" in tables.pop()
