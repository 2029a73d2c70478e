"""Attacks on a listening server: each is refused cheaply, and the server goes on."""

import base64
import contextlib
import json
import socket
import time

import httpx
import pytest

from tests.server import local
from tests.server.local import app_of, listening, spoken, until
from tests.server.managed import ManagedService
from tests.unit.server.test_images import bomb

MAX_BODY = 1_000_000
GIB = 2**30


@pytest.fixture(scope="module")
def service():
    return ManagedService()


@pytest.fixture(scope="module")
def port(service):
    """Of a server with a small limit, which fetches images from this machine's port 9 alone."""
    app = app_of(service, max_body=str(MAX_BODY), image_host=("127.0.0.1:9",))
    with listening(app) as number:
        yield number


@pytest.fixture(autouse=True)
def goes_on(port, service):
    """After every attack the server is ready, works, and has done nothing for the attacker."""
    before = len(service.jobs)
    yield
    assert len(service.jobs) == before
    assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/echo", json={"prompt": "x"})
    assert answer.json() == {"text": "Hello world"}


def request(*headers, body=b"", path="/v1/echo", host="127.0.0.1"):
    """A request as bytes; JSON with its length, unless headers say otherwise."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", *headers]
    names = {line.partition(":")[0].lower() for line in headers}
    if "content-type" not in names:
        lines.append("Content-Type: application/json")
    if not names & {"content-length", "transfer-encoding"}:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


BODY = b'{"prompt": "x"}'


def test_dns_rebinding(port):
    status, _, text = spoken(port, request(body=BODY, host=f"evil.example:{port}"))
    assert status == 403
    assert json.loads(text)["error"]["code"] == "host_not_allowed"


def test_cross_origin_form_post(port):
    status, headers, _ = spoken(
        port, request("Origin: https://evil.example", "Content-Type: text/plain", body=BODY)
    )
    assert status == 403
    assert not any(name.startswith("access-control") for name in headers)


def test_text_plain_post_without_origin(port):
    assert spoken(port, request("Content-Type: text/plain", body=BODY))[0] == 415


def test_a_gigabyte_that_is_announced_is_not_read(port):
    began = time.monotonic()
    status, headers, _ = spoken(port, request(f"Content-Length: {GIB}"), b"x" * 100_000)
    assert status == 413
    assert headers["connection"] == "close"
    assert time.monotonic() - began < 30


def sent_before_close(port, head, part):
    """Bytes of an endless body that the server takes."""
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=local.WAIT_S) as connection:
        connection.sendall(head)
        try:
            while sent < GIB:
                connection.sendall(part)
                sent += len(part)
        except ConnectionError:
            pass
    return sent


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (f"Content-Length: {GIB}", b"x" * 100_000),
        ("Transfer-Encoding: chunked", b"186a0\r\n" + b"x" * 100_000 + b"\r\n"),
    ],
)
def test_a_gigabyte_that_is_sent_is_not_read(port, header, part):
    assert sent_before_close(port, request(header), part) < 100_000_000


def test_an_answer_to_a_body_too_large_can_be_read(port):
    for content in (b"x" * (2 * MAX_BODY), iter([b"x" * MAX_BODY] * 2)):
        headers = {"content-type": "application/json"}
        url = f"http://127.0.0.1:{port}/v1/echo"
        assert httpx.post(url, content=content, headers=headers).status_code == 413


def test_a_client_that_asks_before_it_sends_is_not_told_to_go_on(port):
    status, _, _ = spoken(port, request(f"Content-Length: {GIB}", "Expect: 100-continue"))
    assert status == 413


@pytest.mark.parametrize("bracket", [b"[", b'{"a":'])
def test_nested_json(port, bracket):
    status, _, text = spoken(port, request(body=bracket * (MAX_BODY // len(bracket))))
    assert status == 400
    assert b"nested" in text


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{", b"\xff", b"9" * 10_000, b'{"a":1e999'])
def test_other_json(port, body):
    assert spoken(port, request(body=body))[0] == 400


def test_zip_bomb_image(port):
    data = base64.b64encode(bomb(50_000, 50_000)).decode()
    body = json.dumps({"prompt": "x", "image": f"data:image/png;base64,{data}"}).encode()
    status, _, text = spoken(port, request(body=body))
    assert status == 400
    assert b"megapixels" in text


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8080/a.png",
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost/a.png",
        "file:///etc/passwd",
        "http://127.0.0.1:9/a.png",  # permitted, and closed
    ],
)
@pytest.mark.parametrize("path", ["/v1/echo", "/v1/messages/echo", "/api/echo"])
def test_image_urls(port, url, path):
    body = json.dumps({"prompt": "x", "image": url}).encode()
    status, _, text = spoken(port, request(body=body, path=path))
    assert status == 400
    assert b"not fetched" in text


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "org/repo", "tiny/../tiny", "\0"]
)
def test_paths_in_place_of_model_names(port, name):
    body = json.dumps({"prompt": "x", "model": name}).encode()
    assert spoken(port, request(body=body))[0] == 404
    for path in ("/v1/%2e%2e/%2e%2e/etc/passwd", "/v1/..%2f..%2fetc%2fpasswd", "/%00", "//x"):
        assert spoken(port, request(body=BODY, path=path))[0] == 404


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 15", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
        ["Content-Length: +15"],
        ["Content-Length: 15, 16"],
        ["Content-Length : 15"],
        ["X: a\r b", "Content-Length: 15"],
        ["Host: evil.example"],
        [" folded: x"],
    ],
)
def test_smuggled_headers(port, headers):
    status, answer, _ = spoken_text(port, request(*headers, body=BODY))
    assert status in {400, 501}
    assert answer["connection"] == "close"


def spoken_text(port, data):
    """An answer of whatever kind, to its end."""
    with socket.create_connection(("127.0.0.1", port), timeout=local.WAIT_S) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, text = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), headers, text


def test_what_follows_a_refused_body_is_not_a_request(port, service):
    """The rest of a body that was not read must not be taken for the next request."""
    inner = request(body=BODY)
    status, headers, text = spoken_text(
        port, request("Content-Type: text/plain", body=inner) + inner
    )
    assert status == 415
    assert headers["connection"] == "close"
    assert b"HTTP/1.1" not in text
    assert service.jobs == [] or service.jobs[-1].prompt == "x"


def test_ids_come_back_without_line_breaks(port):
    for value in ("a%0d%0aset-cookie: x", "a\tb", "x" * 1000):
        data = f"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {value}\r\n\r\n"
        status, headers, _ = spoken(port, data.encode())
        assert status == 200
        assert len(headers["x-request-id"]) == 32
        assert "set-cookie" not in headers


def test_huge_headers(port):
    with contextlib.suppress(ConnectionError):  # it is closed while they are being sent
        assert spoken_text(port, request("X: " + "y" * 200_000))[0] == 400


@pytest.mark.parametrize("body", [BODY, b'{"prompt": "x", "stream": true}'])
def test_a_client_that_goes_away_is_noticed(body):
    """Streamed or not, and while nothing is written."""
    slow = ManagedService((60.0,))
    with listening(app_of(slow)) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=local.WAIT_S) as connection:
            connection.sendall(request(body=body))
            until(lambda: slow.streams)
        until(lambda: slow.streams[0].cancelled)
        text = until(lambda: cancelled(port))
    assert 'outcome="cancelled",route="/v1/echo"' in text


def cancelled(port):
    """The metrics, once they know of a cancelled request."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return text if 'outcome="cancelled"' in text else None
