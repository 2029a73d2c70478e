"""Which requests are let in, and how much of a body is read."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from optiq.configs import ServeConfig
from optiq.errors import UsageError
from optiq.server.app import create_app
from optiq.server.guard import MAX_DEPTH, Bodies, depth_of
from tests.server.local import app_of
from tests.server.managed import ManagedService

OWN = "http://127.0.0.1:8080"


@pytest.fixture(autouse=True)
def no_linger(monkeypatch):
    """Scripted clients send no more."""
    monkeypatch.setattr("optiq.server.refusal.LINGER_S", 0.1)


def client_of(**options):
    return TestClient(app_of(**options), base_url=OWN)


def asked(client, path="/v1/echo", **headers):
    return client.post(path, json={"prompt": "x"}, headers=headers)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080", "127.9.9.9"]
)
def test_names_of_this_machine_are_answered(host):
    assert asked(client_of(), host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "192.168.1.5",
        "127.0.0.1.nip.io",
    ],
)
@pytest.mark.parametrize("path", ["/v1/echo", "/v1/messages/echo", "/api/echo"])
def test_other_names_are_not(host, path):
    service = ManagedService()
    answer = asked(TestClient(app_of(service), base_url=OWN), path, host=host)
    assert answer.status_code == 403
    assert "--allowed-host" in answer.text
    assert service.jobs == []


@pytest.mark.parametrize("host", ["", "a b", "user@localhost", "localhost/x", "[::1", "x:y"])
def test_what_is_no_name_is_refused(host):
    assert asked(client_of(), host=host).status_code == 400


def test_names_can_be_allowed():
    client = client_of(allowed_host=("Box.local",))
    assert asked(client, host="box.LOCAL:8080").status_code == 200
    assert asked(client, host="other.local").status_code == 403


def test_addresses_are_answered_where_other_machines_may_ask(tmp_path):
    path = tmp_path / "key"
    path.write_text("k")
    client = client_of(host="0.0.0.0", api_key_file=path)
    assert asked(client, host="192.168.1.5:8080", **{"x-api-key": "k"}).status_code == 200
    assert asked(client, host="rebound.example", **{"x-api-key": "k"}).status_code == 403


@pytest.mark.parametrize("origin", [OWN, "https://127.0.0.1:8080"])
def test_a_page_of_the_server_may_ask(origin):
    assert asked(client_of(), origin=origin).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost:3000",
        "http://127.0.0.1:80801",
        "file://",
        "",
    ],
)
def test_pages_of_others_may_not(origin):
    service = ManagedService()
    answer = asked(TestClient(app_of(service), base_url=OWN), origin=origin)
    assert answer.status_code == 403
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert service.jobs == []


def test_an_origin_can_be_allowed():
    client = client_of(cors_origin=("https://App.example/",))
    headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
    asking = client.options(
        "/v1/echo", headers=headers | {"access-control-request-headers": "authorization,x-a"}
    )
    assert asking.status_code == 200
    assert asking.headers["access-control-allow-origin"] == "https://app.example"
    assert asking.headers["access-control-allow-headers"] == "authorization,x-a"
    answer = asked(client, origin="https://app.example")
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    for found in (asking, answer):
        assert "access-control-allow-credentials" not in found.headers
    assert asked(client, origin="https://other.example").status_code == 403


def test_refusals_behind_the_doors_can_be_read_by_the_page(tmp_path):
    path = tmp_path / "key"
    path.write_text("k")
    client = client_of(cors_origin=("https://app.example",), api_key_file=path)
    answer = asked(client, origin="https://app.example")
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize("name", ["cors_origin", "allowed_host"])
def test_a_wildcard_needs_a_key(name, tmp_path, monkeypatch):
    monkeypatch.delenv("OPTIQ_API_KEY", raising=False)
    with pytest.raises(UsageError, match="any web page"):
        create_app(ManagedService(), ServeConfig(**{name: ("*",)}))
    path = tmp_path / "key"
    path.write_text("k")
    client = client_of(**{name: ("*",)}, api_key_file=path)
    headers = {"host": "any.example", "origin": "https://any.example"}
    key = {"x-api-key": "k"}
    allowed = headers if name == "allowed_host" else {"origin": headers["origin"]}
    assert asked(client, **allowed, **key).status_code == 200
    assert asked(client, **allowed).status_code == 401


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json", ""],
)
def test_only_json_is_read(kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = client_of().post("/v1/echo", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_json_is_read(kind):
    answer = client_of().post(
        "/v1/echo", content=b'{"prompt": "x"}', headers={"content-type": kind}
    )
    assert answer.status_code == 200


def test_packed_bodies_are_refused():
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert client_of().post("/v1/echo", content=b"x", headers=headers).status_code == 415


def test_a_body_of_the_limit_is_read_and_one_byte_more_is_not():
    client = client_of(max_body="100")
    body = json.dumps({"prompt": "x" * 85}).encode()
    assert len(body) == 99
    headers = {"content-type": "application/json"}
    assert client.post("/v1/echo", content=body + b" ", headers=headers).status_code == 200
    for content in (body + b"  ", iter([body, b"  "])):
        answer = client.post("/v1/echo", content=content, headers=headers)
        assert answer.status_code == 413
        assert "--max-body" in answer.json()["error"]["message"]


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
def test_nesting_has_a_limit(depth, brackets):
    inner = depth - 1
    body = '{"prompt": "x", "user": ' + brackets[0] * inner + "1" + brackets[1] * inner + "}"
    answer = client_of().post(
        "/v1/echo", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == (200 if depth == MAX_DEPTH else 400)
    if depth > MAX_DEPTH:
        assert "nested" in answer.json()["error"]["message"]


def depth_by_parsing(value):
    if isinstance(value, dict):
        return 1 + max(map(depth_by_parsing, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_by_parsing, value), default=0)
    return 0


texts = st.text(alphabet='ab"\\[]{}:,\n\u00e9\U0001f600', max_size=8)


@given(
    st.recursive(
        st.none() | st.integers() | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=12,
    ),
    st.booleans(),
)
def test_depth_is_that_of_the_parsed_value(value, escaped):
    assert depth_of(json.dumps(value, ensure_ascii=escaped).encode()) == depth_by_parsing(value)


@pytest.mark.parametrize(
    ("body", "depth"),
    [
        (b"", 0),
        (b"[" * 2_000_000, 2_000_000),
        (b"[]" * 1_000_000, 1),
        (b'"' + rb"\"" * 1_000_000, 0),
        (b'"' + b"\\" * 1_000_001, 0),
        (b'["[' + b"a" * 1_000_000, 1),
        (b'""' * 500_000 + b"[", 1),
        (b"\xff\xfe[{", 2),
    ],
)
def test_depth_of_what_is_no_json_takes_no_long_time(body, depth):
    assert depth_of(body) == depth


def scope_of(*headers):
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/echo",
        "state": {"request_id": "r"},
        "headers": [(b"content-type", b"application/json"), *headers],
    }


def told(scope, messages, **options):
    """Status that a scripted client gets from `Bodies`, and how often it was read."""
    sent, reads = [], 0

    async def receive():
        nonlocal reads
        reads += 1
        message = messages(reads)
        if message is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": message[0], "more_body": message[1]}

    async def send(message):
        sent.append(message)

    async def inner(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    asyncio.run(Bodies(inner, **{"max_bytes": 1000} | options)(scope, receive, send))
    return sent[0]["status"], reads


def test_a_body_that_does_not_come_is_not_waited_for():
    assert told(scope_of((b"content-length", b"5")), lambda _: None, timeout_s=0.01)[0] == 408


def test_a_drop_every_now_and_then_is_no_body():
    status, _ = told(
        scope_of((b"transfer-encoding", b"chunked")),
        lambda reads: (b" ", True) if reads < 5 else None,
        timeout_s=0.05,
    )
    assert status == 408


def test_an_endless_body_is_read_to_the_limit_and_a_little_is_dropped(monkeypatch):
    monkeypatch.setattr("optiq.server.refusal.LINGER_BYTES", 5000)
    status, reads = told(scope_of((b"transfer-encoding", b"chunked")), lambda _: (b"x" * 100, True))
    assert status == 413
    assert reads == 11 + 50


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"5"), (b"content-length", b"6")],
        [(b"content-length", b"5"), (b"transfer-encoding", b"chunked")],
        [(b"content-length", b"-5")],
        [(b"content-length", b"0x5")],
    ],
)
def test_an_unclear_length_is_refused(headers):
    assert told(scope_of(*headers), lambda _: (b"{}", False))[0] == 400


def test_no_work_is_taken_while_the_server_ends():
    app = app_of()
    client = TestClient(app, base_url=OWN)
    app.state.draining = True
    answer = asked(client)
    assert answer.status_code == 503
    assert answer.headers["connection"] == "close"
    assert answer.headers["retry-after"] == "5"
    assert client.get("/health").status_code == 200
    assert client.get("/ready").json() == {
        "status": "not ready",
        "reason": "the server is shutting down",
    }


@pytest.mark.parametrize("path", ["/v1/models", "/api/tags", "/health", "/ready", "/metrics"])
def test_a_method_that_a_route_has_not_is_said_to_be_none(path):
    answer = client_of().post(path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"


def test_a_request_without_a_body_is_refused_by_its_route():
    assert client_of().post("/v1/chat/completions").status_code == 400
