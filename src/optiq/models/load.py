"""From what the user names (directory, hub id or GGUF file) to a `Source` with lazy weights.

A `Source` never holds weights: `weights()` maps parameter names of mlx-lm's own module tree to
arrays that are read from disk when they are evaluated, so a caller decides what is in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optiq import hub, settings
from optiq.artifacts import ModuleInfo, SourceInfo
from optiq.backend import load_arrays, mx, nn
from optiq.configs import RunConfig
from optiq.errors import UnsupportedModel, UsageError
from optiq.events import Emit, Notice, no_emit
from optiq.models.families import build_tree, family_of, normalized
from optiq.models.gguf import IMPORT_VERSION, damaged_files, import_gguf
from optiq.models.modules import find_modules, parameters_of
from optiq.models.safetensors_io import disk_failure, fingerprint, read_headers
from optiq.upstream import TokenizerWrapper, load_as, load_config, tokenizer_of

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
"""Dtypes of weights by the names that artifacts give them."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint with lazily loaded weights.

    Attributes:
        path: directory with config.json and safetensors.
        config: its config.json, eos ids of generation_config.json merged in.
        info: name, fingerprint, dtype and sizes, as artifacts record them.
        modules: the matrices that can be quantized.
        parameters: names and shapes of all parameters of the module tree.
        tokenizer_path: directory of the tokenizer.
        shards: the weight files.
        quantization: settings of a quantized MLX directory, which is read as dense float32.
    """

    path: Path
    config: dict[str, Any]
    info: SourceInfo
    modules: tuple[ModuleInfo, ...]
    parameters: dict[str, tuple[int, ...]]
    tokenizer_path: Path
    shards: tuple[Path, ...]
    quantization: dict[str, Any] | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the weights, which scales and biases take."""
        return DTYPES[self.info.dtype]

    def weights(self) -> dict[str, mx.array]:
        """Fresh lazy arrays of every parameter, by its name in the module tree.

        Matrices that can be quantized are in `dtype`; a few of another one are cast.
        """
        return self._weights_of(build_tree(self.config))

    def model(self) -> nn.Module:
        """The module tree with lazy weights."""
        model = build_tree(self.config)
        model.load_weights(list(self._weights_of(model).items()), strict=True)
        return model

    def _weights_of(self, model: nn.Module) -> dict[str, mx.array]:
        """Weights of a fresh tree, to which `sanitize` does what it must."""
        weights = _read(self.shards, model, self.quantization)
        for module in self.modules:
            name = f"{module.path}.weight"
            weights[name] = weights[name].astype(self.dtype)
        return weights

    @functools.cached_property
    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer.

        Raises:
            UsageError: if the source has none.
        """
        return load_tokenizer(self.tokenizer_path, self.config)


def load_tokenizer(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """Tokenizer of a directory, with the eos ids of its config. Code that it brings is never run.

    Raises:
        UsageError: if there is none or it cannot be read.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((path / name).is_file() for name in names):
        raise UsageError(f"{path} has no tokenizer; add tokenizer.json or give --tokenizer DIR")
    try:
        return tokenizer_of(path, config)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"the tokenizer in {path} cannot be loaded ({reason}); give --tokenizer DIR"
        ) from None


def _read(
    shards: Sequence[Path], model: nn.Module, quantization: dict[str, Any] | None
) -> dict[str, mx.array]:
    """Lazy arrays of weight files under the names of the tree.

    Args:
        shards: the files.
        model: a fresh tree; a family's `sanitize` may change it, as by dropping a head that the
            checkpoint has not.
        quantization: of config.json, where the files are quantized.

    Raises:
        UnsupportedModel: if the family's `sanitize` misses a tensor.
        UsageError: if the files cannot be read.
    """
    raw: dict[str, mx.array] = {}
    for file in shards:
        try:
            raw |= load_arrays(file)
        except RuntimeError as error:
            raise UsageError(f"{file} cannot be read: {error}") from None
    if quantization is not None:
        raw = _dense(raw, parameters_of(model), quantization)
    if not hasattr(model, "sanitize"):
        return raw
    try:
        weights: dict[str, mx.array] = model.sanitize(raw)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
        raise UnsupportedModel(
            f"a tensor that this model_type needs is missing or has the wrong shape: {error}"
        ) from None
    return weights


