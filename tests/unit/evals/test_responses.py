"""Responses from elsewhere, and logs that are scored again."""

import dataclasses
import json

import pytest

from optiq.artifacts import EvalLog
from optiq.configs import EvalConfig, RunConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import ArtifactMismatch, UsageError
from optiq.evals import responses, run
from optiq.evals.responses import ResponseFile, rescore, response_file, score_responses
from optiq.evals.task import Chat, Score, Task, ToolCall
from optiq.events import no_emit
from tests.unit.evals.subjects import tasks
from tests.unit.evals.subjects.tasks import CHAT, NUM_ITEMS, Stub, right

TOOL = {"type": "function", "function": {"name": "f"}}


def native(_item, _config):
    return Chat(({"role": "user", "content": "call"},), 5, tools=(TOOL,))


def called(item, response, _config):
    assert isinstance(response.tool_calls, tuple | None)
    wanted = (ToolCall("f", {"n": item.fields["n"]}),)
    return Score(float(response.tool_calls == wanted), detail={"instructions": [True]})


CALLS = Task("calls", "Calls", "3", tasks.items, native, called)


def write(folder, rows, name="responses.jsonl"):
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def gold(count=NUM_ITEMS):
    return [{"id": f"q{n}", "response": f" {n + 1}\n"} for n in range(count)]


def score(path, logs, task=CHAT, *, partial=False, config=None):
    file = ResponseFile(path, task, partial)
    return score_responses(file, logs, config=config or EvalConfig())


def lines(folder, task="sums"):
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def test_a_line_a_response_in_the_order_of_the_file(tmp_path):
    rows = [*gold()[::-1], {"id": "q3", "response": "wrong"}, {"id": "q3", "response": "4"}]
    found = score(write(tmp_path, rows), tmp_path / "logs")
    written = lines(found.logs)
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert [row["output"] for row in written] == [row["response"] for row in rows]
    assert [row["score"] for row in written] == [1.0] * 12 + [0.0, 1.0]
    result = found.report.benchmarks["sums"]
    assert result.score == pytest.approx((11 + 2 / 3) / 12)
    assert (result.n, result.version) == (12, "1+responses")
    assert found.report.bpw is None
    assert EvalLog.load(found.logs / "sums.json").subject.kind == "responses"
    assert score(write(tmp_path, rows), tmp_path / "logs").report == found.report


def test_calls_are_lists_or_text(tmp_path):
    rows = [{"id": f"q{n}", "response": [{"name": "f", "arguments": {"n": n}}]} for n in range(12)]
    rows[1]["response"] = "f(n=1)"
    rows[2]["response"] = []
    found = score(write(tmp_path, rows), tmp_path / "logs", CALLS)
    written = lines(found.logs, "calls")
    assert [row["score"] for row in written] == [1.0, 0.0, 0.0] + [1.0] * 9
    assert written[1]["tool_calls"] is None
    assert written[2]["tool_calls"] == []
    assert written[0]["instructions"] == [True]
    with pytest.raises(UsageError, match="sums offers no functions"):
        score(write(tmp_path, rows), tmp_path / "other")


def test_missing_ids_need_partial(tmp_path):
    path = write(tmp_path, gold(9))
    with pytest.raises(UsageError, match=r"lacks 3 of the 12 items of sums: 'q9', 'q10', 'q11'"):
        score(path, tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
    found = score(path, tmp_path / "logs", partial=True)
    result = found.report.benchmarks["sums"]
    assert (result.n, result.score, result.version) == (9, 1.0, "1+responses+partial")


def test_unknown_ids_are_refused(tmp_path):
    path = write(tmp_path, [*gold(), {"id": "q99", "response": "1"}])
    with pytest.raises(UsageError, match=r"1 ids that sums has not: 'q99'; its ids are like 'q0'"):
        score(path, tmp_path / "logs", partial=True)


def test_a_file_of_all_items_needs_no_option(tmp_path):
    found = score(write(tmp_path, gold(24)), tmp_path / "logs")
    assert found.report.benchmarks["sums"].n == 24
    with pytest.raises(UsageError, match="lacks 4 of the 24"):
        score(write(tmp_path, gold(20)), tmp_path / "more")
    with pytest.raises(UsageError, match="7 ids that sums has not"):
        score(write(tmp_path, gold()), tmp_path / "few", config=EvalConfig(limit=5))


def test_numbers_are_ids(tmp_path):
    def numbered(data, config):
        return [dataclasses.replace(i, id=i.id[1:]) for i in tasks.items(data, config)]

    rows = [{"id": n, "response": str(n + 1)} for n in range(12)]
    task = dataclasses.replace(CHAT, dataset=numbered)
    assert (
        score(write(tmp_path, rows), tmp_path / "logs", task).report.benchmarks["sums"].score == 1
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 must be an object"),
        ({"id": "q1"}, "line 2 must be an object"),
        ({"id": None, "response": ""}, "'id' must be"),
        ({"id": True, "response": ""}, "'id' must be"),
        ({"id": "q1", "response": None}, "'response' must be"),
        ({"id": "q1", "response": [{"name": "f"}]}, "'response' must be"),
        ({"id": "q1", "response": {"name": "f", "arguments": {}}}, "'response' must be"),
    ],
)
def test_lines_of_another_form_are_named(tmp_path, row, words):
    with pytest.raises(UsageError, match=words):
        score(write(tmp_path, [gold()[0], row]), tmp_path / "logs")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        score(tmp_path / "none.jsonl", tmp_path / "logs")
    with pytest.raises(UsageError, match="holds no responses"):
        score(write(tmp_path, []), tmp_path / "logs")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(UsageError, match="UTF-8"):
        score(tmp_path / "latin", tmp_path / "logs")


