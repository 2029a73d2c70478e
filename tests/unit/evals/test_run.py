"""Runs over a model that answers by rule: what is asked, kept, asked again and refused."""

import dataclasses
import json

import pytest

from optiq.artifacts import EvalLog, EvalReport
from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import ArtifactMismatch, EngineFailure, UsageError
from optiq.evals import run
from optiq.evals.log import read_records
from optiq.evals.responses import rescore
from optiq.evals.subjects.base import Answer
from optiq.evals.task import Response, Score, Task
from optiq.events import Notice, Progress, no_emit
from tests.unit.evals.subjects import tasks
from tests.unit.evals.subjects.tasks import CHAT, CHOICE, NUM_ITEMS, TEXT, Stub, right

DATA = BenchmarkData(None)


def evaluate(subject, folder, task=CHAT, config=None, emit=no_emit):
    chosen = task if isinstance(task, list) else [task]
    return run.evaluate(subject, chosen, config or EvalConfig(), DATA, folder, emit)


def lines(folder, task="sums"):
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def test_a_run_leaves_records_header_and_report(tmp_path):
    def half(prompt):
        response = right(prompt)
        wrong = int(response.text) % 2
        return dataclasses.replace(response, text="no" if wrong else response.text)

    report = evaluate(Stub(half), tmp_path)
    result = report.benchmarks["sums"]
    assert (result.score, result.n, result.version) == (0.5, NUM_ITEMS, "1")
    assert result.se == pytest.approx((0.25 * 12 / 11 / 12) ** 0.5)
    assert result.ci95[0] < 0.5 < result.ci95[1]
    assert report.mean is None
    assert (report.bpw, report.size_bytes) == (4.5, 1000)
    assert EvalReport.load(tmp_path / "report.json") == report
    header = EvalLog.load(tmp_path / "sums.json")
    assert (header.score_percent, header.complete, header.num_answers) == (50.0, True, NUM_ITEMS)
    found = lines(tmp_path)
    assert [row["id"] for row in found] == [f"q{n}" for n in range(NUM_ITEMS)]
    assert found[1]["score"] == 1.0
    assert found[1]["parsed"] == "2"
    assert found[0]["output"] == "no"
    assert {len(row["prompt"]) for row in found} == {16}


def test_the_score_of_six_is_their_mean(tmp_path):
    six = [dataclasses.replace(CHAT, name=name) for name in run.CAPABILITY]
    subject = Stub(right)
    report = evaluate(subject, tmp_path, six[:5])
    assert report.mean is None
    five = len(subject.asked)
    report = evaluate(subject, tmp_path, six)
    assert report.mean == 1.0
    assert len(subject.asked) == five + NUM_ITEMS
    assert list(report.benchmarks) == list(run.CAPABILITY)


def test_a_scorer_that_breaks_gives_null_and_no_score(tmp_path):
    def breaks(item, response, config):
        if item.id == "q3":
            raise RuntimeError("the checker\nbroke")
        if item.id == "q4":
            return Score(1.5)
        if item.id == "q5":
            return Score(1.0, parsed=float("nan"))
        return tasks.exact(item, response, config)

    broken = dataclasses.replace(CHAT, scorer=breaks)
    report = evaluate(Stub(right), tmp_path, broken)
    result = report.benchmarks["sums"]
    assert (result.score, result.se, result.ci95, result.num_null) == (None, None, None, 3)
    row = lines(tmp_path)[3]
    assert row["score"] is None
    assert row["failure"] == "RuntimeError: the checker broke"
    assert row["output"] == "4"
    again = Stub(right)
    report = evaluate(again, tmp_path, CHAT)
    assert len(again.asked) == 3
    assert report.benchmarks["sums"].score == 1.0


def test_an_error_of_the_user_in_a_scorer_ends_the_run(tmp_path):
    def lacks(*_):
        raise UsageError("punkt is missing; fetch it")

    with pytest.raises(UsageError, match="punkt"):
        evaluate(Stub(right), tmp_path, dataclasses.replace(CHAT, scorer=lacks))


def test_an_answer_that_failed_is_null(tmp_path):
    def fails(prompt):
        return Answer(None, failure="too long") if "3 +" in str(prompt) else right(prompt)

    report = evaluate(Stub(fails), tmp_path)
    assert report.benchmarks["sums"].num_null == 1
    row = lines(tmp_path)[3]
    assert (row["output"], row["score"], row["failure"]) == (None, None, "too long")


