"""Pictures of requests: as data, or fetched from hosts of an allow-list.

A URL of a request makes this machine connect to something, so every hop is checked: scheme, host
and port against the list; the addresses that the name has; and the connection goes to an address
that was checked, not to what the name means a moment later.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import io
import ipaddress
import re
import ssl
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import httpcore
from PIL import Image

from optiq.errors import RequestRejected, UsageError
from optiq.models.vision.pictures import MAX_PIXELS

MAX_IMAGE_BYTES: Final = 20 * 2**20
MAX_REDIRECTS: Final = 3
FETCH_TIMEOUT_S: Final = 20.0
FETCHES_AT_A_TIME: Final = 8

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_ANY: Final = "*"
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # what protocols name, and more
_PORTS: Final = {"http": 80, "https": 443}
_DATA_URL: Final = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_ENTRY: Final = re.compile(r"(?P<host>\*|\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>\d{1,5}))?")
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_TRANSPORT_ERRORS: Final = (
    httpcore.NetworkError,
    httpcore.TimeoutException,
    httpcore.ProtocolError,
    OSError,  # TimeoutError and errors of TLS among them
)


def from_base64(text: str) -> bytes:
    """The picture that base64 stands for, without a data URL around it.

    Raises:
        RequestRejected: 400, if it is no base64, too large, or no image.
    """
    if len(text) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise _too_large()
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestRejected("the image is not valid base64", code="invalid_image") from None
    return checked(data)


def checked(data: bytes) -> bytes:
    """A picture of a kind and size that is read. Looks at its header alone.

    Raises:
        RequestRejected: 400, if it is not.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            width, height = picture.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_many_pixels("") from None
    except Exception:  # noqa: BLE001  decoders raise anything over damaged data
        raise RequestRejected(
            "the image cannot be read; send a PNG, JPEG, WebP, GIF, BMP or TIFF",
            code="invalid_image",
        ) from None
    if width * height > MAX_PIXELS:
        raise _too_many_pixels(f" ({width} x {height})")
    return data


class Images:
    """Where pictures of requests come from.

    Args:
        hosts: of http(s) URLs that may be fetched: `NAME`, `NAME:PORT`, or `*` for any name. Their
            addresses must be public, but for addresses that are themselves on the list.

    Raises:
        UsageError: if an entry is none of these.
    """

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        self._turns = asyncio.Semaphore(FETCHES_AT_A_TIME)
        self._places = frozenset(_place(entry) for entry in hosts)
        self._addresses = frozenset(
            address for host, _ in self._places if (address := _address(host)) is not None
        )

    async def fetch(self, source: str) -> bytes:
        """The picture at a data URL, or at an http(s) URL that the list permits.

        Raises:
            RequestRejected: 400, with the reason.
        """
        if source[:5].lower() == "data:":
            head = _DATA_URL.match(source)
            if head is None:
                raise RequestRejected("a data URL must begin with data:image/TYPE;base64,")
            return await asyncio.to_thread(from_base64, source[head.end() :])
        async with self._turns:
            data = await self._download(source)
        return await asyncio.to_thread(checked, data)

    async def _download(self, source: str) -> bytes:
        url = self._permitted(source)
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                for _ in range(MAX_REDIRECTS + 1):
                    data, location = await self._get(url)
                    if location is None:
                        return data
                    following = self._permitted(urljoin(url.geturl(), location))
                    if url.scheme == "https" and following.scheme != "https":
                        raise _refused("its redirect leaves https")
                    url = following
        except _TRANSPORT_ERRORS:
            # One sentence for every reason: what is behind the network is nobody's business.
            raise _refused(f"nothing usable came from {url.hostname}") from None
        raise _refused(f"it redirects more than {MAX_REDIRECTS} times")

    def _permitted(self, source: str) -> SplitResult:
        """The parts of a URL that may be fetched."""
        try:
            url = urlsplit(source)
            port = url.port or _PORTS[url.scheme]
            host = (url.hostname or "").encode("idna").decode("ascii").rstrip(".")
        except (ValueError, KeyError):
            raise _refused("its URL is neither data: nor a plain http(s) one") from None
        if re.search(r"[\x00-\x20\x7f\\]", source) or "@" in url.netloc or not host:
            raise _refused("its URL has blanks, control characters, a user or no host")
        usual = port == _PORTS[url.scheme]
        if (host, port) in self._places or (usual and {(host, None), (_ANY, None)} & self._places):
            return url
        raise _refused(f"{host}:{port} is not a host that images come from (--image-host)")

    async def _get(self, url: SplitResult) -> tuple[bytes, str | None]:
        """Body of an answer, or where it redirects to."""
        target = quote(url.path or "/", safe="/%:@!$&'()*+,;=~")
        if url.query:
            target += "?" + quote(url.query, safe="/%:@!$&'()*+,;=~?")
        address = httpcore.URL(
            scheme=url.scheme,
            host=(url.hostname or "").encode("idna"),
            port=url.port,
            target=target,
        )
        headers = [("accept", "image/*"), ("accept-encoding", "identity"), ("user-agent", "optiq")]
        times = dict.fromkeys(("connect", "read", "write", "pool"), FETCH_TIMEOUT_S)
        backend = _Checked(self._addresses)
        async with (
            httpcore.AsyncConnectionPool(_tls(), network_backend=backend) as pool,
            pool.stream("GET", address, headers=headers, extensions={"timeout": times}) as answer,
        ):
            fields = {name.lower(): value for name, value in answer.headers}
            if answer.status in {301, 302, 303, 307, 308} and b"location" in fields:
                return b"", fields[b"location"].decode("latin-1")
            if answer.status != 200 or fields.get(b"content-encoding", b"identity") != b"identity":
                raise httpcore.RemoteProtocolError("no image")
            return await _body(answer, int(fields.get(b"content-length", b"0"))), None


