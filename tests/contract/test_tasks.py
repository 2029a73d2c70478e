"""What every benchmark owes: right answers score 1, wrong and blank ones 0, breakage no value."""

import dataclasses
import importlib
import json
import pkgutil
import re

import pytest

from bench.scorers import golden_call, obedient
from optiq.configs import EvalConfig
from optiq.data.benchmarks import FILES, BenchmarkData
from optiq.errors import UsageError
from optiq.evals import sandbox, tasks
from optiq.evals.task import Chat, Choice, Continuation, Item, Response, ToolCall
from optiq.evals.tasks import TASKS
from tests.benchmarks import write_benchmarks

CONFIG = EvalConfig(allow_code_execution=True)
EASY = {  # instructions of IFEval that are easy to follow, and to break with one text
    "punctuation:no_comma",
    "startend:quotation",
    "keywords:existence",
    "detectable_format:title",
}

every_task = pytest.mark.parametrize("name", TASKS.names())


class First:
    """Stands in for a random generator: takes what comes first, leaves nothing out."""

    def choice(self, values):
        return values[0]

    def random(self):
        return 0.0


def mmlu(item, right):
    answer = (item.fields["answer"] + (not right)) % 4
    return Response("", logprobs=tuple(-1.0 - (choice != answer) for choice in range(4)))


def gsm8k(item, right):
    return Response(f"So that is 3 and 4.\nThe answer is {item.fields['gold'] if right else -7}.")


def ifeval(item, right):
    return Response(obedient(item) if right else "Well, no")


def bfcl(item, right):
    answer = {item.fields["function"]["name"]: item.fields["accepted"]}
    name, arguments = golden_call(answer, item, First())
    if not right:
        arguments |= {"unheard_of": 1}
    return Response("", tool_calls=(ToolCall(name, arguments),))


def hashhop(item, right):
    return Response(item.fields["target"] if right else item.fields["start"])


def humaneval(item, right):
    return Response(SOLUTIONS[item.id] if right else "    return None\n")


ANSWERS = {
    "mmlu": mmlu,
    "gsm8k": gsm8k,
    "ifeval": ifeval,
    "bfcl": bfcl,
    "humaneval": humaneval,
    "hashhop": hashhop,
}
SOLUTIONS: dict[str, str] = {}  # canonical ones, by id; not among the fields of an item


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    return BenchmarkData(write_benchmarks(tmp_path_factory.mktemp("data")))


@pytest.fixture(params=["own", pytest.param("published", marks=pytest.mark.assets)])
def data(request):
    if request.param == "own":
        return request.getfixturevalue("own_data")
    return BenchmarkData(request.getfixturevalue("shared") / "assets" / "eval")


def limited(limit):
    return dataclasses.replace(CONFIG, limit=limit)


def ten_items(name, data):
    needs_checks(name)
    if name == "humaneval":
        SOLUTIONS.update(
            (row["task_id"], row["canonical_solution"])
            for row in data.load(f"{name}/problems").rows
        )
    items = TASKS.get(name).dataset(data, CONFIG)
    if name == "ifeval":
        items = [item for item in items if EASY.issuperset(item.fields["instruction_id_list"])]
    assert len(items) >= 10
    return items[:10]


def needs_checks(name):
    if name == "humaneval":
        try:
            sandbox.for_config(CONFIG)
        except UsageError as error:
            pytest.skip(str(error))
    if name == "ifeval":
        pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
        nltk = pytest.importorskip("nltk", reason="needs the extra 'eval'")
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            pytest.skip("needs nltk's punkt_tab; set NLTK_DATA")


def test_every_file_of_the_folder_is_in_the_table_by_its_own_name():
    modules = {module.name for module in pkgutil.iter_modules(tasks.__path__)}
    assert set(TASKS.names()) == modules
    for name in modules:
        task = importlib.import_module(f"{tasks.__name__}.{name}").TASK
        assert TASKS.get(name) is task
        assert task.name == name


@every_task
def test_ten_right_answers_score_one_ten_wrong_ones_none_and_blank_none(name, data):
    task = TASKS.get(name)
    for item in ten_items(name, data):
        for right in (True, False):
            score = task.score(item, ANSWERS[name](item, right), CONFIG)
            assert score.value == float(right), (item, score)
            json.dumps([score.parsed, dict(score.detail)])
        for blank in ("", " \n"):
            assert task.score(item, Response(blank), CONFIG).value == 0.0


@every_task
def test_a_scorer_that_breaks_gives_no_value_and_says_why(name, own_data):
    needs_checks(name)
    task = TASKS.get(name)
    response = ANSWERS[name](ten_items(name, own_data)[0], True)
    score = task.score(Item("x", {}), response, CONFIG)
    assert score.value is None
    assert score.detail["failure"].startswith("KeyError")


def test_an_error_that_is_not_of_one_response_ends_the_run(own_data):
    def scorer(*_):
        raise UsageError("a package is missing")

    task = dataclasses.replace(TASKS.get("gsm8k"), scorer=scorer)
    with pytest.raises(UsageError, match="missing"):
        task.score(task.dataset(own_data, CONFIG)[0], Response(""), CONFIG)


@every_task
def test_items_are_unique_serializable_and_the_same_each_time(name, own_data):
    task = TASKS.get(name)
    items = task.dataset(own_data, CONFIG)
    assert len({item.id for item in items}) == len(items)
    assert json.loads(json.dumps([dict(item.fields) for item in items])) == [
        dict(item.fields) for item in items
    ]
    assert list(task.dataset(own_data, CONFIG)) == list(items)
    assert all(task.groups(item).keys() == task.groups(items[0]).keys() for item in items)


@every_task
def test_a_limit_takes_items_from_all_over(name, own_data):
    task = TASKS.get(name)
    items = [item.id for item in task.dataset(own_data, CONFIG)]
    few = [item.id for item in task.dataset(own_data, limited(3))]
    assert few == [items[0], items[len(items) // 3], items[2 * len(items) // 3]]
    assert [i.id for i in task.dataset(own_data, limited(10**6))] == items


@every_task
def test_prompts_hold_the_question_and_no_answer_beyond_the_options(name, own_data):
    task = TASKS.get(name)
    for item in task.dataset(own_data, limited(5)):
        prompt = task.solver(item, CONFIG)
        assert isinstance(prompt, Chat | Continuation | Choice)
        if isinstance(prompt, Chat):
            assert prompt.messages[-1]["role"] == "user"
        if not isinstance(prompt, Choice):
            assert prompt.max_tokens > 0
            assert task.solver(item, EvalConfig(max_tokens=7)).max_tokens == 7


@every_task
def test_versions_are_words_and_files_are_known(name):
    task = TASKS.get(name)
    assert re.fullmatch(r"[\w.+-]+", task.full_version(CONFIG))
    assert set(task.files) <= FILES.keys()
