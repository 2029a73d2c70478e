"""Model directories -> repositories of the hub, in one commit."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # kept for others to use

from optiq import settings
from optiq.errors import EngineFailure, OptiqError, UsageError
from optiq.events import Emit, StageDone, StageStarted
from optiq.hub import LOG_IN, check_repo_id, hub_endpoint, no_address, reason

_MARK = "optiq/plan.json"
_NOT_SENT = ("optiq/run.json",)  # has paths of this machine
# what of an older upload must not stay beside a new one
_OURS = ("model*.safetensors", "model.safetensors.index.json", "optiq_*.safetensors", "optiq/*")
_STAGE = "upload"


@dataclasses.dataclass(frozen=True)
class Upload:
    """What is to be uploaded, or was.

    Attributes:
        repo: `organization/name`.
        url: its page.
        private: the repository is to be private if it is made.
        files: path in the repository and bytes.
        commit: of the upload; None for a dry run.
        removed: files of an older upload that the commit removed.
    """

    repo: str
    url: str
    private: bool
    files: tuple[tuple[str, int], ...]
    commit: str | None = None
    removed: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


def planned(folder: Path, repo: str, *, private: bool) -> Upload:
    """What an upload of a directory would send; asks nothing of the network.

    Hidden files and `optiq/run.json`, which has paths of this machine, are not sent.

    Raises:
        UsageError: if the name is no hub id.
    """
    check_repo_id(repo)
    names = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    files = [
        (name.as_posix(), (folder / name).stat().st_size)
        for name in names
        if not any(part.startswith(".") for part in name.parts) and name.as_posix() not in _NOT_SENT
    ]
    return Upload(repo, f"{hub_endpoint()}/{repo}", private, tuple(files))


def send(folder: Path, plan: Upload, emit: Emit) -> Upload:
    """Upload what was planned, in one commit: readers see all of it or nothing.

    A file that the repository has already is not sent again. Weights and artifacts of an older
    upload that the directory no longer has are removed.

    Args:
        folder: the directory.
        plan: of `planned`.
        emit: receives the stage; the hub's library shows bars of its own on stderr.

    Raises:
        UsageError: if there is no token, it has no right to the repository, or the repository holds
            a model that optiq did not write, or is public where a private one was asked for.
        EngineFailure: if the hub fails or cannot be reached.
    """
    if settings.load().offline or is_offline_mode():
        raise UsageError(
            "an upload needs the network, which OPTIQ_OFFLINE or HF_HUB_OFFLINE turns off"
        )
    if get_token() is None:
        raise UsageError(f"an upload needs a token that may write: {LOG_IN}")
    api = HfApi(endpoint=hub_endpoint())
    with _explained(plan):
        there = _files_there(api, plan)
        if there is None:
            api.create_repo(plan.repo, private=True if plan.private else None, exist_ok=True)
        stale = _stale(plan, there or ())
        emit(StageStarted(_STAGE, len(plan.files), "files"))
        operations: list[CommitOperationAdd | CommitOperationDelete | CommitOperationCopy] = [
            *(CommitOperationAdd(name, folder / name) for name, _ in plan.files),
            *(CommitOperationDelete(name) for name in stale),
        ]
        commit = api.create_commit(
            plan.repo, operations, commit_message="Upload with optiq", revision="main"
        )
        emit(StageDone(_STAGE, detail=f"{plan.size_bytes / 1e6:,.1f} MB"))
    return dataclasses.replace(plan, commit=commit.oid, removed=stale)


def _files_there(api: HfApi, plan: Upload) -> list[str] | None:
    """Files of the repository; None if there is none yet.

    Raises:
        UsageError: if the repository is not one to write to.
    """
    try:
        info = api.model_info(plan.repo)
    except RepositoryNotFoundError:
        return None
    if plan.private and not info.private:
        raise UsageError(
            f"{plan.url} exists and is public; make it private in its settings, or leave --private"
        )
    names = [file.rfilename for file in info.siblings or []]
    if _MARK not in names and any(fnmatchcase(name, _OURS[0]) for name in names):
        raise UsageError(
            f"{plan.url} holds a model that optiq did not write; give another repository"
        )
    return names


def _stale(plan: Upload, there: Iterable[str]) -> tuple[str, ...]:
    """Files of an older upload that would stay beside the new ones."""
    sent = {name for name, _ in plan.files}
    return tuple(
        name
        for name in there
        if name not in sent and any(fnmatchcase(name, pattern) for pattern in _OURS)
    )


@contextmanager
def _explained(plan: Upload) -> Generator[None]:
    """Turn what the library raises into one sentence of ours."""
    try:
        yield
    except OptiqError:
        raise
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RuntimeError) as error:
        raise _explanation(plan, error) from None


def _explanation(plan: Upload, error: BaseException) -> OptiqError:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # the library's own says only which file it was
    match error:
        case HfHubHTTPError():
            return _refusal(plan, error)
        case httpx.InvalidURL() | httpx.UnsupportedProtocol():
            return no_address(hub_endpoint(), error)
        case httpx.HTTPError() | ConnectionError() | TimeoutError():
            return EngineFailure(
                f"{hub_endpoint()} cannot be reached ({reason(error)}); check the network and "
                f"HF_ENDPOINT, and run again"
            )
        case ValueError():  # such as metadata of the card that the hub does not know
            return UsageError(f"the upload to {plan.url} is refused ({reason(error)})")
    return EngineFailure(
        f"{plan.url} could not be written ({reason(error)}); run again, what has arrived is not "
        f"sent again"
    )


def _refusal(plan: Upload, error: HfHubHTTPError) -> OptiqError:
    """What a status of the hub means for an upload."""
    status = error.response.status_code
    said = f" ({error.server_message})" if error.server_message else ""
    owner = plan.repo.partition("/")[0]
    if status == 401:
        return UsageError(f"the hub does not accept the token for {plan.url}; {LOG_IN} anew")
    if status == 403:
        return UsageError(
            f"the account of the token may not write to {owner}{said}: give a repository of your "
            f"own, or {LOG_IN} with a token that may write"
        )
    if status == 404:
        return UsageError(f"there is no account {owner}, or the token has no access to {plan.url}")
    if status in {400, 409, 413, 422}:
        return UsageError(f"the hub refuses the upload to {plan.url}{said}")
    return EngineFailure(f"the hub answered {plan.url} with status {status}{said}; try again later")
