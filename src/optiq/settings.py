"""The only reader of the environment."""

from __future__ import annotations

import dataclasses
import json
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
        rank: `MLX_RANK`; number of this process among those of `mlx.launch`; None if it is alone.
        rank_hosts: values of `MLX_HOSTFILE`, `NCCL_HOST_IP` and `MLX_JACCL_COORDINATOR`; see
            `first_host`.
    """

    cache_dir: Path
    blas: str
    offline_words: tuple[tuple[str, str], ...]
    hub_endpoint: str | None
    debug: bool
    served_key: str | None = dataclasses.field(default=None, repr=False)
    rank: int | None = None
    rank_hosts: tuple[str | None, str | None, str | None] = (None, None, None)

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

    @property
    def first_host(self) -> str:
        """Address of the host of rank 0, as the launch names it.

        Raises:
            UsageError: if it names none, or the file of hosts cannot be read.
        """
        hostfile, nccl, jaccl = self.rank_hosts
        if hostfile is None:
            host = nccl or (jaccl or "").rpartition(":")[0]
        else:
            try:
                host = json.loads(Path(hostfile).read_text())[0][0].rpartition(":")[0]
            except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
                raise UsageError(
                    f"MLX_HOSTFILE is {hostfile!r}, which is no file of hosts ({error!r}); start "
                    "all ranks through mlx.launch"
                ) from None
        if not host:
            raise UsageError(
                "MLX_RANK is set, and no variable says where rank 0 is; start all ranks through "
                "mlx.launch with the back end ring, nccl or jaccl"
            )
        return str(host)


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
        rank=_rank(os.environ.get("MLX_RANK")),
        rank_hosts=(
            os.environ.get("MLX_HOSTFILE") or None,
            os.environ.get("NCCL_HOST_IP") or None,
            os.environ.get("MLX_JACCL_COORDINATOR") or None,
        ),
    )


def _rank(word: str | None) -> int | None:
    return int(word) if word is not None and word.isdecimal() else None
