"""Pictures of requests: what is read, and what is never fetched."""

import asyncio
import base64
import contextlib
import io
import ipaddress
import socket
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from optiq.errors import RequestRejected, UsageError
from optiq.server import images
from optiq.server.images import Images, checked, from_base64, is_public


def picture(kind="PNG", size=(4, 3)):
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, kind)
    return out.getvalue()


def bomb(width, height):
    """A PNG of a few bytes whose header promises this many pixels."""

    def chunk(name, data):
        code = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + code

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def data_url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def fetched(source, *hosts):
    return asyncio.run(Images(hosts).fetch(source))


def refusal(source, *hosts):
    with pytest.raises(RequestRejected) as caught:
        fetched(source, *hosts)
    assert caught.value.http_status == 400
    return str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures_as_data_are_read(kind):
    data = picture(kind)
    assert fetched(data_url(data, f"image/{kind.lower()}")) == data
    assert from_base64(base64.encodebytes(data).decode()) == data


@pytest.mark.parametrize(
    "source",
    [
        "data:,hello",
        "data:text/html;base64,aGk=",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(),
        "data:image/png;base64,###",
        "data:image/png;base64,aGk",
        "data:image/png;base64,",
        data_url(picture()[:20]),
        data_url(b"not a picture"),
        data_url(picture("PPM")),
        "data:image/png;base64,é",
    ],
)
def test_other_data_is_refused(source):
    refusal(source, "*")


@pytest.mark.parametrize("size", [(8001, 8000), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 9)])
def test_a_bomb_is_seen_from_its_header(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", None)  # nothing is decoded
    assert "megapixels" in refusal(data_url(bomb(*size)))
    with pytest.raises(RequestRejected, match="megapixels"):
        from_base64(base64.b64encode(bomb(*size)).decode())


def test_64_megapixels_are_let_through():
    assert checked(bomb(8000, 8000))


def test_large_data_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 300)
    assert from_base64(base64.b64encode(picture()).decode())
    monkeypatch.setattr(images.base64, "b64decode", None)
    with pytest.raises(RequestRejected, match="larger"):
        from_base64("A" * 500)


@pytest.mark.parametrize(
    "source",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://images.example/a.png",
        "gopher://images.example/",
        "//images.example/a.png",
        "http://",
        "http:///a.png",
        "http://images.example:99999/a.png",
        "http://user@images.example/a.png",
        "http://images.example\\@evil.example/a.png",
        "http://images.example/a b.png",
        "http://images.example/a\r\nX: y",
        "http://images.example\x00.evil/",
        "http://evil.example/a.png",
        "http://images.example.evil.example/a.png",
        "http://images.example:8080/a.png",
        "http://[::1]/a.png",
        "",
    ],
)
def test_urls_off_the_list_are_not_even_resolved(source, monkeypatch):
    monkeypatch.setattr(images, "_Checked", None)
    refusal(source, "images.example")


def test_without_a_list_nothing_is_fetched():
    assert "--image-host" in refusal("https://images.example/a.png")


@pytest.mark.parametrize("entry", ["", "http://a", "a/b", "*.a", "a:b", "a b", "[::1", "a:123456"])
def test_a_list_with_other_entries_is_refused(entry):
    with pytest.raises(UsageError, match="--image-host"):
        Images([entry])


