"""From what the user names (directory, hub id or GGUF file) to a `Source` with lazy weights.

A `Source` never holds weights: `weights()` maps parameter names of mlx-lm's own module tree to
arrays that are read from disk when they are evaluated, so a caller decides what is in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optiq import hub, settings
from optiq.artifacts import ModuleInfo, SourceInfo
from optiq.backend import mx, nn, tree_flatten
from optiq.configs import RunConfig
from optiq.errors import UnsupportedModel, UsageError
from optiq.events import Emit, Notice, no_emit
from optiq.models.gguf import import_gguf
from optiq.models.modules import find_modules
from optiq.models.safetensors_io import fingerprint, read_headers
from optiq.upstream import TokenizerWrapper, build_model, load_config, tokenizer_of

_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint with lazily loaded weights.

    Attributes:
        path: directory with config.json and safetensors.
        config: its config.json, eos ids of generation_config.json merged in.
        info: name, fingerprint, dtype and sizes, as artifacts record them.
        modules: the matrices that can be quantized.
        parameters: names and shapes of all parameters of the module tree.
        dequantize: applied to the weights after `sanitize`; makes a quantized directory dense.
    """

    path: Path
    config: dict[str, Any]
    info: SourceInfo
    modules: tuple[ModuleInfo, ...]
    parameters: dict[str, tuple[int, ...]]
    tokenizer_path: Path
    dequantize: Callable[[dict[str, mx.array]], dict[str, mx.array]] | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the weights, which scales and biases take."""
        return _DTYPES[self.info.dtype]

    def weights(self) -> dict[str, mx.array]:
        """Fresh lazy arrays of every parameter, by its name in the module tree."""
        raw = _load_raw(self.path)
        if self.dequantize is not None:
            raw = self.dequantize(raw)
        return _sanitized(self._tree, raw)

    @functools.cached_property
    def _tree(self) -> nn.Module:
        return build_model(self.config)

    def model(self) -> nn.Module:
        """The module tree with lazy weights."""
        model = build_model(self.config)
        model.load_weights(list(self.weights().items()), strict=True)
        return model

    @functools.cached_property
    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer.

        Raises:
            UsageError: if the source has none.
        """
        return load_tokenizer(self.tokenizer_path, self.config)


def load_tokenizer(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """Tokenizer of a directory.

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


def _load_raw(path: Path) -> dict[str, mx.array]:
    raw: dict[str, mx.array] = {}
    for file in sorted(path.glob("model*.safetensors")):
        raw.update(mx.load(str(file)))
    return raw


def _sanitized(model: nn.Module, raw: dict[str, mx.array]) -> dict[str, mx.array]:
    if not hasattr(model, "sanitize"):
        return raw
    try:
        weights: dict[str, mx.array] = model.sanitize(raw)
    except (KeyError, ValueError, IndexError, TypeError) as error:
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
        UsageError: if it does not exist, is quantized already, or has missing, unexpected or wrongly
            shaped tensors.
        UnsupportedModel: if its kind is not supported.

    Cost: reads headers only; a GGUF file is first rewritten as a directory in the cache.
    """
    run = run or RunConfig()
    path, revision = Path(ref).expanduser(), None
    if path.is_file():
        path = _imported(path, run, emit)
    elif not path.is_dir():
        if not hub.looks_like_repo_id(ref):
            raise UsageError(f"'{ref}' is no directory, GGUF file or hub id; check the path")
        offline = run.offline or settings.load().offline
        path, revision = hub.fetch(ref, revision=run.revision, offline=offline, emit=emit)
    config = read_config(path)
    if config.get("quantization") or config.get("quantization_config"):
        raise UsageError(
            f"{ref} is quantized already (config.json says so); give the unquantized checkpoint"
        )
    return _open(ref, path, revision, config, run.tokenizer)


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory, with the eos ids of generation_config.json.

    Raises:
        UsageError: if it is missing or not JSON.
    """
    try:
        config = load_config(path)
    except FileNotFoundError:
        raise UsageError(
            f"{path} has no config.json; give a Hugging Face model directory"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path / 'config.json'} is not a JSON object")
    return config


def _imported(path: Path, run: RunConfig, emit: Emit) -> Path:
    """Directory made of a GGUF file, from the cache when it is there."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"{path} is a file but no GGUF; give a model directory or a GGUF file")
    stat = path.stat()
    tokenizer = str(run.tokenizer.resolve()) if run.tokenizer else ""
    key = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{tokenizer}"
    out = settings.load().cache_dir / "gguf" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not out.is_dir():
        import_gguf(path, out, run.tokenizer, emit)
    return out


def _open(
    ref: str, path: Path, revision: str | None, config: dict[str, Any], tokenizer: Path | None
) -> Source:
    headers = read_headers(path)
    floats = {h.dtype for h in headers.values() if len(h.shape) > 1}
    unknown = sorted(floats - set(_FLOATS))
    if unknown:
        raise UsageError(f"{ref} holds tensors of dtype {unknown}; give a bf16, f16 or f32 source")
    sizes = {d: sum(h.size_bytes for h in headers.values() if h.dtype == d) for d in floats}
    dtype = _FLOATS[max(sizes, key=lambda d: (sizes[d], d))]
    model = build_model(config)
    expected = {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}
    sanitized = _sanitized(model, _load_raw(path))
    given = {name: tuple(value.shape) for name, value in sanitized.items()}
    _check_strict(ref, expected, given)
    modules = find_modules(model, config)
    quantizable = {f"{m.path}.weight" for m in modules}
    itemsize = 4 if dtype == "float32" else 2
    fixed = sum(
        functools.reduce(lambda a, b: a * b, shape, itemsize)
        for name, shape in expected.items()
        if name not in quantizable
    )
    info = SourceInfo(
        name=ref,
        revision=revision,
        fingerprint=fingerprint(path),
        model_type=str(config["model_type"]),
        dtype=dtype,
        size_bytes=sum(h.size_bytes for h in headers.values()),
        fixed_bytes=fixed,
    )
    return Source(path, config, info, modules, expected, tokenizer or path)


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
                f"'{name}' of {ref} has shape {list(given[name])}, the config asks for {list(shape)}"
            )


