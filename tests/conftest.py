"""Fixtures of all tests: tiny checkpoints and their sources."""

from __future__ import annotations

import optiq  # isort: skip  before mlx, so that its BLAS is the one in use

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from optiq import pipeline
from optiq.configs import AllocateConfig, JudgeConfig, MeasureConfig, RunConfig
from optiq.models.load import Source, open_source
from optiq.quant import sensitivity
from optiq.upstream import TokenizerWrapper
from tests import gemma4
from tests.tiny import tiny_checkpoint

SHARED = Path(__file__).parents[1].parent / "shared"

__all__ = ["optiq"]

# no law fails because the machine is busy
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")


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


@pytest.fixture(scope="session")
def gemma_release(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Release:
    """The tiny Gemma-4 at 5.0 bits a weight, which tests may read, not change."""
    folder = tmp_path_factory.mktemp("gemma4")
    small = sensitivity.Effort(window=32, num_windows=4, rounding_windows=4, verify_pairs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sensitivity.EFFORTS, "quick", small)
        return pipeline.convert(
            str(gemma4.TARGET),
            folder / "out",
            measure=MeasureConfig(effort="quick"),
            allocate=AllocateConfig(target_bpw=5.0),
            judge=JudgeConfig(window=32, max_windows=4),
            run=RunConfig(work=folder / "work"),
        )