def test_a_stopped_run_goes_on_and_gives_the_same(tmp_path):
    class Stopped(Exception):
        pass

    def stops_at(count):
        def emit(event):
            if isinstance(event, Progress) and event.done == count:
                raise Stopped

        return emit

    whole = evaluate(Stub(right), tmp_path / "whole")
    for wave, asked_again in ((None, NUM_ITEMS - 7), (4, 8)):
        folder = tmp_path / f"stopped-{wave}"
        with pytest.raises(Stopped):
            evaluate(Stub(right, wave=wave), folder, emit=stops_at(7))
        with (folder / "sums.jsonl").open("a") as file:
            file.write('{"id": "q9", "half a li')
        second = Stub(right, wave=wave)
        assert evaluate(second, folder) == whole
        assert len(second.asked) == asked_again
        for name in ("sums.jsonl", "report.json", "sums.json"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        third = Stub(right, wave=wave)
        assert evaluate(third, folder) == whole
        assert third.asked == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": dataclasses.replace(CHAT, version="2")}, "version is 1, not 2"),
        ({"task": dataclasses.replace(CHAT, solver=tasks.text)}, "prompts is"),
        ({"config": EvalConfig(limit=3)}, "items is"),
        ({"config": EvalConfig(thinking=True)}, "thinking"),
        ({"config": EvalConfig(sampling="model", seed=3)}, "sampling"),
    ],
)
def test_logs_of_another_run_are_refused(tmp_path, change, words):
    evaluate(Stub(right), tmp_path)
    before = (tmp_path / "sums.jsonl").read_bytes()
    with pytest.raises(ArtifactMismatch, match=words):
        evaluate(Stub(lambda _: Response("")), tmp_path, **change)
    assert (tmp_path / "sums.jsonl").read_bytes() == before


def test_logs_of_another_model_are_refused(tmp_path):
    evaluate(Stub(right), tmp_path)
    other = Stub(right)
    other.info = dataclasses.replace(other.info, fingerprint="1" * 64, name="other")
    with pytest.raises(ArtifactMismatch, match="of stub, which is not other"):
        evaluate(other, tmp_path, dataclasses.replace(CHAT, name="others"))


def test_a_log_that_is_being_written_is_refused(tmp_path):
    def inner(prompt):
        evaluate(Stub(right), tmp_path)
        return right(prompt)

    with pytest.raises(UsageError, match="being written by another run"):
        evaluate(Stub(inner), tmp_path)


def test_a_line_that_is_no_record_is_named(tmp_path):
    evaluate(Stub(right), tmp_path)
    path = tmp_path / "sums.jsonl"
    path.write_text(path.read_text().replace('"id": "q2"', '"name": "q2"'))
    with pytest.raises(ArtifactMismatch, match="line 3"):
        evaluate(Stub(right), tmp_path)


def test_seeds_and_samples_are_answers_to_an_item(tmp_path):
    config = EvalConfig(sampling="model", seeds=2, samples=3, allow_code_execution=True)
    subject = Stub(right)
    plain = evaluate(subject, tmp_path, CHAT, config)
    assert len(subject.asked) == 2 * NUM_ITEMS
    assert len(set(subject.keys)) == 2 * NUM_ITEMS
    assert plain.benchmarks["sums"].n == NUM_ITEMS
    code = dataclasses.replace(CHAT, name="code", needs_execution=True)
    subject = Stub(right)
    result = evaluate(subject, tmp_path, code, config).benchmarks["code"]
    assert len(subject.asked) == 6 * NUM_ITEMS
    assert result.pass_at == {"1": 1.0, "5": 1.0}
    same = Stub(right)
    evaluate(same, tmp_path / "b", code, config)
    assert same.keys == subject.keys
    choices = Stub(lambda _: Response("", logprobs=(0.0, -1.0)))
    evaluate(choices, tmp_path, CHOICE, config)
    assert len(choices.asked) == NUM_ITEMS


def test_choices_with_the_same_beginning_are_neighbours(tmp_path):
    subject = Stub(lambda _: Response("", logprobs=(0.0, -1.0)), wave=5)
    evaluate(subject, tmp_path, CHOICE)
    waves = [subject.asked[:5][::-1], subject.asked[5:10][::-1], subject.asked[10:][::-1]]
    beginnings = [prompt.shared for wave in waves for prompt in wave]
    assert beginnings == sorted(beginnings, key=lambda b: b != beginnings[0])
    assert [row["id"] for row in lines(tmp_path, "parity")] == [f"q{n}" for n in range(12)]


def test_items_beyond_the_context_are_left_out_under_another_version(tmp_path):
    subject, notices = Stub(lambda _: Response("1"), context=7 + 12), []
    report = evaluate(subject, tmp_path, TEXT, emit=notices.append)
    result = report.benchmarks["text"]
    assert (result.n, result.version) == (10, "1+context19")
    assert any(isinstance(e, Notice) and "2 of 12 items" in e.text for e in notices)
    with pytest.raises(UsageError, match="no item of text fits"):
        evaluate(Stub(right, context=5), tmp_path / "b", TEXT)


def test_time_is_estimated_first(tmp_path):
    seen = []
    evaluate(Stub(right), tmp_path, emit=seen.append)
    assert seen[0] == Notice("sums: 12 answers, up to about 6 s")


