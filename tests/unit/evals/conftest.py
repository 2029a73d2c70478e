"""A tiny source with two uniform quantizations of it."""

from pathlib import Path
from typing import NamedTuple

import pytest

from optiq.artifacts import QuantOption
from optiq.events import no_emit
from optiq.models.load import Source
from optiq.quant.baseline import write_uniform


class Quantized(NamedTuple):
    """Directories of two quantizations."""

    good: Path
    bad: Path


@pytest.fixture(scope="session")
def quantized(tiny_source: Source, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    folder = tmp_path_factory.mktemp("quantized")
    found = Quantized(folder / "good", folder / "bad")
    write_uniform(tiny_source, QuantOption("affine", 8, 32), found.good, no_emit)
    write_uniform(tiny_source, QuantOption("affine", 3, 64), found.bad, no_emit)
    return found