def open_quantized(path: Path) -> Source:
    """An MLX model directory as a source of dense weights, dequantized in float32 on reading.

    Dense and float32 because `quantized_matmul` in half precision is 5% off on the CPU, and slow.

    Raises:
        UsageError: if the directory is not a model that mlx-lm can read, or has a mode other than
            affine.
    """
    config = read_config(path)
    quantization = config.get("quantization") or {}
    dense = {k: v for k, v in config.items() if k not in {"quantization", "quantization_config"}}
    headers = read_headers(path)
    model = build_model(dense)
    expected = {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}
    settings_of = {name: quantization.get(name) for name in quantization}
    modules = find_modules(model, dense)
    fixed = sum(h.size_bytes for n, h in headers.items() if n.rpartition(".")[0] not in settings_of)
    info = SourceInfo(
        name=str(path),
        revision=None,
        fingerprint=fingerprint(path),
        model_type=str(dense["model_type"]),
        dtype="float32",
        size_bytes=sum(h.size_bytes for h in headers.values()),
        fixed_bytes=fixed,
    )

    def dequantize(raw: dict[str, mx.array]) -> dict[str, mx.array]:
        out = {}
        for name, value in raw.items():
            stem, _, leaf = name.rpartition(".")
            if leaf in {"scales", "biases"} and f"{stem}.weight" in raw:
                continue
            if leaf == "weight" and f"{stem}.scales" in raw:
                value = _dequantized(stem, raw, expected, quantization)
            out[name] = value
        return out

    source = Source(path, dense, info, modules, expected, path, dequantize)
    given = {name: tuple(value.shape) for name, value in source.weights().items()}
    _check_strict(str(path), expected, given)
    return source


def _dequantized(
    stem: str,
    raw: dict[str, mx.array],
    expected: dict[str, tuple[int, ...]],
    quantization: dict[str, Any],
) -> mx.array:
    chosen = quantization.get(stem)
    mode = (chosen or quantization).get("mode", quantization.get("mode", "affine"))
    if mode != "affine":
        raise UsageError(f"{stem} is stored in mode '{mode}'; optiq judges affine models only")
    in_dims = expected[f"{stem}.weight"][-1]
    scales = raw[f"{stem}.scales"]
    return mx.dequantize(
        raw[f"{stem}.weight"],
        scales.astype(mx.float32),
        raw[f"{stem}.biases"].astype(mx.float32),
        group_size=in_dims // scales.shape[-1],
        bits=raw[f"{stem}.weight"].shape[-1] * 32 // in_dims,
    )


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


def note_source(source: Source, emit: Emit) -> None:
    """Say what was opened."""
    params = sum(m.num_params for m in source.modules)
    emit(Notice(f"{source.info.name}: {source.info.model_type}, {params / 1e6:.0f}M weights"))
