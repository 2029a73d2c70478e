"""API keys: where they come from, when there must be one, and who has it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from optiq.configs import ServeConfig
from optiq.errors import RequestRejected, UsageError
from optiq.server.refusal import refuse

OPEN_PATHS: Final = frozenset({"/health", "/ready"})
"""What a load balancer asks; tells nothing but whether the server is up."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address or name that is listened at."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def keys_of(config: ServeConfig, from_environment: str | None) -> tuple[str, ...]:
    """The API keys that are accepted; none means that none is asked for.

    Args:
        config: `api_key_file`, one key a line, and `host`.
        from_environment: `OPTIQ_API_KEY`; used if there is no file.

    Raises:
        UsageError: if the file cannot be read or has no usable key, or if there is no key and other
            machines can reach the server.
    """
    keys: Sequence[str] = (from_environment,) if from_environment else ()
    source = "OPTIQ_API_KEY"
    if config.api_key_file is not None:
        source = f"--api-key-file {config.api_key_file}"
        try:
            text = config.api_key_file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{source} cannot be read: {error}") from None
        keys = [line.strip() for line in text.splitlines() if line.strip()]
        if not keys:
            raise UsageError(f"{source} is empty; write a key into it, one a line")
    if any(not (key.isascii() and key.isprintable()) or " " in key for key in keys):
        raise UsageError(f"a key of {source} has blanks or other than ASCII characters")
    if not keys and not is_loopback(config.host):
        raise UsageError(
            f"--host {config.host} lets other machines in: give --api-key-file FILE or set "
            "OPTIQ_API_KEY, or listen at 127.0.0.1"
        )
    return tuple(keys)


class Keys:
    """Middleware that lets requests with a key through: `Authorization: Bearer` or `x-api-key`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and self._digests and scope["path"] not in OPEN_PATHS:
            given = _given(Headers(scope=scope))
            if given is None or not self._knows(given):
                what = "no API key was sent" if given is None else "the API key is wrong"
                error = RequestRejected(
                    f"{what}; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                    http_status=401,
                    code="invalid_api_key",
                )
                return await refuse(error, scope, receive, send)
        await self._app(scope, receive, send)

    def _knows(self, given: str) -> bool:
        """In a time that tells nothing about the keys: digests, and all of them."""
        digest = _digest(given)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _given(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None
