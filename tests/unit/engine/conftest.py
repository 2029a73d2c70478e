"""Tokenizers that the text side of the engine is held to."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from optiq.engine.output import OutputFormat
from optiq.upstream import TokenizerWrapper, tokenizer_of
from tests.gemma4 import TARGET


@pytest.fixture(scope="session")
def gemma() -> TokenizerWrapper:
    """The tiny Gemma-4's: bytes and a few merges, the special tokens of the family."""
    return tokenizer_of(TARGET, {})


@pytest.fixture(scope="session")
def gemma_format(gemma) -> OutputFormat:
    return OutputFormat.of(gemma)


def of_assets(folder: Path) -> TokenizerWrapper:
    """A tokenizer that has no config beside it."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>"} if folder.name == "gemma4" else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    fast.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return TokenizerWrapper(fast)


@pytest.fixture(scope="session")
def gemma_real(shared) -> TokenizerWrapper:
    """The published Gemma-4's."""
    return of_assets(shared / "assets" / "tokenizers" / "gemma4")


@pytest.fixture(scope="session")
def smollm(shared) -> TokenizerWrapper:
    """SmolLM2's: byte-level, ChatML."""
    return of_assets(shared / "assets" / "tokenizers" / "smollm2")
