"""The one door to the hub: models and single files of data sets -> paths in its cache."""

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

from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
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
    "optiq_vision.safetensors",
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
    "README.md",  # for the licence that it names
    "LICENSE*",
]
_IGNORED = ["*/*"]  # whatever lies in folders
_PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"]
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_NAME}/{_NAME}")
_MAX_ID_CHARS = 96
LOG_IN = "set HF_TOKEN or run 'hf auth login'"
_STAGE = "download"
_MB = 10**6


def looks_like_repo_id(text: str) -> bool:
    """Whether a text has the form of a hub id, `organization/name`."""
    well_formed = len(text) <= _MAX_ID_CHARS and _REPO_ID.fullmatch(text) is not None
    return well_formed and not re.search(r"--|\.\.|\.git$", text)


def hub_endpoint() -> str:
    """Address of the hub, without a slash at its end."""
    return (settings.load().hub_endpoint or constants.ENDPOINT).rstrip("/")


def check_repo_id(text: str) -> None:
    """Refuse what is no hub id.

    Raises:
        UsageError: if it is none.
    """
    if not looks_like_repo_id(text):
        raise UsageError(f"'{text}' is no hub id; write organization/name")


def fetch(repo_id: str, *, revision: str | None, offline: bool, emit: Emit) -> tuple[Path, str]:
    """Make sure that a model is in the hub's cache.

    Weights in safetensors, configuration and tokenizer are downloaded; never code or pickles. A
    connection that breaks goes on where it stopped, to 10 MB. A run that was stopped begins again
    with the files it had not finished: the hub's library keeps no parts of files.

    Args:
        repo_id: `organization/name`.
        revision: branch, tag or commit; None for the default branch.
        offline: use the cache alone.
        emit: receives the progress of a download.

    Returns:
        The snapshot directory, and its commit.

    Raises:
        UsageError: if the repository, the revision or access to it is missing, it has no
            safetensors, or it is not in the cache and `offline` or HF_HUB_OFFLINE is set.
        EngineFailure: if the disk cannot hold it, or the hub fails or cannot be reached.
    """
    check_repo_id(repo_id)
    endpoint = hub_endpoint()
    offline = offline or is_offline_mode()  # which the hub's library would enforce anyway
    with _explained(repo_id, revision, endpoint, offline):
        if offline:
            folder = snapshot_download(
                repo_id,
                revision=revision,
                local_files_only=True,
                allow_patterns=_PATTERNS,
                ignore_patterns=_IGNORED,
            )
            if not any(Path(folder).glob(_WEIGHTS)):  # other programs keep a tokenizer alone
                raise _not_cached(repo_id, revision)
        else:
            folder = _download(repo_id, revision, endpoint, emit)
    return Path(folder), Path(folder).name


def fetch_dataset_file(repo_id: str, name: str, *, revision: str, offline: bool) -> Path:
    """Make sure that one file of a data set is in the hub's cache.

    Args:
        repo_id: `organization/name` of the data set.
        name: path of the file in the repository.
        revision: branch, tag or commit.
        offline: use the cache alone.

    Returns:
        Where the file is.

    Raises:
        UsageError: if the repository, the revision, the file or access to it is missing, or it is
            not in the cache and `offline` or HF_HUB_OFFLINE is set.
        EngineFailure: if the disk cannot hold it, or the hub fails or cannot be reached.
    """
    endpoint = (settings.load().hub_endpoint or constants.ENDPOINT).rstrip("/")
    offline = offline or is_offline_mode()
    with _explained(f"datasets/{repo_id}", revision, endpoint, offline):
        try:
            path = hf_hub_download(
                repo_id,
                name,
                repo_type="dataset",
                revision=revision,
                endpoint=endpoint,
                local_files_only=offline,
                tqdm_class=_silent_bar(lambda _: None),
            )
        except LocalEntryNotFoundError:  # a kind of the next: the cache lacks it, not the hub
            raise
        except EntryNotFoundError:
            raise UsageError(
                f"datasets/{repo_id} has no file '{name}' at revision '{revision}'; give the "
                f"benchmark files with --data-dir"
            ) from None
    return Path(path)


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
            raise _not_cached(repo_id, revision) from None
        raise _explanation(repo_id, revision, endpoint, error.__cause__ or error) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RuntimeError) as error:
        raise _explanation(repo_id, revision, endpoint, error) from None


