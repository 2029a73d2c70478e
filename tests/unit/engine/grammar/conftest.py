"""A compiler over the tiny Gemma-4's tokens, and texts as its tokens."""

from collections.abc import Callable

import pytest

from optiq.engine.grammar.compiler import Compiler
from optiq.engine.text import backend_of

VOCAB = 600  # more than the tokenizer has, as padded checkpoints do
STOP = frozenset({1, 6, 14})


@pytest.fixture(scope="session")
def compiler(gemma) -> Compiler:
    return Compiler(gemma, VOCAB, STOP)


@pytest.fixture(scope="session")
def ids(gemma) -> Callable[[str], list[int]]:
    """Token ids of a text, in which special tokens are parsed."""
    return lambda text: backend_of(gemma).encode(text, add_special_tokens=False).ids
