"""The hub, against a stand-in that serves one repository from 127.0.0.1."""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from huggingface_hub import close_session, constants, hf_hub_download

from optiq import hub
from optiq.errors import EngineFailure, OptiqError, UsageError
from optiq.events import Event, Progress, StageDone, StageStarted, no_emit

COMMIT = "a" * 40
OLD_COMMIT = "b" * 40
REPO = "org/tiny-model"
TOKEN = "hf_" + "x" * 30
WEIGHTS = os.urandom(3_500_000)
# no two are equal: the cache keeps files by their hash, and equal ones are downloaded once
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00001.safetensors": WEIGHTS,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b'{"version": "1.0"}',
    "chat_template.jinja": b"{{ messages }}",
    "modeling_tiny.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "README.md": b"# tiny",
    "onnx/model.safetensors": b"another format",
}
WANTED = {
    "config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "chat_template.jinja",
    "README.md",
}


class StandIn:
    """Routes of the hub that a download uses, and what a test wants of them."""

    def __init__(self) -> None:
        self.files = dict(FILES)
        self.revisions = {"main": COMMIT, "old": OLD_COMMIT, COMMIT: COMMIT, OLD_COMMIT: OLD_COMMIT}
        self.refusals: dict[str, tuple[int, dict[str, str]]] = {}  # by start of the path
        self.broken: set[str] = set()  # files that are announced but not sent
        self.cut_once: set[str] = set()  # files whose first answer stops half way
        self.requests: list[tuple[str, str, str | None]] = []
        self.tokens: set[str | None] = set()

    def gets(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [p.rpartition("/")[2] for m, p, _ in self.requests if m == "GET" and "resolve" in p]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path
        self.requests.append((handler.command, path, handler.headers.get("Range")))
        self.tokens.add(handler.headers.get("Authorization"))
        for start, (status, headers) in self.refusals.items():
            if path.startswith(start):
                return _send(handler, status, headers)
        parts = path.strip("/").removeprefix("datasets/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:], handler)
        return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), handler)

    def _api(self, repo: str, rest: list[str], handler: BaseHTTPRequestHandler) -> None:
        if repo != REPO:
            return _send(handler, 404, {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in self.revisions:
            return _send(handler, 404, {"X-Error-Code": "RevisionNotFound"})
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in self.files.items()
        ]
        if rest[:1] == ["tree"]:
            return _send(handler, 200, {}, json.dumps(entries).encode())
        siblings = [{"rfilename": e["path"], "size": e["size"]} for e in entries]
        info = {"id": REPO, "sha": self.revisions[revision], "siblings": siblings}
        return _send(handler, 200, {}, json.dumps(info).encode())

    def _file(self, repo: str, revision: str, name: str, handler: BaseHTTPRequestHandler) -> None:
        if repo != REPO:
            return _send(handler, 404, {"X-Error-Code": "RepoNotFound"})
        if revision not in self.revisions:
            return _send(handler, 404, {"X-Error-Code": "RevisionNotFound"})
        if name not in self.files:
            return _send(handler, 404, {"X-Error-Code": "EntryNotFound"})
        data = self.files[name]
        headers = {
            "ETag": f'"{_etag(data)}"',
            "X-Repo-Commit": self.revisions[revision],
            "Accept-Ranges": "bytes",
        }
        start = handler.headers.get("Range")
        if start is not None:
            begin = int(start.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return _send(handler, 206, headers, data[begin:])
        if handler.command == "GET" and name in self.broken:
            return _send(handler, 500, {})
        if handler.command == "GET" and name in self.cut_once:
            self.cut_once.remove(name)
            return _send(handler, 200, headers, data, sent=len(data) // 2)
        return _send(handler, 200, headers, data)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _send(
    handler: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    body: bytes = b"",
    sent: int | None = None,
) -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body[:sent])
    if sent is not None:
        handler.close_connection = True


class Serving(NamedTuple):
    """A running stand-in."""

    hub: StandIn
    server: ThreadingHTTPServer


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            stand_in.answer(self)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    # the library reads HF_HOME and HF_HUB_OFFLINE when it is imported
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    yield Serving(stand_in, server)
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(
    revision: str | None = None, *, offline: bool = False, repo: str = REPO
) -> tuple[Path, str]:
    return hub.fetch(repo, revision=revision, offline=offline, emit=no_emit)


def refused(
    kind: type[OptiqError],
    words: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    repo: str = REPO,
) -> None:
    """A download fails with one sentence, and without the library's error behind it."""
    with pytest.raises(OptiqError, match=words) as caught:
        fetch(revision, offline=offline, repo=repo)
    assert type(caught.value) is kind
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    message = str(caught.value)
    assert message.isprintable()  # one line
    assert ". " not in message


def test_a_download_holds_weights_and_tokenizer_but_no_code_and_no_pickles(
    serving: Serving,
) -> None:
    folder, commit = fetch()
    assert commit == COMMIT
    assert {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} == WANTED
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert set(serving.hub.gets()) == WANTED


@pytest.mark.usefixtures("serving")
def test_progress_goes_to_the_events_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    events: list[Event] = []
    hub.fetch(REPO, revision=None, offline=False, emit=events.append)
    assert events[0] == StageStarted("download", 4, "MB")
    done = [event.done for event in events if isinstance(event, Progress)]
    assert done
    assert done == sorted(done)
    assert done[-1] == 3
    assert events[-1] == StageDone("download", detail="3.5 MB")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_what_is_in_the_cache_is_not_downloaded_again(serving: Serving) -> None:
    first = fetch()
    serving.hub.requests.clear()
    events: list[Event] = []
    assert hub.fetch(REPO, revision=None, offline=False, emit=events.append) == first
    assert serving.hub.gets() == []
    assert events == []


def test_only_the_missing_files_are_downloaded_after_an_interrupted_run(serving: Serving) -> None:
    serving.hub.broken.add("model-00001-of-00001.safetensors")
    refused(EngineFailure, "status 500; try again later")
    finished = {
        file.name for file in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/*") if file.is_file()
    }
    assert finished
    refused(UsageError, "not wholly, in the cache", offline=True)
    serving.hub.broken.clear()
    serving.hub.requests.clear()
    folder, _ = fetch()
    assert sorted(serving.hub.gets()) == sorted(WANTED - finished)
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == WEIGHTS
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_a_connection_that_breaks_goes_on_where_it_stopped(serving: Serving) -> None:
    # the library writes pieces of this size; what came of the one that broke is asked for again
    piece = constants.DOWNLOAD_CHUNK_SIZE
    data = os.urandom(piece * 5 // 2)
    serving.hub.files["model-00001-of-00001.safetensors"] = data
    serving.hub.cut_once.add("model-00001-of-00001.safetensors")
    events: list[Event] = []
    folder, _ = hub.fetch(REPO, revision=None, offline=False, emit=events.append)
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == data
    ranges = [header for _, _, header in serving.hub.requests if header is not None]
    assert ranges == [f"bytes={piece}-"]
    assert events[-1] == StageDone("download", detail=f"{len(data) / 1e6:.1f} MB")


@pytest.mark.usefixtures("serving")
def test_a_revision_is_its_own_commit() -> None:
    folder, commit = fetch("old")
    assert (commit, folder.name) == (OLD_COMMIT, OLD_COMMIT)
    assert fetch(OLD_COMMIT) == (folder, OLD_COMMIT)


def test_offline_uses_the_cache_alone(serving: Serving) -> None:
    found = fetch()
    serving.hub.requests.clear()
    assert fetch(offline=True) == found
    assert serving.hub.requests == []


@pytest.mark.usefixtures("serving")
def test_offline_without_the_model_in_the_cache() -> None:
    refused(UsageError, "not wholly, in the cache .* without --offline", offline=True)
    fetch()
    refused(UsageError, "at revision 'old' is not", "old", offline=True)
    weights = next(Path(constants.HF_HUB_CACHE).rglob("snapshots/*/model-*.safetensors"))
    weights.unlink()
    refused(UsageError, "not wholly", offline=True)


def test_a_tokenizer_that_another_program_keeps_in_the_cache_is_no_model(serving: Serving) -> None:
    endpoint = f"http://127.0.0.1:{serving.server.server_port}"
    file = hf_hub_download(REPO, "tokenizer.json", endpoint=endpoint)
    assert Path(file).is_relative_to(constants.HF_HUB_CACHE)
    refused(UsageError, "not wholly", offline=True)


def test_the_librarys_own_switch_means_offline_too(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fetch()
    serving.hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == found
    refused(UsageError, "at revision 'old' is not, .* without --offline, .* HF_HUB_OFFLINE", "old")
    assert serving.hub.requests == []


@pytest.mark.parametrize("where", ["/api/models/", f"/{REPO}/resolve/"])
def test_a_gated_repository_without_a_token(serving: Serving, where: str) -> None:
    serving.hub.refusals[where] = (401, {"X-Error-Code": "GatedRepo"})
    refused(
        UsageError,
        rf"is gated and there is no token: accept its licence on .*{REPO}, .*HF_TOKEN.*hf auth",
    )


@pytest.mark.parametrize("where", ["/api/models/", f"/{REPO}/resolve/"])
def test_a_gated_repository_with_the_token_of_another_account(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    serving.hub.refusals[where] = (403, {"X-Error-Code": "GatedRepo"})
    refused(UsageError, rf"account of the token has no access: accept its licence on .*{REPO}, or")


@pytest.mark.usefixtures("serving")
def test_a_repository_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "there is no .*org/other, or it is private and there is no token: .*HF_TOKEN"
    refused(UsageError, words, repo="org/other")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = "there is no .*org/other, or the token has no access to it"
    refused(UsageError, words, repo="org/other")


def test_a_private_repository_without_a_token(serving: Serving) -> None:
    serving.hub.refusals["/api/models/"] = (401, {"X-Error-Message": "Invalid username"})
    refused(UsageError, "it is private and there is no token: check the name, or set HF_TOKEN")


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("revision", ["nowhere", "c" * 40])
def test_a_revision_that_is_not_there(revision: str) -> None:
    refused(UsageError, f"has no revision '{revision}'; give a branch, tag or commit", revision)


def test_a_repository_that_the_hub_has_closed(serving: Serving) -> None:
    message = {"X-Error-Message": "Access to this resource is disabled."}
    serving.hub.refusals["/api/models/"] = (403, message)
    refused(UsageError, f"the hub has closed .*{REPO}; give another source")


def test_a_token_is_sent_and_one_that_is_refused_is_named(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    message = {"X-Error-Message": "Invalid credentials in Authorization header"}
    serving.hub.refusals["/api/models/"] = (401, message)
    refused(UsageError, "does not accept the token")
    assert serving.hub.tokens == {f"Bearer {TOKEN}"}
    monkeypatch.delenv("HF_TOKEN")
    refused(UsageError, "private and there is no token")


def test_a_token_without_the_right_to_read(serving: Serving) -> None:
    serving.hub.refusals["/api/models/"] = (403, {"X-Error-Message": "Forbidden"})
    refused(UsageError, "forbids access")


def test_a_hub_that_fails_is_not_the_users_fault(serving: Serving) -> None:
    serving.hub.refusals["/api/models/"] = (503, {})
    refused(EngineFailure, "status 503; try again later")


@pytest.mark.usefixtures("serving")
def test_a_network_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(EngineFailure, r"http://127.0.0.1:9 cannot be reached .*--offline")


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize("endpoint", ["hub.example", "ftp://hub.example", "http://[::1"])
def test_an_endpoint_that_is_no_address(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    refused(UsageError, "is no address of a hub .*; set HF_ENDPOINT")


def test_a_cache_that_cannot_be_written(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def deny(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(hub, "snapshot_download", deny)
    refused(EngineFailure, "cache .* cannot be written .Permission denied.; set HF_HOME")
    assert serving.hub.gets() == []


@pytest.mark.usefixtures("serving")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("file has size 3.\nPlease retry"), "be downloaded .file has size 3. Please retry"),
        (RuntimeError("Task cancelled.\n"), "could not be downloaded .Task cancelled.; run again"),
        (OSError(errno.ENOSPC, "No space"), "disk of .* is full; make room and run again"),
        (TimeoutError(), "cannot be reached .TimeoutError.; check the network"),
    ],
)
def test_what_the_library_says_in_lines_is_one(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(EngineFailure, match=words) as caught:
        fetch()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "pytorch_model.bin"], "only pickled weights .pytorch_model.bin"),
        (["README.md", "model-q4.gguf"], "GGUF files only; download one .model-q4.gguf"),
        (["config.json", "onnx/model.safetensors"], "has no model.*safetensors"),
    ],
)
def test_a_repository_without_safetensors_is_not_downloaded(
    serving: Serving, files: list[str], message: str
) -> None:
    serving.hub.files = {name: b"content" for name in files}
    with pytest.raises(UsageError, match=message):
        fetch()
    assert serving.hub.gets() == []


def test_a_disk_that_is_too_small_is_seen_before_the_download(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EngineFailure, match="needs 4 MB in .*, where 1 MB are free"):
        fetch()
    assert serving.hub.gets() == []


@pytest.mark.parametrize("text", ["org/name", "Qwen/Qwen3-0.6B", "a/b_c.d-e", "0/1"])
def test_hub_ids(text: str) -> None:
    assert hub.looks_like_repo_id(text)


@pytest.mark.parametrize(
    "text",
    ["", "name", "/abs/path", "./a", "../a", "a/b/c", "a/", "a b/c", "a/b--c", "a/..", "~/a"]
    + ["a/b.git", "a/b\n", "a/" + "b" * 95],
)
def test_what_is_no_hub_id(text: str) -> None:
    assert not hub.looks_like_repo_id(text)
    with pytest.raises(UsageError, match="is no hub id"):
        hub.fetch(text, revision=None, offline=True, emit=no_emit)


def fetch_file(
    name: str = "config.json",
    *,
    repo: str = REPO,
    revision: str = COMMIT,
    offline: bool = False,
) -> Path:
    return hub.fetch_dataset_file(repo, name, revision=revision, offline=offline)


def test_a_file_of_a_data_set_is_downloaded_once(
    serving: Serving, capfd: pytest.CaptureFixture[str]
) -> None:
    path = fetch_file("onnx/model.safetensors")
    assert path.read_bytes() == FILES["onnx/model.safetensors"]
    assert path.name == "model.safetensors"
    assert serving.hub.gets() == ["model.safetensors"]
    assert all(path.startswith(f"/datasets/{REPO}/") for _, path, _ in serving.hub.requests)
    serving.hub.requests.clear()
    assert fetch_file("onnx/model.safetensors") == path
    assert fetch_file("onnx/model.safetensors", offline=True) == path
    assert serving.hub.requests == []  # a commit never changes
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "nothing.json"}, f"datasets/{REPO} has no file 'nothing.json' at revision 'aaa"),
        ({"repo": "org/other"}, "there is no .*/datasets/org/other"),
        ({"revision": "c" * 40}, f"datasets/{REPO} has no revision 'ccc"),
        ({"offline": True}, f"datasets/{REPO} at revision 'aaa.* is not, or not wholly, in the"),
    ],
)
@pytest.mark.usefixtures("serving")
def test_a_file_of_a_data_set_that_cannot_be_had(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        fetch_file(**given)
    assert str(caught.value).isprintable()
    assert caught.value.__cause__ is None


def test_a_hub_that_fails_to_send_a_file_of_a_data_set(serving: Serving) -> None:
    serving.hub.broken.add("config.json")
    with pytest.raises(EngineFailure, match="status 500; try again later"):
        fetch_file()
