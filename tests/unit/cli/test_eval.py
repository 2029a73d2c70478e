"""`optiq eval` and `optiq eval show`: what they ask for, print and refuse."""

import json
from pathlib import Path

import pytest

from optiq.artifacts import EvalLog, SubjectInfo
from optiq.cli.main import run
from optiq.configs import EvalConfig, RunConfig, ServedConfig
from optiq.evals.log import ItemRecord
from optiq.evals.task import Response, Score, ToolCall
from tests.unit.quant.tables import PROVENANCE


def test_a_directory(pipeline, capsys):
    words = ["eval", "DIR", "--tasks", "mmlu,gsm8k", "--tasks", "bfcl", "-o", "LOGS", "--seed", "3"]
    assert run([*words, "--offline", "--allow-code-execution"]) == 0
    ((name, args, kwargs),) = pipeline.calls
    assert (name, args) == ("evaluate", (Path("DIR"), Path("LOGS")))
    tasks = ("mmlu,gsm8k", "bfcl")
    assert kwargs["config"] == EvalConfig(tasks=tasks, seed=3, allow_code_execution=True)
    assert kwargs["run"] == RunConfig(offline=True)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "DIR, 90.0 MB, 4.990 bpw"
    assert "Capability Score 50.00 ± 1.12 over 1,164 items" in captured.out
    assert "humaneval: pass@1 50.00, pass@5 75.00" in captured.out
    assert "46.9 to 53.1" in captured.out
    assert "LOGS" in captured.err


def test_no_capability_score_where_the_harness_failed(pipeline, capsys):
    pipeline.whole = False
    assert run(["eval", "DIR"]) == 0
    captured = capsys.readouterr()
    assert "Capability Score" not in captured.out
    assert "bfcl: the harness failed on 3 answers" in captured.err


def test_json_is_the_report(pipeline, capsys):
    assert run(["eval", "DIR", "-o", "LOGS", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["benchmarks"]["mmlu"]["score"] == 0.5
    assert (found["mean"], found["logs"], found["size_bytes"]) == (0.5, "LOGS", 90_000_000)
    assert "baseline" not in found
    assert pipeline.calls


def test_a_url(pipeline):
    words = ["--served", "http://localhost:1", "--served-model", "m", "--concurrency", "3"]
    assert run(["eval", *words, "--tasks", "gsm8k"]) == 0
    ((_, args, kwargs),) = pipeline.calls
    assert args == (None, None)
    assert kwargs["served"] == ServedConfig("http://localhost:1", "m", 3)


@pytest.mark.parametrize(("given", "rival"), [("auto", "work/rival"), ("OTHER", "OTHER")])
def test_a_baseline_is_evaluated_beside(pipeline, capsys, given, rival):
    assert run(["eval", "DIR", "-o", "LOGS", "--baseline", given, "--json"]) == 0
    names = [name for name, _, _ in pipeline.calls]
    assert names == ["evaluate", *(["rival_of"] if given == "auto" else []), "evaluate", "compare"]
    assert pipeline.calls[-2][1] == (Path(rival), Path("LOGS/baseline"))
    assert pipeline.calls[-1][1] == (Path("LOGS"), Path("LOGS/baseline"))
    found = json.loads(capsys.readouterr().out)
    assert found["baseline"]["model"] == rival
    assert found["comparison"]["verdict"] == "no_difference"
    assert run(["eval", "DIR", "-o", "LOGS", "--baseline", given]) == 0
    assert "a true difference of" in capsys.readouterr().out


def test_responses_and_rescore(pipeline):
    assert run(["eval", "--responses", "R", "--tasks", "gsm8k", "--partial", "-o", "LOGS"]) == 0
    assert pipeline.calls[0][1:] == ((Path("R"), EvalConfig(tasks=("gsm8k",))), {"partial": True})
    assert pipeline.calls[1][0:2] == ("score_responses", ("file", Path("LOGS")))
    assert run(["eval", "--rescore", "LOGS"]) == 0
    assert pipeline.calls[2][1][:3] == (Path("LOGS"), EvalConfig(), RunConfig())


def test_a_dry_run_asks_for_the_time(pipeline, capsys):
    assert run(["eval", "DIR", "--dry-run", "--tasks", "mmlu"]) == 0
    assert capsys.readouterr().out == "mmlu  1,000 answers, up to about 5 min\n"
    assert [name for name, _, _ in pipeline.calls] == ["estimate"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is none"),
        (["DIR", "--served", "http://x"], "there is MODEL and --served"),
        (["DIR", "--responses", "R"], "MODEL and --responses"),
        (["DIR", "--partial"], "--partial"),
        (["--served", "http://x", "--baseline", "auto"], "--baseline"),
        (["--rescore", "LOGS", "-o", "OTHER"], "leave out -o"),
        (["--rescore", "LOGS", "--dry-run"], "--dry-run"),
        (["DIR", "--samples", "3"], "--sampling model"),
        (["DIR", "--limit", "0"], "--limit"),
    ],
)
def test_what_does_not_go_together(pipeline, capsys, words, message):
    assert run(["eval", *words]) == 2
    assert message in capsys.readouterr().err
    assert pipeline.calls == []


@pytest.fixture
def logs(tmp_path):
    records = [
        ItemRecord("q1", 0, "", Response("four", num_tokens=3), "hm", False, Score(1.0, "4")),
        ItemRecord("q2", 0, "", Response("5 5 5", truncated=True), "", True, Score(0.0)),
        ItemRecord("q2", 1, "", None, "", False, Score(None, detail={"failure": "broke"})),
        ItemRecord(
            "q3", 0, "", Response("", (ToolCall("f", {"x": 1}),), (-1.5, -0.25)), "", False,
            Score(0.5, detail={"instructions": [True, False]}),
        ),
    ]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(r.to_line() + "\n" for r in records))
    subject = SubjectInfo("local", "m", "f")
    EvalLog("t", "T", "1", "", {}, subject, "", None, 3, 1, PROVENANCE).save(tmp_path / "t.json")
    return tmp_path