class _Checked(httpcore.AsyncNetworkBackend):
    """Connects to addresses that may be reached, and resolves names itself to know them."""

    def __init__(self, allowed: frozenset[Address]) -> None:
        self._allowed = allowed
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the first address that answers; none if one must not be reached."""
        error: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in await self._resolved(host, port):
            try:
                return await self._backend.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except httpcore.ConnectError as failed:
                error = failed
        raise error

    async def _resolved(self, host: str, port: int) -> Sequence[Address]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, proto=6)  # TCP
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        for address in addresses:
            if address not in self._allowed and not is_public(address):
                raise _refused(f"{host} has an address that is not public")
        return addresses


def is_public(address: Address) -> bool:
    """Whether an address is of the internet at large, whatever it is wrapped in."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address.teredo is not None:
            inner = address.teredo[1]
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast


async def _body(answer: httpcore.Response, announced: int) -> bytes:
    """What is sent, not what is announced, counts."""
    if announced > MAX_IMAGE_BYTES:
        raise _too_large()
    data = bytearray()
    async for part in answer.aiter_stream():
        data += part
        if len(data) > MAX_IMAGE_BYTES:
            raise _too_large()
    return bytes(data)


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpcore.default_ssl_context()


def _place(entry: str) -> tuple[str, int | None]:
    match = _ENTRY.fullmatch(entry.lower())
    if match is None:
        raise UsageError(f"--image-host '{entry}' is not NAME, NAME:PORT or *")
    return match["host"].strip("[]"), int(match["port"]) if match["port"] else None


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _refused(reason: str) -> RequestRejected:
    return RequestRejected(f"the image was not fetched: {reason}", code="invalid_image_url")


def _too_large() -> RequestRejected:
    return RequestRejected(
        f"the image is larger than {MAX_IMAGE_BYTES // 2**20} MiB", code="image_too_large"
    )


def _too_many_pixels(size: str) -> RequestRejected:
    return RequestRejected(
        f"the image has more than {MAX_PIXELS // 10**6} megapixels{size}; make it smaller",
        code="image_too_large",
    )
