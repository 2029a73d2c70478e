"""Safetensors on disk: strict headers without loading, a fingerprint, and a streaming writer."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from optiq.errors import EngineFailure, UsageError

INDEX_NAME = "model.safetensors.index.json"
SIDECAR_NAME = "optiq_vision.safetensors"
"""Side towers of a model of ours. The index lists it; the text can do without."""
SHARD_BYTES = 5 * 10**9
"""Data bytes after which a new shard begins."""

_ITEMSIZE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
_METADATA_KEY = "__metadata__"
_PREFIX_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_ALIGNMENT = 8
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_SAMPLE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies.

    Attributes:
        name: as the file has it.
        dtype: as the format spells it: `BF16`, `F16`, `F32`, `U32`, ...
        shape: outermost dimension first.
        file: the shard.
        begin: first byte, counted from the start of the file.
        end: one past the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the data."""
        return self.end - self.begin


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """Headers of all tensors of a model directory, read strictly.

    Returns:
        Name -> header, over the shards that model.safetensors.index.json names or, without an
        index, all `model*.safetensors`; shards by name, tensors in the order of their data. The
        sidecar of a model of ours is not among them.

    Raises:
        UsageError: if there are no weights, a shard is missing, cut short or corrupt, the index
            names a file outside the directory or a tensor that its shard does not hold, or a tensor
            is there twice.

    Cost: reads the headers only.
    """
    weight_map = _weight_map(directory)
    headers: dict[str, TensorHeader] = {}
    for shard in _shards(directory, weight_map):
        for header in read_shard(shard):
            if header.name in headers:
                raise UsageError(
                    f"'{header.name}' is in both {headers[header.name].file} and {shard}; keep one"
                )
            headers[header.name] = header
    for name, shard_name in weight_map.items():
        if name not in headers or headers[name].file.name != shard_name:
            raise UsageError(
                f"{directory / INDEX_NAME} says that '{name}' is in {shard_name}, which does not "
                f"hold it; download the model again"
            )
    return headers


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> shard name of the index; empty without an index."""
    index = directory / INDEX_NAME
    try:
        data = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{index} cannot be read ({error}); download it again") from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} has no weight_map; download it again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise UsageError(
                f"{index} names the shard {shard!r}, which is no file name inside the directory; "
                f"do not trust this model"
            )
    return {name: shard for name, shard in weight_map.items() if shard != SIDECAR_NAME}


def _is_file_name(name: str) -> bool:
    """Whether a name stays in its directory."""
    return Path(name).name == name and name not in {"", ".", ".."} and "\\" not in name


def _shards(directory: Path, weight_map: dict[str, str]) -> list[Path]:
    if weight_map:
        shards = [directory / name for name in sorted(set(weight_map.values()))]
        for shard in shards:
            if not shard.is_file():
                raise UsageError(f"{directory} lacks the shard {shard.name}; download it again")
            _check_inside(directory, shard)
        return shards
    shards = sorted(directory.glob("model*.safetensors"))
    if shards:
        return shards
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles:
        raise UsageError(
            f"{directory} has only pickled weights ({pickles[0]}), which can run code and are "
            f"never opened; give a checkpoint in safetensors"
        )
    raise UsageError(f"{directory} has no model*.safetensors; give a model directory with weights")


def _check_inside(directory: Path, shard: Path) -> None:
    """Refuse links out of the directory, but for those of the hub's cache to its blobs."""
    root, target = directory.resolve(), shard.resolve()
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    if not (target.is_relative_to(root) or target.is_relative_to(blobs)):
        raise UsageError(
            f"the shard {shard} is a link to {target}, outside the directory; put the file itself "
            f"there"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys must differ."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"'{twice}' is listed twice")
    return result


def _header_bytes(file: IO[bytes], size_bytes: int) -> bytes:
    """The header's JSON text; raises ValueError with what is wrong."""
    prefix = file.read(_PREFIX_BYTES)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _PREFIX_BYTES or _PREFIX_BYTES + length > size_bytes:
        raise ValueError(
            f"it is cut short: the header needs {_PREFIX_BYTES + length} bytes, the file has "
            f"{size_bytes}"
        )
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes is above the format's limit")
    return file.read(length)


def read_shard(path: Path) -> list[TensorHeader]:
    """Headers of one file, read strictly, in the order of their data.

    Raises:
        UsageError: if it is missing, cut short or corrupt.
    """
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            text = _header_bytes(file, size_bytes)
        entries = json.loads(text.decode(), object_pairs_hook=_unique)
        if not isinstance(entries, dict):
            raise ValueError("the header is not a JSON object")
        entries.pop(_METADATA_KEY, None)
        start = _PREFIX_BYTES + len(text)
        headers = [_parsed(name, entry, path, start) for name, entry in entries.items()]
        headers.sort(key=lambda header: (header.begin, header.end))
        _check_layout(headers, start, size_bytes)
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(
            f"{path} is no sound safetensors file ({error}); download it again"
        ) from None
    return headers


def _parsed(name: str, entry: Any, path: Path, start: int) -> TensorHeader:  # noqa: ANN401  JSON
    """One entry of a header; raises ValueError with what is wrong."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of '{name}' is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEMSIZE:
        raise ValueError(f"'{name}' has the unknown dtype {dtype!r}")
    if not _is_naturals(shape) or not _is_naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"the shape or offsets of '{name}' are no natural numbers")
    begin, end = offsets
    needed = math.prod(shape) * _ITEMSIZE[dtype]
    if end - begin != needed:
        raise ValueError(f"'{name}' needs {needed} bytes, its offsets span {end - begin}")
    return TensorHeader(name, dtype, tuple(shape), path, start + begin, start + end)


def _is_naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(headers: list[TensorHeader], start: int, size_bytes: int) -> None:
    """Tensors, by offset, must fill the file; raises ValueError with what is wrong."""
    expected = start
    for header in headers:
        if header.end > size_bytes:
            raise ValueError(
                f"it is cut short: '{header.name}' ends at byte {header.end}, the file has "
                f"{size_bytes}"
            )
        if header.begin != expected:
            raise ValueError(
                f"'{header.name}' begins at byte {header.begin} where {expected} is next, so "
                f"tensors overlap or leave a hole"
            )
        expected = header.end
    if expected != size_bytes:
        raise ValueError(f"{size_bytes - expected} bytes at its end belong to no tensor")


def fingerprint(directory: Path) -> str:
    """A hash that tells one checkpoint from another, wherever its files lie.

    Returns:
        SHA-256 in hex over config.json, the tokenizer files, names, sizes and headers of the
        shards, and 4 kB at the start, middle and end of every tensor. Fine-tunes of one
        architecture have equal headers and differ in the data; a value changed by hand in the
        middle of a large tensor is not seen.

    Raises:
        UsageError: as `read_headers`.
    """
    digest = hashlib.sha256()
    headers = read_headers(directory)
    for name in ("config.json", *TOKENIZER_FILES, "generation_config.json"):
        file = directory / name
        if file.is_file():
            _update(digest, name.encode(), file.read_bytes())
    for shard, tensors in itertools.groupby(headers.values(), key=lambda header: header.file):
        with shard.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            text = _header_bytes(stream, size_bytes)
            _update(digest, shard.name.encode(), str(size_bytes).encode(), text)
            for tensor in tensors:
                for part in _samples(stream, tensor):
                    digest.update(part)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, *parts: bytes) -> None:
    """Hash parts so that their borders count."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _samples(stream: IO[bytes], tensor: TensorHeader) -> Iterator[bytes]:
    last = max(tensor.begin, tensor.end - _SAMPLE_BYTES)
    for begin in sorted({tensor.begin, (tensor.begin + last) // 2, last}):
        stream.seek(begin)
        yield stream.read(min(_SAMPLE_BYTES, tensor.end - begin))


class TensorSpec(NamedTuple):
    """A tensor to be written: name, dtype as the format spells it, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * _ITEMSIZE[self.dtype]


def header_bytes(tensors: Iterable[TensorSpec], shard_bytes: int = SHARD_BYTES) -> int:
    """Bytes that `ShardWriter` adds to the data: length prefixes and headers of all shards."""
    return sum(len(_header(shard)) for shard in _split(tensors, shard_bytes))


def _split(tensors: Iterable[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Tensors by shard; one larger than a shard gets its own."""
    shards: list[list[TensorSpec]] = []
    filled = 0
    for tensor in tensors:
        if not shards or filled + tensor.size_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size_bytes
    return shards


def _header(tensors: Sequence[TensorSpec]) -> bytes:
    """Length prefix and header of a shard, padded with spaces to 8 bytes."""
    entries: dict[str, Any] = {_METADATA_KEY: {"format": "mlx"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.size_bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_PREFIX_BYTES, "little") + text


class ShardWriter:
    """Writes tensors one after another into the shards of a model directory.

    Equal tensors give equal bytes. The caller decides what is in memory: the writer holds nothing.
    Use it as a context manager; a clean exit writes the index and flushes everything to the disk.

    Args:
        directory: an existing directory.
        tensors: all tensors, in the order in which they will be written.
        shard_bytes: data bytes after which a new shard begins.

    Raises:
        ValueError: if two tensors have one name.
        EngineFailure: from every method, when the disk is full or refuses a write.
    """

    def __init__(
        self, directory: Path, tensors: Iterable[TensorSpec], shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._directory = directory
        tensors = list(tensors)
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ValueError("two tensors have the same name")
        self._shards = _split(tensors, shard_bytes)
        self._waiting = iter([(t, i) for i, shard in enumerate(self._shards) for t in shard])
        self._file: IO[bytes] | None = None
        self._open_shard = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                with disk_failure(self._directory):
                    self._finish()
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):  # what it would say was said before
                    self._file.close()

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write the next tensor.

        Args:
            name: its name, which must be the next in order.
            chunks: its bytes, row-major and little-endian, in pieces of any length.

        Raises:
            ValueError: if another tensor is next, or the length is not that of its shape.
        """
        tensor, shard = next(self._waiting, (None, 0))
        if tensor is None or tensor.name != name:
            raise ValueError(f"'{name}' was written where '{tensor and tensor.name}' is next")
        with disk_failure(self._directory):
            file = self._shard_file(shard)
        written = 0
        for chunk in chunks:
            with disk_failure(self._directory):
                written += file.write(chunk)
        if written != tensor.size_bytes:
            raise ValueError(f"'{name}' has {written} bytes, not {tensor.size_bytes}")

    def _shard_file(self, shard: int) -> IO[bytes]:
        if self._file is None or shard != self._open_shard:
            self._close_shard()
            self._file = (self._directory / self._name(shard)).open("wb")
            self._open_shard = shard
            self._file.write(_header(self._shards[shard]))
        return self._file

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _finish(self) -> None:
        tensor, _ = next(self._waiting, (None, 0))
        if tensor is not None:
            raise ValueError(f"'{tensor.name}' was never written")
        self._close_shard()
        weight_map = {t.name: self._name(i) for i, shard in enumerate(self._shards) for t in shard}
        total_size = sum(tensor.size_bytes for shard in self._shards for tensor in shard)
        index = {
            "metadata": {"total_size": total_size},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_synced(self._directory / INDEX_NAME, json.dumps(index, indent=4).encode() + b"\n")
        sync_directory(self._directory)

    def _name(self, shard: int) -> str:
        count = len(self._shards)
        if count == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{count:05d}.safetensors"


@contextlib.contextmanager
def disk_failure(where: Path) -> Generator[None]:
    """Turn what a disk refuses into an EngineFailure that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise EngineFailure(
                f"the disk is full: writing into {where} failed; free space there and run again"
            ) from error
        raise EngineFailure(f"{where} cannot be written: {error.strerror or error}") from error


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
