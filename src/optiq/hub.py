"""The one door to the hub: model repositories -> snapshot directories in its cache."""

from __future__ import annotations

import errno
import fnmatch
import re
import shutil
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # kept for others to use
from huggingface_hub.utils.tqdm import tqdm

from optiq import settings
from optiq.errors import EngineFailure, OptiqError, UsageError
from optiq.events import Emit, Progress, StageDone, StageStarted

_WEIGHTS = "model*.safetensors"
_PATTERNS = [
    _WEIGHTS,
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "*processor_config.json",
    "*.jinja",
    "*.txt",
]
_IGNORED = ["*/*"]  # whatever lies in folders
_PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"]
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_NAME}/{_NAME}")
_MAX_ID_CHARS = 96
_LOG_IN = "set HF_TOKEN or run 'hf auth login'"
_STAGE = "download"
_MB = 10**6


def looks_like_repo_id(text: str) -> bool:
    """Whether a text has the form of a hub id, `organization/name`."""
    well_formed = len(text) <= _MAX_ID_CHARS and _REPO_ID.fullmatch(text) is not None
    return well_formed and not re.search(r"--|\.\.|\.git$", text)


def fetch(repo_id: str, *, revision: str | None, offline: bool, emit: Emit) -> tuple[Path, str]:
    """Make sure that a model is in the hub's cache.

    Weights in safetensors, configuration and tokenizer are downloaded; never code or pickles. A
    download that stopped goes on with the files it had not finished.

    Args:
        repo_id: `organization/name`.
        revision: branch, tag or commit; None for the default branch.
        offline: use the cache alone.
        emit: receives the progress of a download.

    Returns:
        The snapshot directory, and its commit.

    Raises:
        UsageError: if the repository, the revision or access to it is missing, it has no
            safetensors, the hub cannot be reached, or it is not in the cache and `offline` is set.
        EngineFailure: if the disk cannot hold it or the hub fails.
    """
    if not looks_like_repo_id(repo_id):
        raise UsageError(f"'{repo_id}' is no hub id; write organization/name")
    endpoint = (settings.load().hub_endpoint or constants.ENDPOINT).rstrip("/")
    with _explained(repo_id, revision, endpoint, offline):
        if offline:
            folder = snapshot_download(
                repo_id,
                revision=revision,
                local_files_only=True,
                allow_patterns=_PATTERNS,
                ignore_patterns=_IGNORED,
            )
        else:
            folder = _download(repo_id, revision, endpoint, emit)
    return Path(folder), Path(folder).name


def _download(repo_id: str, revision: str | None, endpoint: str, emit: Emit) -> str:
    info = HfApi(endpoint=endpoint).model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    chosen = [name for name in _matching(sizes, _PATTERNS) if "/" not in name]
    if not _matching(chosen, [_WEIGHTS]):
        raise _no_weights(repo_id, sizes)
    missing = [
        name
        for name in chosen
        if not isinstance(try_to_load_from_cache(repo_id, name, revision=info.sha), str)
    ]
    needed = sum(sizes[name] for name in missing)
    _check_disk(repo_id, needed)
    report = _Report(emit, needed)
    folder = snapshot_download(
        repo_id,
        revision=revision,
        endpoint=endpoint,
        allow_patterns=_PATTERNS,
        ignore_patterns=_IGNORED,
        tqdm_class=_silent_bar(report.add),
    )
    report.finish()
    return folder


def _matching(names: Iterable[str], patterns: list[str]) -> list[str]:
    return sorted(n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns))


def _no_weights(repo_id: str, names: Iterable[str]) -> UsageError:
    pickles, ggufs = _matching(names, _PICKLES), _matching(names, ["*.gguf"])
    if pickles:
        return UsageError(
            f"{repo_id} has only pickled weights ({pickles[0]}), which can run code and are never "
            f"opened; give a repository with safetensors"
        )
    if ggufs:
        return UsageError(
            f"{repo_id} has GGUF files only; download one ({ggufs[0]}) and give its path"
        )
    return UsageError(f"{repo_id} has no {_WEIGHTS}; give the repository of a language model")


