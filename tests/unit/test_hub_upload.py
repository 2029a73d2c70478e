"""Uploads, against a stand-in of the hub that takes commits on 127.0.0.1."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from huggingface_hub import close_session, constants

from optiq import release
from optiq.backend import mx
from optiq.cli.main import run
from optiq.errors import EngineFailure, OptiqError, UsageError
from tests.tiny import write_tokenizer
from tests.unit.directories import make_whole

REPO = "org/mine"
TOKEN = "hf_" + "x" * 30
COMMIT = "d" * 40

# of the hub's library, which sends bytes in the old way of httpx
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class StandIn:
    """Routes of the hub that an upload uses, and what a test wants of them."""

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.refusals: dict[str, tuple[int, dict[str, str], bytes]] = {}  # by end of the path
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path
        body = _body(handler)
        self.requests.append((handler.command, path))
        self.tokens.add(handler.headers.get("Authorization"))
        for end, (status, headers, data) in self.refusals.items():
            if path.endswith(end):
                return _send(handler, status, data, headers)
        if path == "/api/repos/create":
            return self._create(handler, json.loads(body))
        if path == "/api/validate-yaml":
            return _send(handler, 200, {"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(handler, json.loads(body))
        if handler.command == "PUT":
            self.objects[path.rpartition("/")[2]] = body
            return _send(handler, 200, {})
        return self._model(handler, path, body)

    def _create(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repos:
            return _send(handler, 409, {"error": "You already created this model repo"})
        self.repos[name] = {}
        self.private[name] = asked.get("visibility") == "private"
        return _send(handler, 200, {"url": f"{self.url}/{name}", "name": name})

    def _batch(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        found = []
        for each in asked["objects"]:
            entry = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.objects:
                entry["actions"] = {"upload": {"href": f"{self.url}/put/{each['oid']}"}}
            found.append(entry)
        _send(handler, 200, {"transfer": "basic", "objects": found})

    def _model(self, handler: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        name, rest = "/".join(parts[2:4]), parts[4:]
        if parts[:2] != ["api", "models"] or name not in self.repos:
            return _send(handler, 404, {}, {"X-Error-Code": "RepoNotFound"})
        files = self.repos[name]
        if rest[:1] == ["preupload"]:
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return _send(handler, 200, {"files": modes})
        if rest[:1] == ["commit"]:
            self._commit(files, body)
            url = f"{self.url}/{name}/commit/{COMMIT}"
            return _send(handler, 200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        siblings = [{"rfilename": file} for file in files]
        info = {"id": name, "sha": COMMIT, "private": self.private[name], "siblings": siblings}
        return _send(handler, 200, info)

    def _commit(self, files: dict[str, bytes], body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    """What was sent, at once or in chunks."""
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    data = b""
    while size := int(handler.rfile.readline(), 16):
        data += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return data


def _send(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: dict[str, Any] | bytes,
    headers: dict[str, str] | None = None,
) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            stand_in.answer(self)

        do_POST = do_PUT = do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "OPTIQ_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    # the library reads these when it is imported; its Xet protocol needs another server
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    yield stand_in
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A whole directory of ours."""
    folder = make_whole(tmp_path / "m")
    write_tokenizer(folder)
    weights = {"w": mx.array(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32))}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# m\n")
    (folder / ".hidden").write_text("secret")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("secret")
    return folder


def on_disk(folder: Path) -> dict[str, bytes]:
    """The files that are to arrive."""
    return {
        name: file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
        and not (name := file.relative_to(folder).as_posix()).startswith(".")
        and name != "optiq/run.json"
    }


def push(model: Path, **options: Any) -> Any:
    return release.push(model, REPO, upload=True, **options)


def refused(kind: type[OptiqError], words: str, model: Path, **options: Any) -> None:
    with pytest.raises(OptiqError, match=words) as caught:
        push(model, **options)
    assert type(caught.value) is kind
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert str(caught.value).isprintable()


def test_a_dry_run_lists_all_and_asks_nothing(hub: StandIn, model: Path) -> None:
    plan = release.push(model, REPO)
    assert plan.commit is None
    assert dict(plan.files) == {name: len(data) for name, data in on_disk(model).items()}
    assert plan.size_bytes == sum(map(len, on_disk(model).values()))
    assert hub.requests == []


def test_an_upload_arrives_whole_and_in_one_commit(hub: StandIn, model: Path) -> None:
    done = push(model)
    assert hub.repos[REPO] == on_disk(model)
    assert (done.commit, done.removed) == (COMMIT, ())
    assert not hub.private[REPO]
    assert [path for _, path in hub.requests].count(f"/api/models/{REPO}/commit/main") == 1
    assert f"Bearer {TOKEN}" in hub.tokens