def test_a_model_without_a_template_is_refused_with_what_helps(tmp_path):
    mmlu = dataclasses.replace(CHAT, name="mmlu")
    with pytest.raises(UsageError, match=r"stub has no chat template; give --mmlu-form text"):
        evaluate(Stub(right, has_template=False), tmp_path, mmlu)
    with pytest.raises(UsageError, match=r"leave it out with --tasks"):
        evaluate(Stub(right, has_template=False), tmp_path, CHAT)
    assert not list(tmp_path.glob("*.jsonl"))


def test_every_kind_of_prompt_is_checked_once(tmp_path):
    def mixed(item, config):
        n = item.fields["n"]
        tool = {"type": "function", "function": {"name": "f"}}
        asked = tasks.chat(item, config)
        return dataclasses.replace(asked, tools=(tool,)) if n == 7 else asked

    checked = []
    subject = Stub(right)
    subject.check = checked.append
    evaluate(subject, tmp_path, dataclasses.replace(CHAT, solver=mixed))
    assert sorted(bool(prompt.tools) for prompt in checked) == [False, True]


@pytest.mark.parametrize(("template", "form"), [(True, "chat"), (False, "text")])
def test_auto_takes_the_form_the_model_has(tmp_path, template, form):
    seen = []

    def solver(item, config):
        seen.append(config.gsm8k_form)
        return tasks.text(item, config)

    subject = Stub(lambda _: Response("1"), has_template=template)
    evaluate(subject, tmp_path, dataclasses.replace(TEXT, solver=solver))
    assert set(seen) == {form}


def test_max_tokens_of_the_options_wins(tmp_path):
    subject = Stub(right)
    evaluate(subject, tmp_path, config=EvalConfig(max_tokens=99))
    assert {prompt.max_tokens for prompt in subject.asked} == {99}


def test_thinking_in_raw_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--thinking"):
        evaluate(Stub(right), tmp_path, TEXT, EvalConfig(thinking=True))


def test_no_items_and_ids_twice_are_refused(tmp_path):
    empty = dataclasses.replace(CHAT, dataset=lambda *_: [])
    with pytest.raises(UsageError, match="has no items"):
        evaluate(Stub(right), tmp_path, empty)
    twice = dataclasses.replace(CHAT, dataset=lambda d, c: tasks.items(d, c) * 2)
    with pytest.raises(UsageError, match="two items with the id 'q0'"):
        evaluate(Stub(right), tmp_path, twice)


class Known:
    """A registry of two."""

    def get(self, name):
        if name not in {*run.CAPABILITY, "sums"}:
            raise UsageError(f"no task '{name}'; there are some")
        return Task(name, name, "1", tasks.items, tasks.chat, tasks.exact,
                    needs_execution=name == "humaneval")  # fmt: skip


def test_names_of_tasks(monkeypatch):
    monkeypatch.setattr(run, "TASKS", Known())

    def names(*given, allow=True):
        config = EvalConfig(tasks=given, allow_code_execution=allow)
        return [task.name for task in run.chosen_tasks(config)]

    assert names("gsm8k,mmlu", " sums ,gsm8k") == ["gsm8k", "mmlu", "sums"]
    assert names() == names("all") == list(run.CAPABILITY)
    assert names("gsm8k", allow=False) == ["gsm8k"]
    with pytest.raises(UsageError, match="no task 'mmul'"):
        names("mmlu,mmul")
    with pytest.raises(UsageError, match="--allow-code-execution"):
        names(allow=False)


def test_an_engine_failure_keeps_what_was_answered(tmp_path):
    def dies(prompt):
        if "2 +" in str(prompt):
            raise EngineFailure("no power")
        return right(prompt)

    with pytest.raises(EngineFailure):
        evaluate(Stub(dies), tmp_path)
    assert len(read_records(tmp_path / "sums.jsonl")) == 9
    assert not EvalLog.load(tmp_path / "sums.json").complete
    assert not (tmp_path / "report.json").exists()


def test_a_file_of_items_is_a_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "TASKS", Known())
    path = tmp_path / "mine.jsonl"
    turn = {"role": "user", "content": "1 + 1?"}
    rows = [
        {"id": "a", "answer": "2", "messages": [turn]},
        {"id": "b", "answer": "3", "messages": [turn]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvalConfig(task_file=path)
    chosen = run.chosen_tasks(config)
    assert [task.name for task in chosen] == ["file-mine"]
    both = dataclasses.replace(config, tasks=("sums",))
    assert [task.name for task in run.chosen_tasks(both)] == ["sums", "file-mine"]
    report = evaluate(Stub(lambda _: Response(" 2\n")), tmp_path / "logs", chosen, config)
    assert report.benchmarks["file-mine"].score == 0.5
    assert rescore(tmp_path / "logs", config).report == report