def open_source(ref: str, run: RunConfig | None = None, emit: Emit = no_emit) -> Source:
    """The source a user names.

    Args:
        ref: a directory, a GGUF file, or a hub id such as `org/name`.
        run: revision, offline, tokenizer and work directory.
        emit: receives progress of downloads and imports.

    Raises:
        UsageError: if it does not exist, is quantized already, or has missing, unexpected or
            wrongly shaped tensors.
        UnsupportedModel: if its kind is not supported.

    Cost: reads headers only; a GGUF file is first rewritten as a directory in the cache.
    """
    run = run or RunConfig()
    path, revision, tokenizer = Path(ref).expanduser(), None, run.tokenizer
    if path.is_file():
        path = _imported(path, run.tokenizer, emit)
        tokenizer = path  # the import took what is in --tokenizer, and added what that lacks
    elif not path.is_dir():
        if not hub.looks_like_repo_id(ref):
            raise UsageError(f"'{ref}' is no directory, GGUF file or hub id; check the path")
        offline = run.offline or settings.load().offline
        path, revision = hub.fetch(ref, revision=run.revision, offline=offline, emit=emit)
    config = read_config(path)
    told = _says_quantized(path, config)
    if told:
        raise UsageError(
            f"{ref} is quantized already ({told} says so); give the unquantized checkpoint"
        )
    return _open(_Named(ref, path, revision, tokenizer or path), config)


def _says_quantized(path: Path, config: dict[str, Any]) -> str | None:
    """The file that says that a checkpoint is quantized."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if part.get("quantization") or part.get("quantization_config"):
            return "config.json"
    return "hf_quant_config.json" if (path / "hf_quant_config.json").is_file() else None


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory as mlx-lm reads it, with the eos ids of generation_config.json.

    Raises:
        UsageError: if it is missing or not JSON.
    """
    try:
        config = load_config(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{path} has no config.json; give a Hugging Face model directory"
        ) from None
    except (ValueError, OSError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"config.json or generation_config.json of {path} cannot be read: {error}"
        ) from None
    if not isinstance(config, dict):
        raise UsageError(f"{path / 'config.json'} is not a JSON object")
    return normalized(config)


def context_length(config: dict[str, Any]) -> int | None:
    """Tokens that a model was made to read at most, as config.json says; None if it does not."""
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx"):
            if type(part.get(key)) is int and part[key] > 0:
                return int(part[key])
    return None


