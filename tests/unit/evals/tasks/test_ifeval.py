"""IFEval: the official checks, and what happens where they are missing."""

import json
import random

import pytest

from optiq import extras
from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import UsageError
from optiq.evals.task import Item, Response
from optiq.evals.tasks import ifeval
from optiq.evals.tasks.ifeval import TASK
from tests.benchmarks import read, write, write_benchmarks

CONFIG = EvalConfig()


@pytest.fixture(scope="module")
def checks():
    """The official checks; the test is skipped where they are not installed."""
    pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
    nltk = pytest.importorskip("nltk", reason="needs the extra 'eval'")
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        pytest.skip("needs nltk's punkt_tab; set NLTK_DATA")


def item(*instructions, prompt="Say it."):
    names, kwargs = zip(*instructions, strict=True)
    return Item("1", {"prompt": prompt, "instruction_id_list": list(names), "kwargs": list(kwargs)})


def scored(one, text):
    return TASK.score(one, Response(text), CONFIG)


def test_items_and_prompts(tmp_path):
    items = TASK.dataset(BenchmarkData(write_benchmarks(tmp_path)), CONFIG)
    assert [one.id for one in items] == [str(7000 + n) for n in range(12)]
    prompt = TASK.solver(items[0], CONFIG)
    assert prompt.messages == ({"role": "user", "content": items[0].fields["prompt"]},)


def test_instructions_without_arguments_of_their_own(tmp_path):
    write_benchmarks(tmp_path)
    path = tmp_path / "ifeval/input_data.jsonl"
    rows = read(path)
    rows[2]["kwargs"] = [{}]
    write(path, rows)
    with pytest.raises(
        UsageError, match="key 7002: 'kwargs' must have one object for each of its 2"
    ):
        TASK.dataset(BenchmarkData(tmp_path), CONFIG)


@pytest.mark.usefixtures("checks")
def test_strict_counts_and_loose_is_beside_it():
    one = item(("startend:quotation", {}), ("punctuation:no_comma", {}))
    good = scored(one, '"no commas"')
    assert good.value == 1.0
    assert good.detail == {"instructions": [True, True], "loose": [True, True]}
    half = scored(one, 'Sure:\n"no commas"')
    assert half.value == 0.0
    assert half.detail == {"instructions": [False, True], "loose": [True, True]}
    assert scored(one, "").detail == {"instructions": [False, False], "loose": [False, False]}


@pytest.mark.usefixtures("checks")
def test_fewer_than_five_words_are_at_most_four():
    one = item(("length_constraints:number_words", {"relation": "less than", "num_words": 5}))
    assert scored(one, "one two three four").value == 1.0
    assert scored(one, "one two three four five").value == 0.0


@pytest.mark.usefixtures("checks")
def test_the_prompt_reaches_the_check_that_needs_it():
    one = item(("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}))
    assert scored(one, "Say it. Done.").value == 1.0
    assert scored(one, "Done.").value == 0.0


@pytest.mark.usefixtures("checks")
def test_scores_do_not_depend_on_chance_and_leave_it_alone():
    # a letter that the check refuses: it draws one of its own
    one = item(
        (
            "keywords:letter_frequency",
            {"letter": "!", "let_frequency": 1, "let_relation": "at least"},
        ),
        ("language:response_language", {"language": "de"}),
    )
    random.seed(5)
    before = random.getstate()
    first = scored(one, "ja wo ist es denn hin")
    assert random.getstate() == before
    assert all(scored(one, "ja wo ist es denn hin") == first for _ in range(5))


@pytest.mark.usefixtures("checks")
def test_an_instruction_that_has_no_check():
    with pytest.raises(UsageError, match="no check for instruction 'made:up'"):
        scored(item(("made:up", {})), "x")


@pytest.fixture
def fresh():
    """No checks are loaded yet."""
    ifeval._checks.cache_clear()
    yield
    ifeval._checks.cache_clear()


class Nltk:
    """Stands in for nltk without its data."""

    def __init__(self, finds):
        self.path = ["/somewhere/nltk_data"]
        self.finds = finds
        self.data = self

    def find(self, name):
        raise LookupError(name)

    def download(self, name, quiet):
        assert (name, quiet) == ("punkt_tab", True)
        return self.finds


@pytest.mark.usefixtures("fresh")
def test_sentence_data_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr(extras, "load", lambda *_, **__: Nltk(False))
    with pytest.raises(UsageError, match=r"'punkt_tab' of nltk.*/somewhere/nltk_data.*NLTK_DATA"):
        scored(item(("punctuation:no_comma", {})), "x")


def test_sentence_data_that_nltk_can_download(monkeypatch):
    monkeypatch.setattr(extras, "load", lambda *_, **__: Nltk(True))
    ifeval._provide_sentence_data()


@pytest.mark.usefixtures("fresh")
def test_checks_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(extras, "load", lambda _, **kw: real_load("no_such_package", **kw))
    with pytest.raises(UsageError, match=r"scoring IFEval needs .*'mlx-optiq\[eval\]'"):
        scored(item(("punctuation:no_comma", {})), "x")


real_load = extras.load


@pytest.mark.assets
@pytest.mark.usefixtures("checks")
def test_every_published_instruction_has_a_check(shared):
    items = TASK.dataset(BenchmarkData(shared / "assets" / "eval"), CONFIG)
    assert len(items) == 541
    scores = [scored(one, "A text, of no use: it follows little.") for one in items]
    assert sum(len(score.detail["instructions"]) for score in scores) == 834
    assert None not in {score.value for score in scores}
    json.dumps([dict(score.detail) for score in scores])
