"""Bytes on disk: stored bits per weight, and what safetensors files take besides the data."""

from __future__ import annotations

import json

from optiq.artifacts import KEEP, SensitivityTable

SHARD_BYTES = 5 * 10**9
_QUANTIZED_PARTS = ("weight", "scales", "biases")
# Length prefix, `{}`, `"__metadata__":{"format":"mlx"},` and padding to 8 bytes, with room.
_SHARD_HEADER_BYTES = 128
# Norms, biases and buffers per matrix that can be quantized: about 1 in a transformer, 2 where
# every matrix and norm has a bias, 3.5 in Mamba-2 layers.
_FIXED_TENSORS_PER_MODULE = 4


def bpw(size_bytes: int, num_params: int) -> float:
    """Stored bits per weight of `size_bytes` bytes of codes, scales and biases."""
    return size_bytes * 8 / num_params


def format_size(size_bytes: int) -> str:
    """Bytes for people, in powers of ten and three digits: `84.6 MB`, `8.30 GB`."""
    value, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "B":
        return f"{size_bytes} B"
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f} {unit}"


def file_overhead_bytes(table: SensitivityTable) -> int:
    """Upper bound of the headers of `model*.safetensors`, for every plan of a table.

    Returns:
        Bytes of an entry for the codes, the scales and the biases of every module, an allowance for
        the tensors that are never quantized (the table knows their bytes, not their names), and the
        frame of as many 5 GB shards as the unquantized model takes; about 0.2% of a 135M model at
        5 bpw, less of a larger one.
    """
    modules = [scores.module for scores in table.modules]
    source = table.source
    source_bytes = source.fixed_bytes + sum(
        KEEP.size_bytes(module.shape, source.itemsize) for module in modules
    )
    entries = sum(
        _entry_bytes(f"{module.path}.{part}", module.shape, source_bytes)
        for module in modules
        for part in _QUANTIZED_PARTS
    )
    longest = max((module.path for module in modules), key=len, default="")
    num_fixed = min(_FIXED_TENSORS_PER_MODULE * len(modules), source.fixed_bytes // source.itemsize)
    fixed = num_fixed * _entry_bytes(f"{longest}.weight", (10**6,), source_bytes)
    num_shards = 2 + source_bytes // SHARD_BYTES
    return entries + fixed + num_shards * _SHARD_HEADER_BYTES


def _entry_bytes(name: str, shape: tuple[int, ...], end: int) -> int:
    """Length of a tensor's entry in a header, with offsets as long as `end`."""
    value = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end)}
    return len(json.dumps({name: value}))
