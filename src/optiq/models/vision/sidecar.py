"""The side towers of a model, kept in bfloat16 beside the quantized text.

`optiq_vision.safetensors` holds the tensors that mlx-lm drops, under the names of the checkpoint.
Its name is none that mlx-lm looks for; the index lists it, so that mlx-vlm finds it.
"""

from __future__ import annotations

import json
from pathlib import Path

from optiq.backend import array_note, load_arrays, mx, save_arrays
from optiq.errors import UsageError
from optiq.models.load import Source
from optiq.models.safetensors_io import (
    INDEX_NAME,
    SIDECAR_NAME,
    disk_failure,
    read_headers,
    read_shard,
    write_synced,
)

_TOWERS = frozenset(
    {
        "audio_embedder",
        "audio_tower",
        "embed_audio",
        "embed_vision",
        "multi_modal_projector",
        "vision_embedder",
        "vision_model",
        "vision_tower",
        "visual",
    }
)
_ORIGIN = "optiq_source"


def side_tensors(source: Source) -> dict[str, mx.array]:
    """Lazy arrays of a source's side towers, by their names in its files.

    A tower is a part with a known name that has no place in the tree of the text.
    """
    if source.quantization is not None:
        return {}
    in_tree = {part for name in source.parameters for part in name.split(".")}
    return _tensors_of(source.path, _TOWERS - in_tree)


def _tensors_of(folder: Path, towers: frozenset[str]) -> dict[str, mx.array]:
    """Lazy arrays of towers that lie among the weights of a directory."""
    headers = read_headers(folder)
    wanted = {name for name in headers if _tower(name) in towers}
    found: dict[str, mx.array] = {}
    for file in dict.fromkeys(headers[name].file for name in headers if name in wanted):
        arrays = load_arrays(file)
        found |= {name: arrays[name] for name in arrays if name in wanted}
    return dict(sorted(found.items()))


def _tower(name: str) -> str:
    """The part of a model that a tensor belongs to, as its file names it."""
    return name.removeprefix("model.").partition(".")[0]


def write_sidecar(source: Source, folder: Path) -> int:
    """Write the side towers of a source into a model directory and list them in its index.

    Args:
        source: what the model was made from.
        folder: with the weights and their index.

    Returns:
        Bytes of the tensors; 0 where the source has none, and then nothing is written.

    Raises:
        EngineFailure: if the disk refuses.

    Cost: the towers in memory, 105 MB for Gemma-4 12B.
    """
    tensors = {
        name: value.astype(mx.bfloat16) if mx.issubdtype(value.dtype, mx.floating) else value
        for name, value in side_tensors(source).items()
    }
    if not tensors:
        return 0
    save_arrays(folder / SIDECAR_NAME, tensors, source.info.fingerprint)
    size_bytes = sum(value.nbytes for value in tensors.values())
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    index["metadata"]["total_size"] += size_bytes
    index["metadata"][_ORIGIN] = source.info.fingerprint
    listed = index["weight_map"] | dict.fromkeys(tensors, SIDECAR_NAME)
    index["weight_map"] = dict(sorted(listed.items()))
    with disk_failure(folder):
        write_synced(folder / INDEX_NAME, json.dumps(index, indent=4).encode() + b"\n")
    return size_bytes


def has_sidecar(folder: Path) -> bool:
    """Whether a model directory has side towers beside its text."""
    return (folder / SIDECAR_NAME).is_file()


def read_sidecar(folder: Path) -> dict[str, mx.array]:
    """Lazy arrays of the side towers of a model directory, by name.

    Of a directory that was not converted they are among the weights.

    Raises:
        UsageError: if there are none, the file is cut short or corrupt, or it is of another model
            than the one it lies beside.
    """
    file = folder / SIDECAR_NAME
    if not file.is_file():
        if found := _tensors_of(folder, _TOWERS):
            return found
        raise UsageError(
            f"{folder} has no {SIDECAR_NAME}, so it reads text alone; convert the model again, or "
            "leave the images out"
        )
    names = {header.name for header in read_shard(file)}
    origin, listed = _index(folder)
    if names != listed or array_note(file) != origin:
        raise UsageError(
            f"{file} is of another model than the weights beside it; put back the file that was "
            "written with them, or convert again"
        )
    return load_arrays(file)


def _index(folder: Path) -> tuple[str | None, set[str]]:
    """The source that the index says the towers are from, and their tensors."""
    index = folder / INDEX_NAME
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
        weight_map, metadata = dict(data["weight_map"]), dict(data.get("metadata") or {})
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(f"{index} cannot be read ({error}); get it again") from None
    return metadata.get(_ORIGIN), {n for n, file in weight_map.items() if file == SIDECAR_NAME}
