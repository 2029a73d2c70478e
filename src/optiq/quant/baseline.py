"""The honest rival: uniform quantization as stock `mlx_lm.convert -q` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from optiq.artifacts import BITS, GROUP_SIZES, QuantOption, write_atomic
from optiq.backend import mx, nn
from optiq.errors import UsageError
from optiq.events import Emit, track
from optiq.models.load import Source, size_on_disk
from optiq.models.safetensors_io import ShardWriter, TensorSpec, disk_failure, header_bytes
from optiq.quant.directory import copy_side_files, finished_directory, tensor_bytes, tensor_spec


class Candidate(NamedTuple):
    """A uniform quantization and the bytes of its `model*.safetensors`."""

    option: QuantOption
    size_bytes: int


class _Rule(NamedTuple):
    """What stock `quantize_model` does with the matrices of a model.

    Attributes:
        default: keywords of `mx.quantize`.
        verdicts: by path of every matrix that is quantized: what its family fixes, or nothing.
    """

    default: dict[str, Any]
    verdicts: dict[str, dict[str, Any]]


def uniform_candidates(source: Source) -> tuple[Candidate, ...]:
    """Every uniform quantization of a source, smallest first; no weights are read.

    Bits {2,3,4,5,6,8} by group {32,64,128}. As in stock mlx-lm, matrices whose rows the group does
    not divide stay as they are, and those for which the family fixes the bits (routers) have them.

    Raises:
        UsageError: if no matrix can be quantized.
    """
    model = source.model()
    candidates = []
    for bits in BITS:
        for group_size in GROUP_SIZES:
            option = QuantOption("affine", bits, group_size)
            rule = _stock_rule(model, option)
            if rule.verdicts:
                candidates.append(Candidate(option, _file_bytes(source, model, rule)))
    if not candidates:
        raise UsageError(
            f"{source.info.name} has no matrix that groups of {list(GROUP_SIZES)} divide; there is "
            "no uniform quantization of it"
        )
    return tuple(sorted(candidates, key=lambda c: (c.size_bytes, -c.option.bits)))


def pick_uniform(source: Source, like_bytes: int) -> QuantOption:
    """The smallest uniform quantization that is not smaller than `like_bytes`, else the largest.

    Args:
        source: the model to quantize.
        like_bytes: bytes of `model*.safetensors` of the model to compare with.
    """
    candidates = uniform_candidates(source)
    enough = [c for c in candidates if c.size_bytes >= like_bytes]
    return enough[0].option if enough else candidates[-1].option


def write_uniform(source: Source, option: QuantOption, out: Path, emit: Emit) -> int:
    """Write a uniform quantization as stock `mlx_lm.convert -q` would.

    Args:
        source: the model to quantize.
        option: an affine option.
        out: directory to write, absent so far; it appears when it is whole.
        emit: receives progress.

    Returns:
        Bytes of `model*.safetensors`.

    Raises:
        UsageError: if `out` exists.
        EngineFailure: if the disk is full.

    Cost: one matrix in memory.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; give another -o, or delete it")
    model = source.model()
    rule = _stock_rule(model, option)
    specs = _specs(source, model, rule)
    with disk_failure(out), finished_directory(out) as folder:
        with ShardWriter(folder, specs) as writer:
            tensors = _tensors(source, model, rule)
            stage = f"uniform {option.key}"
            for name, value in track(tensors, emit, stage, len(specs), "tensors"):
                writer.write(name, [tensor_bytes(value)])
        config = _stock_config(source.config, rule)
        write_atomic(folder / "config.json", json.dumps(config, indent=4).encode())
        copy_side_files(source, folder)
    return size_on_disk(out)


def _stock_rule(model: nn.Module, option: QuantOption) -> _Rule:
    predicate = getattr(model, "quant_predicate", None)
    verdicts: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % option.group_size:
            continue
        verdict = True if predicate is None else predicate(path, module)
        if verdict:
            verdicts[path] = dict(verdict) if isinstance(verdict, dict) else {}
    default = {"group_size": option.group_size, "bits": option.bits, "mode": "affine"}
    return _Rule(default, verdicts)


def _stock_config(config: dict[str, Any], rule: _Rule) -> dict[str, Any]:
    fixed = {path: verdict for path, verdict in rule.verdicts.items() if verdict}
    dropped = {"_name_or_path", "vision_config"}
    kept = {key: value for key, value in config.items() if key not in dropped}
    quantization = rule.default | fixed
    config = kept | {"quantization": quantization, "quantization_config": quantization}
    return dict(sorted(config.items()))


def _stock_dtype(config: dict[str, Any]) -> mx.Dtype | None:
    """The dtype stock `mlx_lm.convert` casts to before it quantizes, if the config names one."""
    name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    return getattr(mx, name) if name in {"float16", "bfloat16", "float32"} else None


def _tensors(source: Source, model: nn.Module, rule: _Rule) -> Iterator[tuple[str, mx.array]]:
    """Names and lazy arrays of the quantized model; none is kept once the next is asked for."""
    dtype = _stock_dtype(source.config)
    may_cast = getattr(model, "cast_predicate", lambda _: True)
    weights = source.weights()
    for name in list(weights):
        value = weights.pop(name)
        if dtype is not None and mx.issubdtype(value.dtype, mx.floating) and may_cast(name):
            value = value.astype(dtype)
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in rule.verdicts:
            yield name, value
            continue
        parts = mx.quantize(value, **(rule.default | rule.verdicts[path]))
        yield from zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=False)


def _specs(source: Source, model: nn.Module, rule: _Rule) -> list[TensorSpec]:
    return [tensor_spec(name, value) for name, value in _tensors(source, model, rule)]


def _file_bytes(source: Source, model: nn.Module, rule: _Rule) -> int:
    specs = _specs(source, model, rule)
    return sum(spec.size_bytes for spec in specs) + header_bytes(specs)
