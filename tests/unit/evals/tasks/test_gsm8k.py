"""GSM8K: numbers in answers, items and prompts."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import UsageError
from optiq.evals.task import Response
from optiq.evals.tasks.gsm8k import _SHOTS, TASK, last_number
from tests.benchmarks import write, write_benchmarks

NUMBERS = {
    "The answer is 18.": 18,
    "She pays $1,234.50 in all": "1234.5",
    "It costs 18 dollars.": 18,
    "#### 70,000": 70000,
    "#### -3": -3,
    "that is \u22125 degrees": -5,
    "a loss of \u201310": -10,
    "10-4": 4,
    "10 - 4": 4,
    "- 4 apples": 4,
    "3 - 8 = -5": -5,
    "x=-7": -7,
    "$-20": -20,
    "-$20": -20,
    "50%": 50,
    r"50\%": 50,
    "about .5 litres": "0.5",
    "18.00": 18,
    "3/4 of a cup": "0.75",
    "2 1/2 hours": "2.5",
    "1 / 3": "1/3",
    r"\frac{3}{8}": "3/8",
    r"\dfrac12": "1/2",
    r"$\boxed{42}$ after 3 days": 42,
    r"\boxed{\frac{1}{4}} or 25%": "1/4",
    r"\boxed{\$1{,}200}": 1200,
    r"\boxed{x} is 5": 5,
    r"1\,000\,000": 1000000,
    "12\u202f500 euros": 12500,
    "12 500": 500,
    "options 3,4": 4,
    "1,23": 23,
    "**6**": 6,
    "6th": 6,
    "1.5e3": 1500,
    "The answer is 5/0.": None,
    "no number": None,
    "": None,
    "...": None,
    "7 apples (not 12)": 12,
    "from 3 to 9.": 9,
    "12:30": 30,
    "\uff11\uff12": 12,
}


@pytest.mark.parametrize(("text", "number"), NUMBERS.items())
def test_the_last_number(text, number):
    assert last_number(text) == (None if number is None else Fraction(number))


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "${:,}", "{}.0", "**{:,}**."]))
def test_every_way_to_write_an_integer(value, form):
    assert last_number(f"First 3, then 4.\nThe answer is {form.format(value)}") == value


@given(st.text(alphabet="0123456789.,/-$% \\{}frcboxed\n", max_size=60))
def test_no_text_breaks_it(text):
    number = last_number(text)
    assert number is None or isinstance(number, Fraction)


def test_a_number_of_too_many_digits_is_none():
    assert last_number("7 and then " + "9" * 6000) == 7


@pytest.mark.assets
def test_all_published_solutions_give_their_own_number(shared):
    data = BenchmarkData(shared / "assets" / "eval")
    items = TASK.dataset(data, EvalConfig(full=True))
    rows = data.load("gsm8k/test").rows
    assert len(items) == 1319
    for item, row in zip(items, rows, strict=True):
        assert TASK.scorer(item, Response(row["answer"]), EvalConfig()).value == 1.0


@pytest.mark.assets
def test_the_share_is_a_thousand_by_the_seed(shared):
    data = BenchmarkData(shared / "assets" / "eval")
    items = [item.id for item in TASK.dataset(data, EvalConfig())]
    assert len(items) == 1000
    assert items == sorted(items, key=int)
    assert items != [item.id for item in TASK.dataset(data, EvalConfig(seed=1))]


def test_the_examples_of_the_raw_text_are_right():
    for _, working, result in _SHOTS:
        assert last_number(working) == Fraction(result)
    assert len(_SHOTS) == 8


def test_both_forms(tmp_path):
    item = TASK.dataset(BenchmarkData(write_benchmarks(tmp_path)), EvalConfig())[1]
    text = EvalConfig(gsm8k_form="text")
    prompt = TASK.solver(item, text)
    assert prompt.text.endswith("\n\nQuestion: What is 2 times 1000?\nAnswer:")
    assert prompt.text.count("The answer is ") == 8
    assert prompt.stop == ("Question:",)
    assert TASK.full_version(text) == "1+8-shot"
    chat = TASK.solver(item, EvalConfig(gsm8k_form="chat"))
    assert chat.messages[0]["content"].startswith("What is 2 times 1000?")
    assert TASK.full_version(EvalConfig(gsm8k_form="chat")) == "1"


def test_a_solution_without_a_number(tmp_path):
    write(tmp_path / "gsm8k/test.jsonl", [{"question": "q", "answer": "it is 5"}])
    with pytest.raises(UsageError, match="row 0: 'answer' must end in"):
        TASK.dataset(BenchmarkData(tmp_path), EvalConfig())