PRIVATE = [
    "127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "0.0.0.0",
    "100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1",
    "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
    "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:db8::1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_of_the_internet(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_of_the_internet(address):
    assert is_public(ipaddress.ip_address(address))


def resolving(monkeypatch, *addresses):
    """Every name has these addresses; connections are noted, and fail."""
    tried = []

    async def getaddrinfo(_loop, _host, port, **_):
        return [
            (socket.AF_INET6 if ":" in a else socket.AF_INET, 1, 6, "", (a, port))
            for a in addresses
        ]

    async def connect(_backend, host, port, *_):
        tried.append((host, port))
        raise images.httpcore.ConnectError

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(images.httpcore.AnyIOBackend, "connect_tcp", connect)
    return tried


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("host", ["images.example", "2130706433", "0x7f.1"])
def test_a_name_that_points_inside_is_not_connected_to(monkeypatch, address, host):
    tried = resolving(monkeypatch, "93.184.215.14", address)
    assert "not public" in refusal(f"http://{host}/a.png", "*")
    assert tried == []


def test_the_address_that_was_checked_is_connected_to(monkeypatch):
    tried = resolving(monkeypatch, "2606:4700::1111", "93.184.215.14")
    refusal("https://images.example/a.png", "images.example")
    assert tried == [("2606:4700::1111", 443), ("93.184.215.14", 443)]


class Handler(BaseHTTPRequestHandler):
    """Answers by the path, and notes what was asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        with contextlib.suppress(ConnectionError):
            self.answer()

    def answer(self):
        name, _, rest = self.path[1:].partition("/")
        if name == "redirect":
            return self.send(302, b"", location=base64.urlsafe_b64decode(rest).decode())
        if name == "loop":
            return self.send(302, b"", location=f"/loop/{int(rest or 0) + 1}")
        if name == "status":
            return self.send(int(rest), b"secret of the inside")
        if name == "gzip":
            return self.send(200, zlib.compress(picture()), **{"content-encoding": "gzip"})
        if name == "lies":  # more than it says, and then more without saying
            return self.send(200, picture() + bytes(5000), **{"content-length": rest})
        if name == "endless":
            self.send_response(200)
            self.send_header("connection", "close")
            self.end_headers()
            while True:
                self.wfile.write(bytes(1000))
        if name == "slow":
            self.server.stopped.wait(60)
        return self.send(200, bomb(30_000, 30_000) if name == "bomb" else picture())

    def send(self, status, data, **headers):
        self.send_response(status)
        for key, value in {"content-length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    """A web server of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.stopped = [], threading.Event()
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.place = f"127.0.0.1:{server.server_port}"
    yield server
    server.stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()


def to(target):
    return "redirect/" + base64.urlsafe_b64encode(target.encode()).decode()


def test_a_place_on_the_list_is_fetched_from(site):
    url = f"http://{site.place}/a%20b/ü.png?x=1&y=ü"
    assert fetched(url, site.place) == picture()
    path, headers = site.asked[-1]
    assert path == "/a%20b/%C3%BC.png?x=1&y=%C3%BC"
    assert headers == {
        "Host": site.place,
        "accept": "image/*",
        "accept-encoding": "identity",
        "user-agent": "optiq",
    }


def test_an_address_is_on_the_list_only_with_its_port(site):
    assert "--image-host" in refusal(f"http://{site.place}/a.png", "127.0.0.1", "*")


def test_a_redirect_is_followed_where_the_list_permits(site):
    assert fetched(f"http://{site.place}/{to('/a.png')}", site.place) == picture()


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data",
        "http://localhost:1/a.png",
        "http://127.0.0.1:1/a.png",
        "file:///etc/passwd",
        "//127.0.0.1:1/",
        "http://[::ffff:127.0.0.1]/",
    ],
)
def test_a_redirect_off_the_list_is_not_followed(site, target):
    before = len(site.asked)
    refusal(f"http://{site.place}/{to(target)}", site.place)
    assert len(site.asked) == before + 1


def test_a_redirect_inside_is_not_followed_where_any_name_is_permitted(site, monkeypatch):
    own = asyncio.BaseEventLoop.getaddrinfo

    async def getaddrinfo(self, host, port, **rest):
        return await own(self, "10.1.2.3" if host == "inside.example" else host, port, **rest)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    url = f"http://{site.place}/{to('http://inside.example/a.png')}"
    assert "not public" in refusal(url, site.place, "*")


def test_redirects_have_an_end(site):
    before = len(site.asked)
    assert "redirects more than" in refusal(f"http://{site.place}/loop", site.place)
    assert len(site.asked) == before + 1 + images.MAX_REDIRECTS


@pytest.mark.parametrize("path", ["status/404", "status/500", "status/401", "gzip"])
def test_what_is_behind_the_network_is_not_told(site, path):
    text = refusal(f"http://{site.place}/{path}", site.place)
    assert text == refusal(f"http://{site.place}/status/403", site.place)
    assert "secret" not in text


def test_a_closed_port_says_no_more_than_an_open_one(site):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    closed = refusal(f"http://{place}/a.png", place)
    assert closed == refusal(f"http://{site.place}/status/404", site.place)


@pytest.mark.parametrize("path", ["endless", "lies/5000000000", "bomb"])
def test_size_has_a_limit_whatever_is_announced(site, path, monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100_000)
    assert "image has" in refusal(f"http://{site.place}/{path}", site.place) or path != "bomb"


def test_only_what_is_announced_is_taken(site):
    assert fetched(f"http://{site.place}/lies/{len(picture())}", site.place) == picture()


def test_time_has_a_limit(site, monkeypatch):
    monkeypatch.setattr(images, "FETCH_TIMEOUT_S", 0.2)
    assert "nothing usable" in refusal(f"http://{site.place}/slow", site.place)
