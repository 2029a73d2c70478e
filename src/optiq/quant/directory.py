"""Model directories: written under a temporary name, and there only when they are whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator
from pathlib import Path

import numpy as np

from optiq.backend import mx
from optiq.errors import UsageError
from optiq.models.load import Source
from optiq.models.safetensors_io import TensorSpec, disk_failure, sync_directory

MARK = Path("optiq") / "plan.json"
"""The file that tells a directory of ours from others."""

_SIDE_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "*processor_config.json",
)
_STORED = {
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.float32: "F32",
    mx.uint32: "U32",
    mx.uint8: "U8",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.bool_: "BOOL",
}


def check_output(out: Path, *, force: bool) -> None:
    """Refuse an output path that may not be written.

    Raises:
        UsageError: if it exists and is not a model of ours that `force` allows to replace.
    """
    if not (out.exists() or out.is_symlink()):
        return
    if not (out / MARK).is_file():
        raise UsageError(f"{out} exists and is no model that optiq wrote; give another -o")
    if not force:
        raise UsageError(f"{out} exists already; give --force to replace it, or another -o")


@contextlib.contextmanager
def finished_directory(out: Path, *, replace: bool = False) -> Generator[Path]:
    """A directory under a temporary name that takes the name `out` when the context ends well.

    Args:
        out: the final path.
        replace: an existing `out` gives way; until then it stays as it is.

    Raises:
        EngineFailure: if the disk refuses.
    """
    folder = out.with_name(f".{out.name}.partial")
    with disk_failure(out.parent):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir(parents=True)
    try:
        yield folder
        with disk_failure(out):
            old = out.with_name(f".{out.name}.replaced")
            shutil.rmtree(old, ignore_errors=True)
            if replace and out.exists():
                out.rename(old)
            folder.rename(out)
            sync_directory(out.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_side_files(source: Source, folder: Path) -> None:
    """Copy tokenizer, templates, processor, generation config and licence into a directory."""
    for origin in dict.fromkeys((source.path, source.tokenizer_path)):
        for pattern in _SIDE_FILES:
            for file in sorted(origin.glob(pattern)):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)


def tensor_spec(name: str, value: mx.array) -> TensorSpec:
    """Name, dtype and shape of an array as safetensors has them."""
    return TensorSpec(name, _STORED[value.dtype], tuple(value.shape))


def tensor_bytes(value: mx.array) -> memoryview:
    """The bytes of an array, row-major."""
    return np.asarray(value.reshape(-1).view(mx.uint8)).data
