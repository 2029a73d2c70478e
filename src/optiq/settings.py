"""The only reader of the environment."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from optiq.errors import UsageError

_TRUE = frozenset({"1", "true", "yes", "on", "y", "t"})
_FALSE = frozenset({"", "0", "false", "no", "off", "n", "f"})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the process, from environment variables.

    Attributes:
        cache_dir: `OPTIQ_CACHE`; work directories and imported GGUF files. Default: the user cache
            directory.
        blas: `OPTIQ_BLAS`; `auto` (load OpenBLAS or MKL where MLX's own is slow), `off`, or a
            library to load.
        offline_words: names and values of `OPTIQ_OFFLINE` and `HF_HUB_OFFLINE`; see `offline`.
        hub_endpoint: `HF_ENDPOINT`; another hub, for instance a mirror.
        served_key: `OPTIQ_API_KEY`; sent to the URL of `optiq eval --served`, asked for by
            `optiq serve`.
        debug: `OPTIQ_DEBUG` is set to anything but a false value; the command line shows
            tracebacks.
    """

    cache_dir: Path
    blas: str
    offline_words: tuple[tuple[str, str], ...]
    hub_endpoint: str | None
    debug: bool
    served_key: str | None = dataclasses.field(default=None, repr=False)

    @property
    def offline(self) -> bool:
        """Whether a variable says that no network is used.

        Words are read here and not by `load`, which importing optiq calls: a wrong one is an error
        of the command that needs to know, not of `import optiq` or `optiq --help`.

        Raises:
            UsageError: if a word is neither true (1, true, yes, on, y, t) nor false (0, false, no,
                off, n, f, nothing).
        """
        flags = [_is_true(name, word) for name, word in self.offline_words]  # all are checked
        return any(flags)


def _is_true(name: str, word: str) -> bool:
    normal = word.strip().lower()
    if normal not in _TRUE | _FALSE:
        raise UsageError(f"{name} is {word!r}; set it to 1 or 0")
    return normal in _TRUE


def load() -> Settings:
    """Settings as the environment has them now."""
    home = os.environ.get("OPTIQ_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Settings(
        cache_dir=Path(home).expanduser() if home else Path(base).expanduser() / "optiq",
        blas=os.environ.get("OPTIQ_BLAS") or "auto",
        offline_words=tuple(
            (name, os.environ.get(name, "")) for name in ("OPTIQ_OFFLINE", "HF_HUB_OFFLINE")
        ),
        hub_endpoint=os.environ.get("HF_ENDPOINT") or None,
        debug=os.environ.get("OPTIQ_DEBUG", "").strip().lower() not in _FALSE,
        served_key=os.environ.get("OPTIQ_API_KEY") or None,
    )