def test_show_prints_answers(logs, capsys):
    assert run(["eval", "show", str(logs)]) == 0
    out = capsys.readouterr().out
    assert "t q1: score 1, 3 tokens\n" in out
    assert '[reasoning]\nhm\n[answer]\nfour\nparsed: "4"' in out
    assert "t q2: score 0, 0 tokens, truncated, looped" in out
    assert "t q2, answer 2: failed\n" in out
    assert 'failure: "broke"' in out
    assert 'call f {"x": 1}' in out
    assert "log-likelihoods -1.5000 -0.2500" in out
    assert "instructions: [true, false]" in out


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        (["--wrong"], ["q2", "q3"]),
        (["--right"], ["q1"]),
        (["--null"], ["q2"]),
        (["--truncated"], ["q2"]),
        (["--looped", "--wrong"], ["q2"]),
        (["--id", "q1", "--id", "q3"], ["q1", "q3"]),
        (["--task", "t", "--limit", "1"], ["q1"]),
    ],
)
def test_show_filters(logs, capsys, words, ids):
    assert run(["eval", "show", str(logs), "--json", *words]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in rows] == ids
    assert {row["task"] for row in rows} == {"t"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--id", "q9"], "no answer in"),
        (["--task", "u"], "no log of 'u'; there are ['t']"),
        (["--wrong", "--right"], "choose one"),
    ],
)
def test_show_refuses(logs, capsys, words, message):
    assert run(["eval", "show", str(logs), *words]) == 2
    assert message in capsys.readouterr().err
    assert run(["eval", "show", str(logs / "none")]) == 2


def test_help_of_both(capsys):
    assert run(["eval", "--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: optiq eval [OPTIONS] [MODEL]" in out
    assert "optiq eval show LOGS" in out
    assert run(["eval", "show", "--help"]) == 0
    assert "Usage: optiq eval show [OPTIONS] LOGS" in capsys.readouterr().out
