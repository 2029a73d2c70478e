"""A GGUF file -> a Hugging Face directory, as an unquantized source."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as GGMLType
from gguf import ReaderTensor
from gguf.quants import dequantize, quantize

from optiq.backend import tree_flatten
from optiq.errors import UnsupportedModel, UsageError
from optiq.events import Emit, Notice, no_emit, track
from optiq.models import gguf_tokenizer
from optiq.models.gguf_config import HEAD, family_of, model_config, tensor_names
from optiq.models.gguf_file import GGUFFile, open_gguf
from optiq.models.safetensors_io import (
    ShardWriter,
    TensorSpec,
    disk_failure,
    sync_directory,
    write_synced,
)
from optiq.upstream import build_model

IMPORT_VERSION = 1
"""Of what `import_gguf` writes; a higher one makes every file in the cache be imported again."""

_LIST = "gguf-import.json"  # names and sizes of the other files

_TYPES = {
    GGMLType.F32,
    GGMLType.F16,
    GGMLType.BF16,
    GGMLType.Q8_0,
    GGMLType.Q4_0,
    GGMLType.Q4_1,
    GGMLType.Q5_0,
    GGMLType.Q5_1,
    GGMLType.Q4_K,
    GGMLType.Q5_K,
    GGMLType.Q6_K,
}
_CHUNK_VALUES = 1 << 22  # values unpacked at a time, 16 MB in float32
_FLOAT16_LIMIT = 65520.0  # first magnitude that rounds to infinity

Dtype = Literal["F16", "BF16"]


class _TooLargeError(Exception):
    """A value is beyond float16."""


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One tensor on its way.

    Attributes:
        name: in the GGUF file.
        hf_name: in the directory.
        shape: outermost dimension first.
        packed: the tensor of the file.
        order: rows of the file in the order of Hugging Face.
        offset: what the file has on top of every value.
    """

    name: str
    hf_name: str
    shape: tuple[int, ...]
    packed: ReaderTensor
    order: npt.NDArray[np.int64]
    offset: np.float32


