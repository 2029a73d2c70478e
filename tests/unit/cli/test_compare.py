"""`optiq compare` over folders of logs."""

import json

import pytest

from optiq.cli.main import run
from optiq.eval_artifacts import CAPABILITY, Comparison
from tests.unit.evals.logs import write_logs


@pytest.fixture
def logs(tmp_path):
    ours = {task: [1] * 30 + [0] * 10 for task in CAPABILITY}
    theirs = {task: [1] * 15 + [0] * 25 for task in CAPABILITY}
    write_logs(tmp_path / "a", ours, model="mine", size_bytes=90_000_000)
    write_logs(tmp_path / "b", theirs, model="rival", size_bytes=91_000_000)
    return tmp_path


def compare(logs, *words):
    return run(["compare", str(logs / "a"), str(logs / "b"), *words])


def test_table_and_verdict(logs, capsys):
    assert compare(logs) == 0
    text = capsys.readouterr().out
    assert "A  mine   90.0 MB" in text
    assert all(title in text for title in CAPABILITY.values())
    assert "Capability Score" in text
    assert text.splitlines()[-1].startswith("mine is better than rival: +37.50 points (95%")


def test_json_is_the_artifact(logs, capsys):
    assert compare(logs, "--json", "--tasks", "mmlu", "--tasks", "bfcl", "--seed", "3") == 0
    text = capsys.readouterr().out
    found = Comparison.from_dict(json.loads(text), "stdout")
    assert [row.task for row in found.benchmarks] == ["mmlu", "bfcl"]
    assert found.seed == 3


def test_fewer_benchmarks_are_no_capability_score(logs, capsys):
    assert compare(logs, "--tasks", "mmlu") == 0
    text = capsys.readouterr().out
    assert "mean of 1" in text
    assert "Capability" not in text


def test_what_is_not_comparable_is_said(logs, capsys):
    write_logs(logs / "b", {"mmlu": [1, 0]}, size_bytes=None)
    assert compare(logs) == 0
    text = capsys.readouterr().out
    assert "bytes not known" in text
    assert "are not comparable: mmlu: items differ" in text


def test_a_folder_without_logs(logs, capsys):
    (logs / "b" / "report.json").unlink()
    assert compare(logs) == 2
    assert "no finished logs" in capsys.readouterr().err
