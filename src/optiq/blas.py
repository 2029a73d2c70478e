"""Loads an optimized BLAS for MLX, in one place and before `mlx.core`.

MLX's Linux CPU wheel links reference BLAS. A library with the standard symbols that is loaded into
the global namespace before `mlx.core` takes its place: on two cores 2.5 GFLOP/s become 200.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import sys
import sysconfig
import warnings
from pathlib import Path

from optiq import settings

_CANDIDATES = ("libopenblas.so.0", "libopenblas.so", "libmkl_rt.so.3", "libmkl_rt.so.2")
_SYMBOL = "cblas_sgemm"
_BACKENDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal")


def installed_backends() -> list[str]:
    """Distributions of MLX back ends in this environment; more than one is a broken environment."""
    found = []
    for name in _BACKENDS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def _candidates(choice: str) -> list[str]:
    if choice != "auto":
        return [choice]
    if platform.system() != "Linux" or installed_backends() != ["mlx-cpu"]:
        return []
    wheel = Path(sysconfig.get_path("data")) / "lib"
    return [*_CANDIDATES, *(str(wheel / name) for name in _CANDIDATES)]


def _load() -> str:
    choice = settings.load().blas
    if choice == "off":
        return "MLX's own (OPTIQ_BLAS=off)"
    names = _candidates(choice)
    if not names:
        return "MLX's own"
    if "mlx.core" in sys.modules:
        text = "mlx was imported before optiq, so its own BLAS stays in use; import optiq first"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
        return "MLX's own (mlx was imported before optiq)"
    for name in names:
        try:
            library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(library, _SYMBOL):
            return Path(name).name
    if choice != "auto":
        text = (
            f"OPTIQ_BLAS={choice} cannot be loaded or has no {_SYMBOL}, so MLX's own BLAS is used; "
            f"give a BLAS library with the standard symbols, or 'auto'"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=4)
        return "MLX's own"
    return "MLX's reference BLAS (slow)"


NAME = _load()
"""Library that serves MLX's matrix products on the CPU, or why it is MLX's own."""
