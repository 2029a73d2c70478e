"""The only reader of the environment."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the process, from environment variables.

    Attributes:
        cache_dir: `OPTIQ_CACHE`; work directories and imported GGUF files. Default: the user cache
            directory.
        blas: `OPTIQ_BLAS`; `auto` (load OpenBLAS or MKL where MLX's own is slow), `off`, or a
            library to load.
        offline: `OPTIQ_OFFLINE` or `HF_HUB_OFFLINE` is set to a true value; no network is used.
        hub_endpoint: `HF_ENDPOINT`; another hub, for instance a mirror.
        debug: `OPTIQ_DEBUG` is set to a true value; the command line shows tracebacks.
    """

    cache_dir: Path
    blas: str
    offline: bool
    hub_endpoint: str | None
    debug: bool


def _flag(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in {"1", "true", "yes", "on"}


def load() -> Settings:
    """Settings as the environment has them now."""
    home = os.environ.get("OPTIQ_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Settings(
        cache_dir=Path(home).expanduser() if home else Path(base).expanduser() / "optiq",
        blas=os.environ.get("OPTIQ_BLAS") or "auto",
        offline=_flag("OPTIQ_OFFLINE") or _flag("HF_HUB_OFFLINE"),
        hub_endpoint=os.environ.get("HF_ENDPOINT") or None,
        debug=_flag("OPTIQ_DEBUG"),
    )
