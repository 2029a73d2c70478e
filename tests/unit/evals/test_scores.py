"""Reading logs: what is read, and what is refused by name."""

import json

import pytest

from optiq.errors import UsageError
from optiq.evals.scores import Scores, read_evaluated, summary
from tests.unit.evals.logs import write_logs


def test_logs_of_a_folder_and_of_a_model_directory(tmp_path):
    folder = write_logs(tmp_path / "m" / "optiq" / "evals", {"mmlu": [1, 0, 0.5], "own": [1]})
    found = read_evaluated(folder)
    assert (found.name, found.size_bytes) == ("model", 10**9)
    assert found.scores["mmlu"] == Scores("mmlu", "1+chat", ("0", "1", "2"), (1.0, 0.0, 0.5))
    assert read_evaluated(tmp_path / "m") == found
    assert set(read_evaluated(folder, ["own"]).scores) == {"own"}


def test_prompts_count_only_where_all_are_known(tmp_path):
    folder = write_logs(tmp_path, {"t": [1, 0]})
    assert read_evaluated(folder).scores["t"].prompts == frozenset()
    rows = [{"id": str(n), "score": 0, "prompt": hashed} for n, hashed in enumerate("ab")]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_evaluated(folder).scores["t"].prompts == {"a", "b"}
    rows[1]["prompt"] = ""
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_evaluated(folder).scores["t"].prompts == frozenset()


def test_bytes_that_are_not_known(tmp_path):
    assert read_evaluated(write_logs(tmp_path, {"t": [1]}, size_bytes=None)).size_bytes is None


def test_refusals(tmp_path):
    with pytest.raises(UsageError, match="holds no finished logs"):
        read_evaluated(tmp_path)
    folder = write_logs(tmp_path / "a", {"mmlu": [1, 0]})
    with pytest.raises(UsageError, match="no results of 'gsm8k'; it has mmlu"):
        read_evaluated(folder, ["gsm8k"])
    log = folder / "mmlu.jsonl"
    for text, words in {
        '{"id": "1"}\n': "line 1 is no response",
        '{"id": "0", "score": 1}\n{"id": "1", "sc': "line 2 is no response",
        "[1]\n": "line 1 is no response",
        '{"id": "1", "score": "high"}\n': "the score 'high'",
        '{"id": "1", "score": 7}\n': r"the score 7\.0",
    }.items():
        log.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_evaluated(folder)
    log.unlink()
    with pytest.raises(UsageError, match=r"mmlu\.jsonl cannot be read"):
        read_evaluated(folder)
    for report in ("[]", "{", '{"benchmarks": {}}', '{"benchmarks": {"mmlu": {}}}'):
        (folder / "report.json").write_text(report)
        with pytest.raises(UsageError, match="evaluate again"):
            read_evaluated(folder)


def test_summary_is_mean_and_standard_error(tmp_path):
    folder = write_logs(tmp_path, {"t": [1, 1, 1, 0], "u": [1, None]})
    found = summary(read_evaluated(folder).scores["t"])
    assert (found.num_items, found.score_percent) == (4, 75)
    assert found.stderr_points == pytest.approx(25)
    assert summary(read_evaluated(folder).scores["u"]) is None
    assert summary(Scores("e", "1", (), ())) is None


def test_a_report_keeps_other_fields(tmp_path):
    folder = write_logs(tmp_path, {"t": [1]})
    report = json.loads((folder / "report.json").read_text()) | {"mean": None, "new": [1]}
    (folder / "report.json").write_text(json.dumps(report))
    assert read_evaluated(folder).scores["t"].values == (1.0,)
