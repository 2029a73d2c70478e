"""Who has a key, and when there must be one."""

import hmac

import pytest
from starlette.testclient import TestClient

from optiq.configs import ServeConfig
from optiq.errors import UsageError
from optiq.server import auth
from optiq.server.auth import is_loopback, keys_of
from tests.server.local import app_of

KEYS = ("first-key-of-two", "second-key")


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\n".join(["", *KEYS, ""]))
    return path


@pytest.fixture
def client(key_file):
    return TestClient(app_of(api_key_file=key_file), base_url="http://127.0.0.1:8080")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_loopback_needs_no_key(host):
    assert is_loopback(host)
    assert keys_of(ServeConfig(host=host), None) == ()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_other_machines_need_a_key(host, key_file):
    with pytest.raises(UsageError, match="OPTIQ_API_KEY"):
        keys_of(ServeConfig(host=host), None)
    assert keys_of(ServeConfig(host=host), "k") == ("k",)
    assert keys_of(ServeConfig(host=host, api_key_file=key_file), None) == KEYS


def test_the_file_wins_over_the_environment(key_file):
    assert keys_of(ServeConfig(api_key_file=key_file), "k") == KEYS


@pytest.mark.parametrize("text", ["", "\n \n", "two words", "schlüssel", "bell\x07"])
def test_a_file_without_usable_keys_is_refused(tmp_path, text):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(UsageError):
        keys_of(ServeConfig(api_key_file=path), None)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        keys_of(ServeConfig(api_key_file=tmp_path / "nix"), None)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("header", ["bearer", "x-api-key"])
def test_a_key_opens(client, key, header):
    headers = {"authorization": f"Bearer {key}"} if header == "bearer" else {"x-api-key": key}
    assert client.post("/v1/echo", json={"prompt": "x"}, headers=headers).status_code == 200
    assert client.get("/metrics", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {KEYS[0]}"},
        {"x-api-key": KEYS[0][:-1]},
        {"x-api-key": KEYS[0] + "x"},
        {"x-api-key": b"\xff\xfe"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/echo", "/v1/messages/echo", "/api/echo", "/nix"])
def test_without_one_nothing_opens(client, headers, path):
    answer = client.post(path, json={"prompt": "x"}, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    body = answer.json()
    if path.startswith("/v1/messages"):
        assert body["error"]["type"] == "authentication_error"
    elif path.startswith("/api"):
        assert "API key" in body["error"]
    else:
        assert body["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", sorted(auth.OPEN_PATHS))
def test_health_is_open(client, path):
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/openapi.json", "/v1/models", "/health/x"])
def test_the_rest_is_not(client, path):
    assert client.get(path).status_code == 401


@pytest.mark.parametrize("given", [*KEYS, "wrong", "f", KEYS[0] + "x"])
def test_every_key_is_compared_in_constant_time(client, monkeypatch, given):
    """Neither how much of a key is right nor which of them it is changes what is done."""
    compared = []

    def compare(left, right):
        compared.append((left, right))
        return hmac.compare_digest(left, right)

    monkeypatch.setattr(
        auth, "hmac", type("Watched", (), {"compare_digest": staticmethod(compare)})
    )
    client.get("/metrics", headers={"x-api-key": given})
    assert len(compared) == len(KEYS)
    assert {len(side) for pair in compared for side in pair} <= {32}


def test_the_document_names_the_key(client):
    found = client.get("/openapi.json", headers={"x-api-key": KEYS[0]}).json()
    assert found["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert found["components"]["securitySchemes"].keys() == {"bearer", "x-api-key"}