def _imported(path: Path, tokenizer: Path | None, emit: Emit) -> Path:
    """Directory made of a GGUF file, from the cache when it is there and whole."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"{path} is a file but no GGUF; give a model directory or a GGUF file")
    key = repr(
        (IMPORT_VERSION, path.resolve(), _stamp(path), _listing(tokenizer) if tokenizer else None)
    )
    out = settings.load().cache_dir / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if out.is_dir():
        damaged = damaged_files(out)
        if not damaged:
            return out
        text = f"{out} is not whole ({damaged[0]} is missing or has changed); {path} is imported"
        emit(Notice(f"{text} again", "warning"))
        _discard(out)
    import_gguf(path, out, tokenizer, emit)
    return out


def _stamp(file: Path) -> tuple[int, int]:
    """Size and time of a file, which tell it from what it was before."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _listing(folder: Path) -> tuple[Path, list[tuple[str, tuple[int, int]]]]:
    """Where a directory lies, and names and stamps of its files.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
        return folder.resolve(), [(file.name, _stamp(file)) for file in files]
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be read ({error.strerror}); give --tokenizer a directory with "
            f"tokenizer.json"
        ) from None


def _discard(folder: Path) -> None:
    """Take a directory of the cache away in one step, so that none sees a part of it."""
    with disk_failure(folder.parent):
        doomed = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            folder.rename(doomed / folder.name)
        except FileNotFoundError:
            pass  # another process was first
        shutil.rmtree(doomed)


@dataclasses.dataclass(frozen=True)
class _Named:
    """What the user named, and where it lies."""

    ref: str
    path: Path
    revision: str | None
    tokenizer: Path


def _open(
    named: _Named, config: dict[str, Any], quantization: dict[str, Any] | None = None
) -> Source:
    headers = read_headers(named.path)
    shards = tuple(dict.fromkeys(header.file for header in headers.values()))
    model = build_tree(config)
    weights = _read(shards, model, quantization)
    expected = {name: tuple(value.shape) for name, value in parameters_of(model).items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    _check_strict(named.ref, expected, given)
    modules = find_modules(model, config)
    matrices = {f"{module.path}.weight" for module in modules}
    info = SourceInfo(
        name=named.ref,
        revision=named.revision,
        fingerprint=fingerprint(named.path),
        model_type=str(config["model_type"]),
        dtype=_main_dtype(named.ref, weights) if quantization is None else "float32",
        size_bytes=sum(header.size_bytes for header in headers.values()),
        fixed_bytes=sum(v.nbytes for name, v in weights.items() if name not in matrices),
    )
    return Source(
        named.path, config, info, modules, expected, named.tokenizer, shards, quantization
    )


def _main_dtype(ref: str, weights: dict[str, mx.array]) -> str:
    """Dtype of most bytes of the matrices."""
    sizes: dict[str, int] = {}
    for value in weights.values():
        if value.ndim > 1:
            name = str(value.dtype).rpartition(".")[2]
            sizes[name] = sizes.get(name, 0) + value.nbytes
    unknown = sorted(set(sizes) - set(DTYPES))
    if unknown or not sizes:
        raise UsageError(
            f"{ref} holds matrices of dtype {', '.join(unknown) or 'none'}; give a source in "
            f"bfloat16, float16 or float32"
        )
    return max(sizes, key=lambda name: (sizes[name], name))


def _check_strict(
    ref: str, expected: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]
) -> None:
    missing = sorted(set(expected) - set(given))
    if missing:
        raise UsageError(f"{ref} lacks {len(missing)} tensors, first '{missing[0]}'; get it whole")
    extra = sorted(set(given) - set(expected))
    if extra:
        raise UsageError(
            f"{ref} has {len(extra)} tensors this model_type has no place for, first '{extra[0]}'"
        )
    for name, shape in expected.items():
        if given[name] != shape:
            raise UsageError(
                f"'{name}' of {ref} has shape {list(given[name])}, the config asks for "
                f"{list(shape)}"
            )


def load_tree(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The module tree of a model directory and its config, as `read_config` gives it.

    Returns:
        The tree, quantized as the directory is, weights unevaluated; a source, too, in whatever
        form its config is, and a drafter.

    Raises:
        UsageError: if it is no model that can be loaded.
    """
    config = read_config(path)
    family = family_of(config)
    try:
        return load_as(path, config, family.build if family else None), config
    except (ValueError, LookupError, TypeError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{path} cannot be loaded ({reason}); get the model again") from None


def open_quantized(path: Path) -> Source:
    """An MLX model directory as a source of dense weights, dequantized in float32 on reading.

    Dense and float32 because `quantized_matmul` in half precision is 5% off on the CPU, and slow.

    Raises:
        UsageError: if the directory is not a model that mlx-lm can read, or has a mode other than
            affine.
    """
    config = read_config(path)
    quantization = config.get("quantization")
    dense = {k: v for k, v in config.items() if k not in {"quantization", "quantization_config"}}
    named = _Named(str(path), path, None, path)
    return _open(named, dense, quantization if isinstance(quantization, dict) else {})


def _dense(
    raw: dict[str, mx.array], tree: dict[str, mx.array], quantization: dict[str, Any]
) -> dict[str, mx.array]:
    """Stored tensors with dense float32 weights in place of codes, scales and biases.

    Args:
        raw: stored tensors.
        tree: parameters of the dense tree, of which the shapes are used.
        quantization: of config.json.

    Raises:
        UsageError: if a matrix is stored in another mode than affine, or its shapes do not fit.
    """
    quantized = {
        stem
        for stem in (name.removesuffix(".scales") for name in raw if name.endswith(".scales"))
        if f"{stem}.weight" in raw and f"{stem}.weight" in tree
    }
    codes = {f"{stem}.{leaf}" for stem in quantized for leaf in ("weight", "scales", "biases")}
    out = {name: value for name, value in raw.items() if name not in codes}
    for stem in sorted(quantized):
        chosen = quantization.get(stem)
        chosen = chosen if isinstance(chosen, dict) else {}
        mode = chosen.get("mode", quantization.get("mode", "affine"))
        if mode != "affine":
            raise UsageError(f"{stem} is stored in mode '{mode}'; optiq judges affine models only")
        if f"{stem}.biases" not in raw:
            raise UsageError(f"'{stem}.biases' is missing; get the model again")
        parts = [raw[f"{stem}.{leaf}"] for leaf in ("weight", "scales", "biases")]
        out[f"{stem}.weight"] = _dequantized(stem, parts, tuple(tree[f"{stem}.weight"].shape))
    return out


def _dequantized(stem: str, parts: list[mx.array], shape: tuple[int, ...]) -> mx.array:
    """The float32 matrix of codes, scales and biases; group size and bits follow from shapes."""
    codes, scales, biases = parts
    try:
        return mx.dequantize(
            codes,
            scales.astype(mx.float32),
            biases.astype(mx.float32),
            group_size=shape[-1] // scales.shape[-1],
            bits=codes.shape[-1] * 32 // shape[-1],
        )
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"codes, scales and biases of '{stem}' do not fit together ({error}); get the model "
            f"again"
        ) from None


def size_on_disk(path: Path) -> int:
    """Bytes of `model*.safetensors` in a directory."""
    return sum(file.stat().st_size for file in path.glob("model*.safetensors"))


def stored_bpw(path: Path, modules: tuple[ModuleInfo, ...]) -> float:
    """Stored bits per weight of a directory, over its matrices that can be quantized."""
    headers = read_headers(path)
    stored = sum(
        headers[name].size_bytes
        for module in modules
        for name in (f"{module.path}.{leaf}" for leaf in ("weight", "scales", "biases"))
        if name in headers
    )
    return 8 * stored / sum(m.num_params for m in modules)
