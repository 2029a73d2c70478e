"""Versions and machine, as artifacts record them."""

from __future__ import annotations

from importlib.metadata import version

from optiq import __version__
from optiq.artifacts import Provenance
from optiq.backend import BLAS, is_cpu, mx


def provenance() -> Provenance:
    """Versions of optiq, mlx and mlx-lm, the device and the BLAS of this process."""
    info = mx.device_info()
    kind = "CPU" if is_cpu() else "GPU"
    return Provenance(
        optiq=__version__,
        mlx=version("mlx"),
        mlx_lm=version("mlx-lm"),
        device=f"{kind} {info.get('device_name', 'unknown')}",
        blas=BLAS,
    )
