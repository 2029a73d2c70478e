import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.humaneval import KINDS, rows, solutions, verdict
from optiq.configs import EvalConfig
from optiq.errors import UsageError
from optiq.evals import sandbox
from optiq.evals.task import Chat, Continuation, Item, Response
from optiq.evals.tasks import humaneval
from optiq.evals.tasks.humaneval import TASK, extract

CONFIG = EvalConfig(allow_code_execution=True)
PROMPT = '''from typing import List


def helper(x: int) -> int:
    return x + 1


def area(sides: List[int]) -> int:
    """Area of a rectangle of two sides.

    >>> area([2, 3])
    6
    """
'''
TEST = """
def check(candidate):
    assert candidate([2, 3]) == 6
    assert candidate([1, 1]) == 1
"""
ITEM = Item("HumanEval/x", {"prompt": PROMPT, "entry_point": "area", "test": TEST})
BODY = "    return sides[0] * sides[1]\n"
WHOLE = f"def area(sides: List[int]) -> int:\n{BODY}"


class Rows:
    """Benchmark data of some rows."""

    def __init__(self, *rows):
        self.rows = rows

    def load(self, name):
        assert name == "humaneval/problems"
        return self


@pytest.fixture(scope="module")
def allowed():
    try:
        sandbox.for_config(CONFIG)
    except UsageError as error:
        pytest.skip(str(error))


def area(text):
    """What the extracted function makes of sides 2 and 3; runs only texts of this file."""
    scope = {}
    exec(extract(text, PROMPT, "area"), scope)
    return scope["area"]([2, 3])


@pytest.mark.parametrize(
    "text",
    [
        BODY,
        WHOLE,
        f"```python\n{WHOLE}```",
        f"```\n{WHOLE}\n```\nThis multiplies the sides.",
        f"Sure!\n\n```python\n{WHOLE}```\n\nUse it so:\n\n```python\nprint(area([2, 3]))\n```",
        f"```python\n{WHOLE}",
        f"```python\n{PROMPT}{BODY}```",
        f"```python\n{BODY}```",
        f"```python\n{textwrap.dedent(BODY)}```",
        f"1. First:\n\n   ```python\n{textwrap.indent(WHOLE, '   ')}   ```\n",
        f"```sh\npip install x\n```\n\n```python\n{WHOLE}```",
        f"Here is the function.\n\n{WHOLE}\nIt's short.",
        f"from the docstring I read this:\n\n{WHOLE}",
        "```python\nfrom math import prod\n\ndef area(sides):\n    return prod(sides)\n```",
        "```python\ndef times(a, b):\n    return a * b\n\ndef area(s):\n    return times(*s)\n```",
        "```python\ndef area(sides):\n    return (helper(sides[0]) - 1) * sides[1]\n```",
        f"```python\nfrom __future__ import annotations\n{WHOLE}```",
        f"{BODY}\n\ndef unfinished(",
        f"{BODY}\n# so that\nprint(area([2,",
    ],
)
def test_the_function_is_found(text):
    assert area(text) == 6


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot do that.",
        "```python\n```",
        "```python\nx = 1\n```",
        "def area(",
        "\0",
        "(" * 999,
    ],
)
def test_where_there_is_no_function_the_program_is_that_of_the_text_to_the_letter(text):
    found = extract(text, PROMPT, "area")
    assert found.startswith(PROMPT)
    with pytest.raises((AssertionError, SyntaxError, ValueError, MemoryError)):
        assert area(text) == 6


def test_an_odd_escape_is_no_error():
    text = f"    x = '\\d'\n{BODY}"
    assert extract(text, PROMPT, "area") == PROMPT + text


def test_a_continuation_is_run_to_the_letter():
    text = f"{BODY}\nprint('more')\n\ndef other():\n    pass\n"
    assert extract(text, PROMPT, "area") == PROMPT + text


def test_of_two_solutions_the_first_counts():
    other = "```python\ndef area(sides):\n    return 0\n```"
    assert area(f"```python\n{WHOLE}```\nor\n{other}") == 6
    assert area(f"{other}\nor\n```python\n{WHOLE}```") == 0


@given(st.text(alphabet="def area(:)\n \t`'\"#@\\x0", max_size=60))
def test_any_text_is_a_program(text):
    assert isinstance(extract(text, PROMPT, "area"), str)


def test_many_lines_that_may_begin_code_take_no_long_time():
    text = "from x import y\n" * 5_000 + "def area(: no"
    start = time.monotonic()
    assert extract(text, PROMPT, "area").startswith(PROMPT)
    assert time.monotonic() - start < 10


def test_the_problem_is_asked_as_a_message_or_as_text():
    chat = TASK.solver(ITEM, CONFIG)
    assert isinstance(chat, Chat)
    assert PROMPT.strip() in chat.messages[0]["content"]
    text = EvalConfig(humaneval_form="text", max_tokens=7)
    assert TASK.solver(ITEM, text) == Continuation(PROMPT, 7, humaneval._STOPS)
    assert TASK.full_version(CONFIG) != TASK.full_version(text)


def test_it_is_ready_only_where_code_may_run():
    with pytest.raises(UsageError, match="--allow-code-execution"):
        TASK.ready(EvalConfig())


@pytest.mark.usefixtures("allowed")
def test_problems_are_read():
    row = {"task_id": ITEM.id, **ITEM.fields, "canonical_solution": BODY}
    assert TASK.dataset(Rows(row), CONFIG) == [ITEM]


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    ("text", "value", "outcome"),
    [
        (BODY, 1, "passed"),
        (f"```python\n{WHOLE}```", 1, "passed"),
        ("    return 6\n", 0, "failed"),
        ("    import sys; sys.exit(0)\n", 0, "failed"),
        ("", 0, "failed"),
    ],
)
def test_a_response_is_scored(text, value, outcome):
    score = TASK.scorer(ITEM, Response(text), CONFIG)
    assert score.value == value
    assert score.detail["outcome"] == outcome
    assert score.parsed == extract(text, PROMPT, "area")


@pytest.mark.assets
@pytest.mark.usefixtures("allowed")
def test_all_canonical_solutions_pass_and_all_mutants_fail(shared):
    problems = rows(shared / "assets/eval/humaneval/HumanEval.jsonl.gz")
    pairs = [(row, text) for row in problems for text in list(solutions(row))[:2]]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: verdict(*pair), pairs))
    assert len(problems) == 164
    assert KINDS[:2] == ("canonical", "none")
    assert found == [True, False] * 164