def test_private_is_private(hub: StandIn, model: Path) -> None:
    push(model, private=True)
    assert hub.private[REPO]
    push(model, private=True)
    hub.private[REPO] = False
    refused(UsageError, "exists and is public", model, private=True)


def test_large_files_that_are_there_are_not_sent_again(hub: StandIn, model: Path) -> None:
    push(model)
    hub.requests.clear()
    (model / "README.md").write_text("# again\n")
    push(model)
    assert not [path for method, path in hub.requests if method == "PUT"]
    assert hub.repos[REPO]["README.md"] == b"# again\n"


def test_what_an_older_upload_left_is_removed_and_other_files_stay(
    hub: StandIn, model: Path
) -> None:
    push(model)
    old = {"model-00001-of-00002.safetensors", "optiq/evals/report.json"}
    hub.repos[REPO] |= dict.fromkeys([*old, "notes.md", ".gitattributes"], b"x")
    done = push(model)
    assert set(done.removed) == old
    assert hub.repos[REPO] == on_disk(model) | {"notes.md": b"x", ".gitattributes": b"x"}


def test_a_repository_with_another_model_is_left_alone(hub: StandIn, model: Path) -> None:
    hub.repos[REPO] = {"model.safetensors": b"theirs"}
    hub.private[REPO] = False
    refused(UsageError, "holds a model that optiq did not write", model)
    assert hub.repos[REPO] == {"model.safetensors": b"theirs"}


def test_no_token(hub: StandIn, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused(UsageError, "needs a token that may write: set HF_TOKEN or run", model)
    assert hub.requests == []


@pytest.mark.parametrize("variable", ["OPTIQ_OFFLINE", None])
def test_offline(
    hub: StandIn, model: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    if variable is None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setenv(variable, "1")
    refused(UsageError, "needs the network", model)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("end", "status", "kind", "words"),
    [
        ("/create", 401, UsageError, "does not accept the token"),
        ("/create", 403, UsageError, r"may not write to org \(no rights\)"),
        ("/create", 404, UsageError, "there is no account org"),
        ("/create", 400, UsageError, r"refuses the upload .*no rights"),
        ("/create", 500, EngineFailure, "with status 500"),
        ("/commit/main", 403, UsageError, "may not write to org"),
        ("/commit/main", 500, EngineFailure, "with status 500"),
        ("/objects/batch", 403, UsageError, "may not write to org"),
        ("/validate-yaml", 400, UsageError, "is refused .*metadata in README"),
    ],
)
def test_refusals_of_the_hub(  # noqa: PLR0913
    hub: StandIn,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    status: int,
    kind: type[OptiqError],
    words: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    answer = json.dumps({"error": "no rights"}).encode()
    hub.refusals[end] = (status, {"Content-Type": "application/json"}, answer)
    refused(kind, words, model)
    assert not hub.repos.get(REPO)


def test_a_hub_that_is_not_there(
    hub: StandIn, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(EngineFailure, "cannot be reached", model)
    monkeypatch.setenv("HF_ENDPOINT", "ftp://x")
    refused(UsageError, "is no address of a hub", model)
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["mine", "a b/c", "org/na--me", "org/x.git", ""])
def test_names_that_are_none(model: Path, repo: str) -> None:
    with pytest.raises(UsageError, match="is no hub id; write organization/name"):
        release.push(model, repo)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optiq/plan.json", "not written by optiq"),
        ("config.json", r"no config\.json\); convert"),
        ("tokenizer.json", r"no tokenizer\.json\); convert"),
        ("README.md", r"no README\.md\); write its card with optiq card"),
        ("model.safetensors", r"no model\*\.safetensors|holds no|has no"),
    ],
)
def test_a_directory_that_is_not_whole(model: Path, name: str, words: str) -> None:
    (model / name).unlink()
    with pytest.raises(UsageError, match=words):
        release.push(model, REPO)


def test_a_shard_cut_short(model: Path) -> None:
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        release.push(model, REPO)


def test_the_command(hub: StandIn, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["push", str(model), REPO]) == 0
    text = capsys.readouterr().out
    assert f"would go to {hub.url}/{REPO} (public, if it is new); give --yes to upload" in text
    assert "optiq/plan.json" in text
    assert "run.json" not in text
    assert hub.requests == []
    assert run(["push", str(model), REPO, "--yes", "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["commit"] == COMMIT
    assert {"path": "config.json", "size_bytes": 23} in parsed["files"]
    assert run(["push", str(model), "x"]) == 2
    assert hashlib.sha256(hub.repos[REPO]["model.safetensors"]).digest() == (
        hashlib.sha256((model / "model.safetensors").read_bytes()).digest()
    )
