"""Fixtures of all tests: tiny checkpoints and their sources."""

from __future__ import annotations

import optiq  # isort: skip  before mlx, so that its BLAS is the one in use

from pathlib import Path

import pytest

from optiq.models.load import Source, open_source
from optiq.upstream import TokenizerWrapper
from tests.tiny import tiny_checkpoint

SHARED = Path(__file__).parents[1].parent / "shared"

__all__ = ["optiq"]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that tests may read, not change."""
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_source(tiny_llama: Path) -> Source:
    """Its source."""
    return open_source(str(tiny_llama))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_source: Source) -> TokenizerWrapper:
    """Its tokenizer."""
    return tiny_source.tokenizer


@pytest.fixture(scope="session")
def shared() -> Path:
    """Third-party data beside the checkout; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs third-party data in ../shared")
    return SHARED
