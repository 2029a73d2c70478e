"""A GGUF file: checked metadata and packed tensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFValueType, ReaderTensor

from optiq.errors import UnsupportedModel, UsageError

_MAGIC = b"GGUF"
_START_BYTES = 8  # magic and version
_VERSIONS = (2, 3)

T = TypeVar("T", int, float, str, bool)


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensors of a GGUF file.

    Attributes:
        path: the file.
        fields: metadata by key; numbers, strings, booleans or lists of them.
        tensors: packed tensors by name, as views of the file.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, ReaderTensor]

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.required("general.architecture", str)

    def optional(self, key: str, kind: type[T], default: T) -> T:
        """The value of a key, or the default where the file has none.

        Raises:
            UsageError: if it is of another type.
        """
        value = self.fields.get(key, default)
        if kind is float and type(value) in {int, float}:
            value = decimal(value)
        if type(value) is not kind:
            raise UsageError(
                f"{self.path}: '{key}' is {short(value)}, where optiq reads one {kind.__name__}"
            )
        result: T = value
        return result

    def required(self, key: str, kind: type[T]) -> T:
        """The value of a key.

        Raises:
            UsageError: if it is missing or of another type.
        """
        if key not in self.fields:
            raise UsageError(
                f"{self.path} lacks the metadata '{key}'; convert the model to GGUF again"
            )
        return self.optional(key, kind, kind())

    def array(self, key: str, kind: type[T]) -> list[T]:
        """The values of an array; empty where the file has none.

        Raises:
            UsageError: if it is no array of that type.
        """
        values = self.fields.get(key, [])
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise UsageError(f"{self.path}: '{key}' is no array of {kind.__name__}")
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, outermost dimension first."""
        return tuple(int(dim) for dim in reversed(self.tensors[name].shape))


def decimal(value: float) -> float:
    """A float32 as the shortest decimal that gives it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def short(value: object) -> str:
    """A value as a message shows it: on one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class _StrictReader(GGUFReader):
    """A reader that stops at the end of the file; the package's own finds nothing and goes on."""

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Any = None,  # noqa: ANN401  a literal of the package
    ) -> npt.NDArray[Any]:
        missing = int(offset) + int(count) * np.dtype(dtype).itemsize - len(self.data)
        if missing > 0:
            raise ValueError(f"{missing} bytes are missing at its end")
        values: npt.NDArray[Any] = super()._get(offset, dtype, count, override_order)
        return values

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        """Read an array of numbers at once, so that a damaged length cannot run for hours."""
        if raw_type == GGUFValueType.ARRAY:
            kind = self._get(orig_offs, np.uint32)
            length = self._get(orig_offs + 4, np.uint64)
            if kind[0] == GGUFValueType.ARRAY:
                raise ValueError("an array of arrays")
            dtype = self.gguf_scalar_to_np.get(kind[0])
            if dtype is not None:
                values = self._get(orig_offs + 12, dtype, length[0])
                types = [GGUFValueType.ARRAY, GGUFValueType(kind[0])]
                return 12 + values.nbytes, [kind, length, values], [2], types
        return super()._get_field_parts(orig_offs, raw_type)


def open_gguf(path: Path) -> GGUFFile:
    """Read the metadata of a GGUF file and map its tensors.

    Raises:
        UsageError: if it is no GGUF file, cut short or damaged.
        UnsupportedModel: if its version or byte order is not supported, or it is one part of a
            split model.

    Cost: 2 s for a vocabulary of 49k tokens; tensors are not read.
    """
    _check_start(path)
    try:
        reader = _StrictReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError) as error:
        raise UsageError(
            f"{path} ({path.stat().st_size} bytes) is cut short, damaged or of a kind the gguf "
            f"package does not know ({str(error)!r}); get it whole"
        ) from None
    garbled = [name for name in (*fields, *tensors) if not name.isprintable()]
    if garbled:
        raise UsageError(f"{path} is damaged: it has the name {short(garbled[0])}; get it whole")
    file = GGUFFile(path, fields, tensors)
    if file.optional("split.count", int, 1) > 1:
        raise UnsupportedModel(
            f"{path} is one of {fields['split.count']} parts; merge them with llama-gguf-split "
            f"--merge first"
        )
    if file.optional("general.type", str, "model") != "model":
        raise UnsupportedModel(
            f"{path} holds no model but {short(fields['general.type'])}; give the model's GGUF file"
        )
    return file


def _check_start(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            start = stream.read(_START_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if not start.startswith(_MAGIC):
        raise UsageError(f"{path} is no GGUF file: it begins with {start[:4]!r}, not {_MAGIC!r}")
    if len(start) < _START_BYTES:
        raise UsageError(f"{path} ({len(start)} bytes) is cut short; get it whole")
    version = int.from_bytes(start[4:], "little")
    if version not in _VERSIONS:
        order = " or of big-endian byte order" if version & 0xFFFF == 0 else ""
        raise UnsupportedModel(
            f"{path} is GGUF version {version}{order}; optiq reads versions {list(_VERSIONS)}, "
            f"little-endian"
        )