def test_logs_lie_in_the_work_directory_by_default(tmp_path):
    file = ResponseFile(write(tmp_path, gold()), CHAT)
    work = RunConfig(work=tmp_path / "work")
    found = score_responses(file, config=EvalConfig(), run=work)
    assert found.logs.parent == tmp_path / "work"
    assert (found.logs / "report.json").is_file()


@pytest.fixture
def registry(monkeypatch):
    """The benchmarks of the test, by name; may be changed."""
    found = {"sums": CHAT, "calls": CALLS}

    class Known:
        def get(self, name):
            return found[name]

    monkeypatch.setattr(run, "TASKS", Known())
    monkeypatch.setattr(responses, "TASKS", Known())
    return found


@pytest.mark.usefixtures("registry")
def test_a_file_is_for_one_benchmark(tmp_path):
    assert response_file(tmp_path, EvalConfig(tasks=("sums",))).task == CHAT
    for names in ((), ("sums,calls",)):
        with pytest.raises(UsageError, match="for one benchmark"):
            response_file(tmp_path, EvalConfig(tasks=names))


def kinder(_item, response, _config):
    """Every answer that has a digit."""
    return Score(float(any(c.isdigit() for c in response.text)), parsed="kind")


def test_rescoring_a_run(tmp_path, registry):
    subject = Stub(lambda p: dataclasses.replace(right(p), text="11"))
    data, config = BenchmarkData(None), EvalConfig()
    before = run.evaluate(subject, [CHAT], config, data, tmp_path, no_emit)
    assert before.benchmarks["sums"].score == pytest.approx(1 / 12)
    assert rescore(tmp_path, config).report == before
    registry["sums"] = dataclasses.replace(CHAT, scorer=kinder, version="2")
    after = rescore(tmp_path, config)
    assert (after.report.benchmarks["sums"].score, after.logs) == (1.0, tmp_path)
    assert after.report.benchmarks["sums"].version == "2"
    assert {row["parsed"] for row in lines(tmp_path)} == {"kind"}
    assert {row["output"] for row in lines(tmp_path)} == {"11"}
    assert EvalLog.load(tmp_path / "sums.json").score_percent == 100


def test_rescoring_responses_keeps_what_the_version_says(tmp_path, registry):
    path = write(tmp_path, gold(9))
    score(path, tmp_path / "logs", partial=True)
    registry["sums"] = dataclasses.replace(CHAT, scorer=kinder, version="2")
    found = rescore(tmp_path / "logs", EvalConfig()).report.benchmarks["sums"]
    assert (found.version, found.n) == ("2+responses+partial", 9)


def test_rescoring_other_items_is_refused(tmp_path, registry):
    score(write(tmp_path, gold()), tmp_path / "logs")
    before = (tmp_path / "logs" / "sums.jsonl").read_bytes()

    def changed(data, config):
        return [dataclasses.replace(i, fields={"n": 1}) for i in tasks.items(data, config)]

    registry["sums"] = dataclasses.replace(CHAT, dataset=changed)
    with pytest.raises(ArtifactMismatch, match="not those that were answered"):
        rescore(tmp_path / "logs", EvalConfig())
    assert (tmp_path / "logs" / "sums.jsonl").read_bytes() == before


def test_rescoring_code_needs_leave(tmp_path, registry):
    score(write(tmp_path, gold()), tmp_path / "logs")
    registry["sums"] = dataclasses.replace(CHAT, needs_execution=True)
    with pytest.raises(UsageError, match="--allow-code-execution"):
        rescore(tmp_path / "logs", EvalConfig())
    assert rescore(tmp_path / "logs", EvalConfig(allow_code_execution=True)).report


def test_rescoring_nothing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no finished log"):
        rescore(tmp_path, EvalConfig())
