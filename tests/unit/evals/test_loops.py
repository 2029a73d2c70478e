"""Ends that go round in circles, and ends that do not."""

import pytest

from optiq.evals.loops import ends_in_loop


@pytest.mark.parametrize(
    "text",
    [
        "So the answer is 4. " * 5,
        "A start. " + "no " * 40,
        "x" * 80,
        "table\n" + "| a | b |\n" * 9 + "  \n",
        "Wait, " + "let me think about that again, from the very start, with care. " * 4,
        "abcdefg hijklmno pqrstuv " * 30 + "abcdefg hijk",
    ],
)
def test_loops(text):
    assert ends_in_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "short short short short",
        "So the answer is 4. " * 3,
        "x" * 79,
        "no " * 60 + "but then it came to an end of its own.",
        "".join(f"{n}. item number {n}\n" for n in range(200)),
        "def f(a, b):\n    return a + b\n\n\ndef g(a, b):\n    return a - b\n" * 2,
    ],
)
def test_no_loops(text):
    assert not ends_in_loop(text)
