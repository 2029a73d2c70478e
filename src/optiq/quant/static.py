"""Scores without data: the relative squared error of the weights, by role.

The scale is arbitrary; only the order and the proportions count. Use it to compare, or where
nothing can be run.
"""

from __future__ import annotations

import numpy as np

from optiq.artifacts import (
    KEEP,
    LATTICE,
    LatticeReport,
    ModuleScores,
    OptionScore,
    Rounding,
    menu,
)
from optiq.backend import mx
from optiq.models.load import Source
from optiq.numerics.lattice import find_lattice
from optiq.quant.quantizers import rtn, search
from optiq.quant.quantizers.base import Inputs

_SAMPLE_ROWS = 192


def static_scores(source: Source, rounding: Rounding) -> tuple[ModuleScores, ...]:
    """Scores of every module from its weights alone.

    Returns:
        KL taken as relative squared weight error, measured on 192 rows a module.
    """
    quantize = rtn.quantize if rounding == "rtn" else search.quantize
    rows = []
    weights = source.weights()
    for info in source.modules:
        weight = weights[f"{info.path}.weight"]
        flat = weight.reshape(-1, info.in_dims)
        picked = np.linspace(0, flat.shape[0] - 1, min(_SAMPLE_ROWS, flat.shape[0])).astype(int)
        sample = np.array(flat[mx.array(picked)].astype(mx.float32))
        power = float((sample**2).sum()) or 1.0
        inputs = Inputs(np.eye(info.in_dims, dtype=np.float32))
        itemsize = source.info.itemsize
        scores = []
        for option in menu(info.in_dims):
            rounded = quantize(sample, option, inputs, source.info.dtype).weights()
            error = float(((sample - rounded) ** 2).sum()) / power
            size = option.size_bytes(info.shape, itemsize)
            scores.append(OptionScore(option, error, 0.0, size, "none"))
        lattice = find_lattice(weight, source.dtype)
        if lattice is not None:
            size = LATTICE.size_bytes(info.shape, itemsize)
            scores.append(OptionScore(LATTICE, 0.0, 0.0, size, "none"))
        scores.append(OptionScore(KEEP, 0.0, 0.0, KEEP.size_bytes(info.shape, itemsize), "none"))
        none = LatticeReport("none", False, 0.0, 0.0)
        rows.append(ModuleScores(info, tuple(scores), lattice.report if lattice else none))
    return tuple(rows)
