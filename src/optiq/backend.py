"""The one door to MLX: `mx` and `nn`, imported after the BLAS of `optiq.blas`."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import cast

from optiq import blas
from optiq.errors import EngineFailure

import mlx.core as mx  # isort: skip  after the BLAS, on purpose
import mlx.nn as nn  # isort: skip
from mlx.utils import tree_flatten, tree_unflatten  # isort: skip

__all__ = [
    "BLAS",
    "array_note",
    "compute_dtype",
    "device_name",
    "gflops",
    "is_cpu",
    "is_cuda",
    "load_arrays",
    "memory_bytes",
    "memory_left",
    "mx",
    "nn",
    "save_arrays",
    "tree_flatten",
    "tree_unflatten",
]

BLAS = blas.NAME


def is_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def is_cuda() -> bool:
    """Whether MLX computes on an NVIDIA GPU."""
    return not is_cpu() and bool(mx.cuda.is_available())


def compute_dtype(source: mx.Dtype) -> mx.Dtype:
    """Dtype of activations: float32 on the CPU, where half precision accumulates badly."""
    return mx.float32 if is_cpu() else source


def device_name() -> str:
    """The device MLX computes on, by name: `cpu: AMD EPYC`."""
    kind = "cpu" if is_cpu() else "gpu"
    return f"{kind}: {mx.device_info().get('device_name', 'unknown')}"


def memory_bytes() -> int:
    """Memory of the device that MLX computes on: of the GPU if it has its own, else of the host."""
    own = None if is_cpu() else mx.device_info().get("total_memory")
    return int(own) if own else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_left() -> int:
    """Memory that is free for more arrays: of the GPU if it has its own, else of the host."""
    own = None if is_cpu() else mx.device_info().get("total_memory")
    try:
        host = _available_bytes(Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:  # where there is no such file, others on the machine are not counted
        host = memory_bytes() - mx.get_active_memory()
    return max(0, int(own) - mx.get_active_memory() if own else host)


def release_memory() -> None:
    """Give memory that is not used any more back to the system.

    MLX keeps freed buffers on a GPU. Its CPU back end frees them to the C library, and glibc keeps
    what lies between pieces that are used: 0.5 GB and more in a measurement of a 1B model.
    """
    mx.clear_cache()
    if is_cpu() and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; others have none
        if trim is not None:
            trim(0)


def _available_bytes(meminfo: str) -> int:
    """`MemAvailable` of Linux's table, which is in KiB."""
    rows = (line.split() for line in meminfo.splitlines())
    return next(1024 * int(row[1]) for row in rows if row[0] == "MemAvailable:")


def load_arrays(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, by name; read from disk when they are evaluated."""
    return cast(dict[str, mx.array], mx.load(str(path)))


def save_arrays(path: Path, arrays: dict[str, mx.array], about: str = "") -> None:
    """Write a safetensors file so that it is whole or absent.

    Args:
        path: the file; its directory exists.
        arrays: by name.
        about: a word kept in the metadata, which `array_note` reads.

    Raises:
        EngineFailure: if the disk refuses.
    """
    temporary = path.with_suffix(".part.safetensors")
    try:
        mx.save_safetensors(str(temporary), arrays, {"about": about})
    except RuntimeError as error:
        temporary.unlink(missing_ok=True)
        raise EngineFailure(
            f"{path} cannot be written ({error}); free disk space and run again"
        ) from None
    temporary.replace(path)


def array_note(path: Path) -> str:
    """What `save_arrays` was told about the file; nothing if something else wrote it."""
    _, metadata = cast(
        tuple[dict[str, mx.array], dict[str, str]], mx.load(str(path), return_metadata=True)
    )
    return metadata.get("about", "")


def gflops(size: int = 1024, seconds: float = 0.5) -> float:
    """Measured speed of square float32 matrix products, in 10^9 operations a second.

    Args:
        size: rows and columns of the matrices.
        seconds: how long to measure, after one product to warm up; at least one more is timed.
    """
    a, b = mx.random.normal((2, size, size))
    mx.eval(a @ b)
    products, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or products == 0:
        mx.eval(a @ b)
        products += 1
    return 2 * size**3 * products / elapsed / 1e9