def _check_disk(repo_id: str, needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise EngineFailure(
            f"{repo_id} needs {needed / _MB:,.0f} MB in {cache}, where {free / _MB:,.0f} MB are "
            f"free; make room, or set HF_HOME to a larger disk"
        )


class _Report:
    """Bytes from several threads -> progress in MB."""

    def __init__(self, emit: Emit, size_bytes: int) -> None:
        self._emit = emit
        self._active = size_bytes > 0
        self._done_bytes = 0
        self._lock = threading.Lock()
        if self._active:
            emit(StageStarted(_STAGE, max(1, round(size_bytes / _MB)), "MB"))

    def add(self, num_bytes: float) -> None:
        with self._lock:
            before = self._done_bytes // _MB
            self._done_bytes += int(num_bytes)
            if self._active and self._done_bytes // _MB != before:
                self._emit(Progress(_STAGE, self._done_bytes // _MB))

    def finish(self) -> None:
        if self._active:
            self._emit(StageDone(_STAGE, detail=f"{self._done_bytes / _MB:,.1f} MB"))


def _silent_bar(add: Callable[[float], None]) -> type[Any]:
    """A progress bar class for the hub's library that shows nothing and counts bytes on disk."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  as tqdm's
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                add(n or 0)

    return Bar


@contextmanager
def _explained(repo_id: str, revision: str | None, endpoint: str, offline: bool) -> Generator[None]:
    """Turn what the library raises into one sentence of ours."""
    try:
        yield
    except OptiqError:
        raise
    except LocalEntryNotFoundError as error:
        if offline:
            at = f" at revision '{revision}'" if revision else ""
            raise UsageError(
                f"{repo_id}{at} is not, or not wholly, in the cache {constants.HF_HUB_CACHE}; run "
                f"once without --offline"
            ) from None
        raise _explanation(repo_id, revision, endpoint, error.__cause__ or error) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise _explanation(repo_id, revision, endpoint, error) from None


def _explanation(
    repo_id: str, revision: str | None, endpoint: str, error: BaseException
) -> OptiqError:
    page = f"{endpoint}/{repo_id}"
    match error:
        case GatedRepoError():
            return UsageError(
                f"{repo_id} is gated: accept its licence on {page} and {_LOG_IN}, with a token of "
                f"the account that accepted"
            )
        case RevisionNotFoundError():
            return UsageError(
                f"{repo_id} has no revision '{revision}'; give a branch, tag or commit of {page}"
            )
        case RepositoryNotFoundError():
            return _not_found(page)
        case HfHubHTTPError():
            return _refusal(page, error)
        case httpx.HTTPError() | httpx.InvalidURL() | OfflineModeIsEnabled():
            return UsageError(
                f"{endpoint} cannot be reached ({error}); check the network and HF_ENDPOINT, or "
                f"use --offline with a model that is in the cache"
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return EngineFailure(
                f"the disk of {constants.HF_HUB_CACHE} is full; make room and run again, finished "
                f"files are kept"
            )
    return EngineFailure(f"{page} could not be downloaded ({error}); run again later")


def _not_found(page: str) -> UsageError:
    return UsageError(
        f"there is no {page}, or it is private or gated: check the name, or {_LOG_IN} with a token "
        f"that has access"
    )


def _refusal(page: str, error: HfHubHTTPError) -> OptiqError:
    """What a status of the hub means that the library has no class for."""
    status = error.response.status_code
    if status == 404 or (status == 401 and get_token() is None):
        return _not_found(page)
    if status == 401:
        return UsageError(f"the hub does not accept the token for {page}; {_LOG_IN} anew")
    if status == 403:
        return UsageError(
            f"the hub forbids access to {page}: accept its licence there if it is gated, and "
            f"{_LOG_IN} with a token that may read it"
        )
    return EngineFailure(f"the hub answered {page} with status {status}; try again later")