def _not_cached(repo_id: str, revision: str | None) -> UsageError:
    at = f" at revision '{revision}'" if revision else ""
    return UsageError(
        f"{repo_id}{at} is not, or not wholly, in the cache {constants.HF_HUB_CACHE}; run once "
        f"without --offline, OPTIQ_OFFLINE and HF_HUB_OFFLINE"
    )


def _explanation(
    repo_id: str, revision: str | None, endpoint: str, error: BaseException
) -> OptiqError:
    page = f"{endpoint}/{repo_id}"
    match error:
        case GatedRepoError():
            return _gated(repo_id, page)
        case RevisionNotFoundError():
            return UsageError(
                f"{repo_id} has no revision '{revision}'; give a branch, tag or commit of {page}"
            )
        case RepositoryNotFoundError():
            return _not_found(page)
        case DisabledRepoError():
            return UsageError(f"the hub has closed {page}; give another source")
        case HfHubHTTPError():
            return _refusal(page, error)
        case httpx.InvalidURL() | httpx.UnsupportedProtocol():
            return no_address(endpoint, error)
        case httpx.HTTPError() | ConnectionError() | TimeoutError():
            return EngineFailure(
                f"{endpoint} cannot be reached ({reason(error)}); check the network and "
                f"HF_ENDPOINT, or use --offline with a model that is in the cache"
            )
        case OSError():
            return _disk_failure(page, error)
    return EngineFailure(f"{page} could not be downloaded ({reason(error)}); run again later")


def no_address(endpoint: str, error: BaseException) -> UsageError:
    """What to say where the endpoint is no address."""
    return UsageError(
        f"{endpoint} is no address of a hub ({reason(error)}); set HF_ENDPOINT to one such as "
        f"https://huggingface.co, or unset it"
    )


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _gated(repo_id: str, page: str) -> UsageError:
    if get_token() is None:
        return UsageError(
            f"{repo_id} is gated and there is no token: accept its licence on {page}, then {LOG_IN}"
        )
    return UsageError(
        f"{repo_id} is gated and the account of the token has no access: accept its licence on "
        f"{page}, or {LOG_IN} with another account"
    )


def _not_found(page: str) -> UsageError:
    if get_token() is None:
        return UsageError(
            f"there is no {page}, or it is private and there is no token: check the name, or "
            f"{LOG_IN}"
        )
    return UsageError(
        f"there is no {page}, or the token has no access to it: check the name, or {LOG_IN} with "
        f"another account"
    )


def _disk_failure(page: str, error: OSError) -> EngineFailure:
    cache = constants.HF_HUB_CACHE
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return EngineFailure(
            f"the disk of {cache} is full; make room and run again, finished files are kept"
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return EngineFailure(
            f"the cache {cache} cannot be written ({error.strerror}); set HF_HOME to a place that "
            f"can"
        )
    return EngineFailure(f"{page} could not be downloaded ({reason(error)}); run again later")


def _refusal(page: str, error: HfHubHTTPError) -> OptiqError:
    """What a status of the hub means that the library has no class for."""
    status = error.response.status_code
    if status == 404 or (status == 401 and get_token() is None):
        return _not_found(page)
    if status == 401:
        return UsageError(f"the hub does not accept the token for {page}; {LOG_IN} anew")
    if status == 403:
        return UsageError(
            f"the hub forbids access to {page}: accept its licence there if it is gated, and "
            f"{LOG_IN} with a token that may read it"
        )
    return EngineFailure(f"the hub answered {page} with status {status}; try again later")
