"""The one door to MLX: `mx` and `nn`, imported after the BLAS of `optiq.blas`."""

from __future__ import annotations

from optiq import blas

import mlx.core as mx  # isort: skip  after the BLAS, on purpose
import mlx.nn as nn  # isort: skip

__all__ = ["BLAS", "compute_dtype", "is_cpu", "mx", "nn"]

BLAS = blas.NAME


def is_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def compute_dtype(source: mx.Dtype) -> mx.Dtype:
    """Dtype of activations: float32 on the CPU, where half precision accumulates badly."""
    return mx.float32 if is_cpu() else source
