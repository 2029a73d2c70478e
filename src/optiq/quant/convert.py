"""Convert: a plan and its rounded matrices become the files that stock `mlx_lm.load` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optiq.artifacts import GROUP_SIZES, BitPlan, PlanEntry, write_atomic
from optiq.backend import load_arrays, mx
from optiq.events import Emit, track
from optiq.models.load import Source
from optiq.models.safetensors_io import ShardWriter, disk_failure
from optiq.models.vision.sidecar import write_sidecar
from optiq.quant.directory import copy_side_files, tensor_bytes, tensor_spec


def write_model(
    source: Source, plan: BitPlan, rounded: dict[str, Path], folder: Path, emit: Emit
) -> None:
    """Write weights, side towers, config and tokenizer of a quantized model.

    Args:
        source: the model the plan is for.
        plan: an option for every matrix.
        rounded: file with the stored tensors of each matrix, by module path.
        folder: an existing directory.
        emit: receives progress.

    Raises:
        EngineFailure: if the disk refuses.

    Cost: one tensor in memory.
    """
    with disk_failure(folder):
        specs = [tensor_spec(name, value) for name, value in _tensors(source, rounded)]
        with ShardWriter(folder, specs) as writer:
            tensors = _tensors(source, rounded)
            for name, value in track(tensors, emit, "write", len(specs), "tensors"):
                writer.write(name, [tensor_bytes(value)])
        text = json.dumps(quantized_config(source.config, plan), indent=4)
        write_atomic(folder / "config.json", text.encode() + b"\n")
        write_sidecar(source, folder)
        copy_side_files(source, folder)


def _tensors(source: Source, rounded: dict[str, Path]) -> Iterator[tuple[str, mx.array]]:
    """Names and lazy arrays in the order of the module tree; none is kept by this function."""
    weights = source.weights()
    for name in source.parameters:
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in rounded:
            yield name, weights.pop(name)
            continue
        stored = load_arrays(rounded[path])
        for part in ("weight", "scales", "biases"):
            if f"{path}.{part}" in stored:
                yield f"{path}.{part}", stored.pop(f"{path}.{part}")


def quantized_config(config: dict[str, Any], plan: BitPlan) -> dict[str, Any]:
    """config.json with the bits of every matrix, as stock mlx-lm reads them.

    The default group is the smallest in use: stock mlx-lm passes over matrices whose rows the
    default does not divide, whatever their own entry says.
    """
    groups = [e.option.group_size for e in plan.entries if e.option.kind != "keep"]
    quantization: dict[str, Any] = {
        "group_size": min(groups, default=GROUP_SIZES[0]),
        "bits": 4,
        "mode": "affine",
    }
    quantization |= {entry.path: _setting(entry) for entry in plan.entries}
    return config | {"quantization": quantization, "quantization_config": quantization}


def _setting(entry: PlanEntry) -> dict[str, Any] | bool:
    if entry.option.kind == "keep":
        return False
    return {"group_size": entry.option.group_size, "bits": entry.option.bits}