def import_gguf(path: Path, out: Path, tokenizer: Path | None = None, emit: Emit = no_emit) -> None:
    """Write a GGUF file as a Hugging Face directory.

    Weights are unpacked to float16 or, where any value is beyond its range, all to bfloat16. The
    directory exists only when it is whole.

    Args:
        path: the GGUF file.
        out: directory to make.
        tokenizer: directory whose tokenizer is taken instead of the file's.
        emit: receives progress, and a notice where bfloat16 is used.

    Raises:
        UsageError: if the file is cut short or damaged, lacks metadata or tensors, has values that
            are not finite or a vocabulary from which no tokenizer can be built, or `out` exists.
        UnsupportedModel: if its architecture, a tensor type, a metadata key or its tokenizer is not
            supported.
        EngineFailure: if the disk refuses.

    Cost: one pass over the file, two where float16 overflows; memory is that of one chunk.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; give another output path or delete it")
    file = open_gguf(path)
    family_of(file)  # an unknown architecture is named before its types are
    _check_types(file)
    config = model_config(file)
    names = tensor_names(file)
    _check_sizes(file, config)
    _check_shapes(file, names, config)
    config |= gguf_tokenizer.generation_ids(file, config["vocab_size"])
    with disk_failure(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with disk_failure(temporary):
            if tokenizer is None:
                gguf_tokenizer.write_tokenizer(file, config["vocab_size"], temporary, emit)
            else:
                gguf_tokenizer.copy_tokenizer(
                    tokenizer, file, config["vocab_size"], temporary, emit
                )
        dtype = _write_weights(path, _weights(file, names, config), temporary, emit)
        with disk_failure(temporary):
            _write_configs(config | {"torch_dtype": dtype}, temporary)
            _write_list(temporary)
            _publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def damaged_files(folder: Path) -> list[str]:
    """Names of files of an imported directory that are missing or have another size than written.

    The list that the import leaves in it is such a file too.
    """
    try:
        sizes = dict(json.loads((folder / _LIST).read_bytes()))
    except (OSError, ValueError, TypeError):
        return [_LIST]
    return [name for name, size in sizes.items() if _size_bytes(folder / name) != size]


def _size_bytes(file: Path) -> int | None:
    """Size of a file; None where there is none."""
    return file.stat().st_size if file.is_file() else None


def _check_types(file: GGUFFile) -> None:
    for name, tensor in file.tensors.items():
        if tensor.tensor_type not in _TYPES:
            raise UnsupportedModel(
                f"{file.path}: tensor '{name}' is of type {tensor.tensor_type.name}; optiq reads "
                f"{[kind.name for kind in _TYPES]}, so give another GGUF of this model"
            )


def _check_sizes(file: GGUFFile, config: dict[str, Any]) -> None:
    """Refuse sizes that no tensor has, before a module tree is built of them."""
    num_blocks = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if config["num_hidden_layers"] > num_blocks:
        raise UsageError(
            f"{file.path} has tensors of {num_blocks} blocks, its metadata ask for "
            f"{config['num_hidden_layers']}; get it whole"
        )
    dims = {dim for name in file.tensors for dim in file.shape(name)}
    head_dim = config["head_dim"]
    sizes = {
        "embedding": config["hidden_size"],
        "MLP": config["intermediate_size"],
        "queries": config["num_attention_heads"] * head_dim,
        "keys": config["num_key_value_heads"] * head_dim,
    }
    for what, size in sizes.items():
        if size not in dims:
            raise UsageError(
                f"{file.path}: its metadata make the {what} {size} wide, but no tensor has this "
                f"dimension; convert the model again"
            )


def _check_shapes(file: GGUFFile, names: dict[str, str], config: dict[str, Any]) -> None:
    """Compare the tensors with the module tree that the config makes."""
    parameters = dict(tree_flatten(build_model(config).parameters()))
    expected = {name: tuple(value.shape) for name, value in parameters.items()}
    if HEAD not in file.tensors:
        expected.pop("lm_head.weight", None)
    given = {hf_name: name for name, hf_name in names.items()}
    missing = [name for name in expected if name not in given]
    if missing:
        raise UsageError(
            f"{file.path} lacks {len(missing)} tensors, first the one for '{missing[0]}'; get it "
            f"whole"
        )
    for hf_name, name in given.items():
        if hf_name not in expected:
            raise UnsupportedModel(
                f"{file.path}: tensor '{name}' has no place in mlx-lm's '{config['model_type']}'; "
                f"give a Hugging Face directory instead"
            )
        if file.shape(name) != expected[hf_name]:
            raise UsageError(
                f"{file.path}: tensor '{name}' has shape {list(file.shape(name))}, its metadata "
                f"ask for {list(expected[hf_name])}; convert the model again"
            )


def _weights(file: GGUFFile, names: dict[str, str], config: dict[str, Any]) -> list[_Weight]:
    family = family_of(file)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = []
    for name, hf_name in names.items():
        shape = file.shape(name)
        order = np.arange(shape[0])
        stem = name.split(".")[-2]
        if family.interleaved and stem in heads:  # pairs of a head -> its two halves
            order = order.reshape(heads[stem], -1, 2).swapaxes(1, 2).reshape(-1)
        offset = family.norm_offset if name.endswith("norm.weight") else 0.0
        packed = file.tensors[name]
        weights.append(_Weight(name, hf_name, shape, packed, order, np.float32(offset)))
    return weights


def _write_weights(path: Path, weights: list[_Weight], folder: Path, emit: Emit) -> str:
    """Write all shards; the dtype they have, as config.json names it."""
    try:
        _write_shards(path, weights, "F16", folder, emit)
    except _TooLargeError as error:
        emit(Notice(f"{path}: {error}, so all weights are stored as bfloat16"))
        _write_shards(path, weights, "BF16", folder, emit)
        return "bfloat16"
    return "float16"


def _write_shards(
    path: Path, weights: list[_Weight], dtype: Dtype, folder: Path, emit: Emit
) -> None:
    specs = [TensorSpec(weight.hf_name, dtype, weight.shape) for weight in weights]
    stage = f"import {path.name}"
    with ShardWriter(folder, specs) as writer:
        for weight in track(weights, emit, stage, len(weights), "tensors"):
            writer.write(weight.hf_name, _encoded(path, weight, dtype))


def _encoded(path: Path, weight: _Weight, dtype: Dtype) -> Iterator[memoryview]:
    """Bytes of a tensor, some rows at a time."""
    for values in _unpacked(weight):
        largest = float(np.max(np.abs(values), initial=0.0))
        if not np.isfinite(largest):
            raise UsageError(
                f"{path}: tensor '{weight.name}' has values that are not finite; get a sound file"
            )
        if dtype == "BF16":
            yield quantize(values, GGMLType.BF16).data
        elif largest < _FLOAT16_LIMIT:
            yield values.astype(np.float16).data
        else:
            raise _TooLargeError(f"tensor '{weight.name}' reaches {largest:.4g}, beyond float16")


def _unpacked(weight: _Weight) -> Iterator[npt.NDArray[np.float32]]:
    """Values of a tensor, float32, some rows at a time."""
    if len(weight.shape) == 1:
        yield _dequantized(weight, weight.packed.data)[weight.order]
        return
    step = max(1, _CHUNK_VALUES // weight.shape[-1])
    for start in range(0, len(weight.order), step):
        yield _dequantized(weight, weight.packed.data[weight.order[start : start + step]])


def _dequantized(weight: _Weight, data: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    with np.errstate(all="ignore"):  # what is not finite is refused later
        values: npt.NDArray[np.float32] = dequantize(data, weight.packed.tensor_type)
        return values - weight.offset


def _write_configs(config: dict[str, Any], folder: Path) -> None:
    generation = {key: value for key, value in config.items() if key.endswith("_token_id")}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        text = json.dumps(content, indent=2) + "\n"
        write_synced(folder / name, text.encode())


def _write_list(folder: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    write_synced(folder / _LIST, (json.dumps(sizes, indent=2) + "\n").encode())


def _publish(temporary: Path, out: Path) -> None:
    """Give a finished directory its name; one made meanwhile by another process stays."""
    for file in temporary.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_directory(temporary)
    temporary.chmod(0o755)  # mkdtemp makes it private
    try:
        temporary.rename(out)
    except OSError:
        if not out.is_dir():
            raise
    sync_directory(out.parent)
