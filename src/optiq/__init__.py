"""optiq: the best MLX model for a byte budget, measured.

`measure`, `allocate`, `convert` and `judge` are the stages of the pipeline; each takes the
dataclass of its options and returns an artifact; `load` gives a model that writes. They are loaded
on first use, so that importing optiq is cheap. On Linux CPU importing optiq loads an optimized
BLAS, if MLX is not there yet.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optiq.artifacts import BitPlan, Fidelity, SensitivityTable
    from optiq.configs import AllocateConfig, ConvertConfig, JudgeConfig, MeasureConfig, RunConfig
    from optiq.engine.engine import load
    from optiq.pipeline import allocate, baseline, convert, judge, measure

from optiq import blas as _blas  # noqa: F401  loads the BLAS before anyone imports mlx

__version__ = "0.1.0"

_HOMES = {
    "AllocateConfig": "optiq.configs",
    "BitPlan": "optiq.artifacts",
    "ConvertConfig": "optiq.configs",
    "Fidelity": "optiq.artifacts",
    "JudgeConfig": "optiq.configs",
    "MeasureConfig": "optiq.configs",
    "RunConfig": "optiq.configs",
    "SensitivityTable": "optiq.artifacts",
    "allocate": "optiq.pipeline",
    "baseline": "optiq.pipeline",
    "convert": "optiq.pipeline",
    "judge": "optiq.pipeline",
    "load": "optiq.engine.engine",
    "measure": "optiq.pipeline",
}

__all__ = [
    "AllocateConfig",
    "BitPlan",
    "ConvertConfig",
    "Fidelity",
    "JudgeConfig",
    "MeasureConfig",
    "RunConfig",
    "SensitivityTable",
    "allocate",
    "baseline",
    "convert",
    "judge",
    "load",
    "measure",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401  any public object
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'optiq' has no attribute '{name}'")
    return getattr(importlib.import_module(home), name)
