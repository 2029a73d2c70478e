"""Saying no to a request whose body nobody has read."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from starlette.types import Message, Receive, Scope, Send

from optiq.errors import RequestRejected
from optiq.server.dialects import answer

LINGER_BYTES: Final = 16 * 2**20
LINGER_S: Final = 2.0


async def refuse(
    error: RequestRejected, scope: Scope, receive: Receive, send: Send, *, body_read: bool = False
) -> None:
    """Answer in the caller's dialect, and close the connection unless the body was read.

    A client that is still sending would lose the answer if the connection were closed at once: some
    of what it sends is read and dropped first, up to `LINGER_BYTES` and `LINGER_S`.
    """
    response = answer(error, scope)
    if body_read or not has_body(scope):
        return await response(scope, receive, send)
    response.headers["connection"] = "close"

    async def held(message: Message) -> None:
        if message["type"] != "http.response.body":
            return await send(message)
        await send({**message, "more_body": True})
        await _drop_body(receive)
        await send({"type": "http.response.body", "body": b""})

    await response(scope, receive, held)


def has_body(scope: Scope) -> bool:
    """Whether a request says that it brings a body."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
        for name, value in scope["headers"]
    )


async def _drop_body(receive: Receive) -> None:
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while dropped < LINGER_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
