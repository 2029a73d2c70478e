"""Sizes for people and the bound of file headers against real files."""

import numpy as np
import pytest
from safetensors.numpy import save

from optiq.numerics.size import bpw, file_overhead_bytes, format_size
from tests.unit.quant.tables import llama_modules, make_scores, make_source, make_table


def test_bpw_counts_scales():
    assert bpw(64 * 4 // 8 + 4, 64) == 4.5


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (84_600_000, "84.6 MB"),
        (999_499, "999 kB"),
        (999_600, "1.00 MB"),
        (9_996_000, "10.0 MB"),
        (99_960_000, "100 MB"),
        (8_300_000_000, "8.30 GB"),
        (2_000_000_000_000, "2.00 TB"),
    ],
)
def test_format_size(size_bytes, text):
    assert format_size(size_bytes) == text


def test_overhead_bounds_a_real_header():
    """Headers of a llama's file with two norms a layer and a bias per matrix."""
    modules = llama_modules(30)
    tensors = {}
    for module in modules:
        out, width = module.shape
        tensors[f"{module.path}.weight"] = np.zeros((out, width // 8), np.uint32)
        for part in ("scales", "biases"):
            tensors[f"{module.path}.{part}"] = np.zeros((out, width // 64), np.float16)
    fixed = {f"{module.path}.bias": np.zeros(module.shape[0], np.float16) for module in modules}
    for layer in range(30):
        for name in ("input_layernorm", "post_attention_layernorm"):
            fixed[f"model.layers.{layer}.{name}.weight"] = np.zeros(128, np.float16)
    data_bytes = sum(array.nbytes for array in (tensors | fixed).values())
    header_bytes = len(save(tensors | fixed, metadata={"format": "mlx"})) - data_bytes
    source = make_source(fixed_bytes=sum(array.nbytes for array in fixed.values()))
    table = make_table([make_scores(module, [0.1] * 18) for module in modules], source=source)
    bound = file_overhead_bytes(table)
    assert header_bytes <= bound <= 3 * header_bytes


def test_overhead_grows_with_shards():
    small = make_table([], source=make_source(fixed_bytes=0))
    large = make_table([], source=make_source(fixed_bytes=50 * 10**9))
    assert file_overhead_bytes(large) > file_overhead_bytes(small) > 0
