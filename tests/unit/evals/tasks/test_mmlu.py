"""MMLU: items, prompts and scores."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import UsageError
from optiq.evals.task import Item, Response
from optiq.evals.tasks.mmlu import TASK, read_letter
from tests.benchmarks import write_benchmarks

CONFIG = EvalConfig()


@pytest.fixture
def items(tmp_path):
    return TASK.dataset(BenchmarkData(write_benchmarks(tmp_path)), CONFIG)


def test_the_text_is_the_classic_one(items):
    prompt = TASK.solver(items[0], CONFIG)
    assert prompt.shared.startswith(
        "The following are multiple choice questions (with answers) about first subject.\n\n"
        "Which of these is 0?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: A\n\n"
        "Which of these is 1?\nA. 4\nB. 1\nC. 2\nD. 3\nAnswer: B\n\n"
    )
    assert prompt.shared.endswith("\nAnswer: A\n\n")
    assert prompt.shared.count("Answer: ") == 5
    assert prompt.own == "Which of these is 10?\nA. 12\nB. 13\nC. 10\nD. 11\nAnswer:"
    assert prompt.options == (" A", " B", " C", " D")
    assert not prompt.chat


def test_items_of_a_subject_share_their_beginning(items):
    beginnings = {item.fields["subject"]: TASK.solver(item, CONFIG).shared for item in items}
    assert len(beginnings) == len(set(beginnings.values())) == 2
    for item in items:
        assert TASK.solver(item, CONFIG).shared is beginnings[item.fields["subject"]]


def test_the_chat_form(items):
    chat = EvalConfig(mmlu_form="chat")
    prompt = TASK.solver(items[0], chat)
    assert prompt.chat
    assert prompt.options == ("A", "B", "C", "D")
    assert TASK.full_version(chat) == "1+chat"


@pytest.mark.assets
def test_the_share_is_proportional_to_the_subjects(shared):
    data = BenchmarkData(shared / "assets" / "eval")
    every = TASK.dataset(data, EvalConfig(full=True))
    assert len(every) == 14042
    assert [item.id for item in every] == [str(n) for n in range(14042)]
    part = TASK.dataset(data, CONFIG)
    assert len(part) == 1000
    sizes, shares = (Counter(i.fields["subject"] for i in some) for some in (every, part))
    assert len(shares) == 57
    for subject, size in sizes.items():
        assert abs(shares[subject] - 1000 * size / 14042) < 1
    assert part != TASK.dataset(data, EvalConfig(seed=1))


def test_a_subject_without_examples(tmp_path):
    write_benchmarks(tmp_path)
    lines = (tmp_path / "mmlu/dev.jsonl").read_text().splitlines()
    (tmp_path / "mmlu/dev.jsonl").write_text("\n".join(lines[:9]))
    with pytest.raises(UsageError, match="fewer than 5 examples of 'second_subject'"):
        TASK.dataset(BenchmarkData(tmp_path), CONFIG)


ITEM = Item("0", {"answer": 2})


def test_the_likeliest_letter_counts():
    assert TASK.scorer(ITEM, Response("", logprobs=(-3.0, -2.0, -1.5, -9.0)), CONFIG).value == 1.0
    score = TASK.scorer(ITEM, Response("C", logprobs=(-3.0, -1.0, -1.5, -9.0)), CONFIG)
    assert (score.value, score.parsed) == (0.0, "B")


@pytest.mark.parametrize("logprobs", [(), (-1.0,) * 3, (-1.0, float("nan"), -2.0, -3.0)])
def test_likelihoods_that_are_none_are_a_failure_of_the_harness(logprobs):
    score = TASK.scorer(ITEM, Response("", logprobs=logprobs), CONFIG)
    assert score.value is None
    assert "expected 4 finite" in score.detail["failure"]


LETTERS = {
    "C": "C",
    " C. nine": "C",
    "(C) nine": "C",
    "C) nine": "C",
    "C: nine": "C",
    "**C**": "C",
    "**C.** nine": "C",
    "`C`": "C",
    "The answer is C.": "C",
    "the correct answer is (c)": "C",
    "Answer: B\nNo wait. Answer: C": "C",
    "**Answer:** C": "C",
    "The answer is **C**, because B is wrong": "C",
    r"So \boxed{C}": "C",
    r"The answer is A? No: $\boxed{\text{C}}$": "C",
    "Let me think about A and B.\n\nC": "C",
    "First, B is out.\n(C)": "C",
    "A dog has four legs": None,
    "A.I. is a field": None,
    "Both B and C": None,
    "The answer is Canada": None,
    "Certainly": None,
    "D'accord": None,
    "E": None,
    "": None,
    "42": None,
}


@pytest.mark.parametrize(("text", "letter"), LETTERS.items())
def test_letters_of_written_answers(text, letter):
    assert read_letter(text) == letter
    assert TASK.scorer(ITEM, Response(text), CONFIG).value == float(letter == "C")


@given(st.text(max_size=80))
def test_no_text_breaks_it(text):
    assert read_letter(text) in {None, "A", "B", "C", "D"}
