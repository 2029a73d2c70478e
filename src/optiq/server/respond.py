"""Replies of the engine -> one body, or a stream of server-sent events.

Who closes the connection cancels the answer, whether it is streamed or not. Who reads slowly is
waited for: the engine process bounds what is kept for him and ends the answer then.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Final

from fastapi import Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT

from optiq.engine.events import Event, Finished, ToolCallDelta, ToolCallFailed, ToolCallStarted
from optiq.errors import EngineFailure, OptiqError, RequestRejected
from optiq.server.jobs import Piece, Reply, Said, Started, Written
from optiq.server.records import log_fault
from optiq.server.service import Stream

KEEPALIVE_S: Final = 10.0
_POLL_S: Final = 0.2


@dataclasses.dataclass
class Choice:
    """One answer in full.

    Attributes:
        events: all of them, in order; the last is `Finished`.
        pieces: its tokens.
    """

    events: list[Event] = dataclasses.field(default_factory=list)
    pieces: list[Piece] = dataclasses.field(default_factory=list)

    @property
    def finish(self) -> Finished:
        """The last event."""
        last = self.events[-1]
        assert isinstance(last, Finished)
        return last


async def collected(
    request: Request, stream: Stream, choices: int = 1
) -> tuple[Started, list[Choice]]:
    """Everything that a job gives, when it has ended.

    Raises:
        RequestRejected: what the engine raises; 499 if the client has gone.
    """
    out = [Choice() for _ in range(choices)]
    started, *rest = await replies(request, stream)
    assert isinstance(started, Started)
    for reply in rest:
        match reply:
            case Written(choice, pieces):
                out[choice].pieces += pieces
            case Said(choice, event):
                out[choice].events.append(event)
    return started, out


async def replies(request: Request, stream: Stream) -> list[Reply]:
    """The replies of a job in order, `Started` first, when it has ended.

    Raises:
        RequestRejected: what the engine raises; 499 if the client has gone.
    """
    gone = asyncio.create_task(_gone(request))
    try:
        found = [reply async for reply in _until(gone, stream)]
    finally:
        gone.cancel()
        stream.cancel()
    if not found or not isinstance(found[0], Started):
        raise EngineFailure("the engine ended an answer that it had not begun; try again")
    return found


def settled(found: Sequence[Reply]) -> list[Reply]:
    """Replies of one answer without the beginnings of calls that came to nothing.

    The text of such a call is among the replies as text.
    """
    failed = {
        index
        for reply in found
        if isinstance(reply, Said) and isinstance(reply.event, ToolCallFailed)
        for index in reply.event.started
    }
    return [reply for reply in found if not _belongs(reply, failed)]


def _belongs(reply: Reply, calls: Collection[int]) -> bool:
    if not isinstance(reply, Said):
        return False
    event = reply.event
    if isinstance(event, ToolCallStarted | ToolCallDelta):
        return event.index in calls
    return isinstance(event, ToolCallFailed)


async def streamed(
    request: Request,
    stream: Stream,
    encode: Callable[[Reply], list[bytes]],
    failed: Callable[[OptiqError], list[bytes]],
    media_type: str = "text/event-stream",
) -> StreamingResponse:
    """A streaming response, which begins when the job was found possible.

    Args:
        request: who asks.
        stream: the job.
        encode: parts of the body for a reply; called with `Started` first.
        failed: parts of the body that end it if the engine fails in mid-answer.
        media_type: of the body; keep-alive comments are for event streams alone.

    Raises:
        RequestRejected: what the engine raises before the answer begins.
    """
    first = asyncio.ensure_future(anext(stream))
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({first, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            raise _client_closed()
        begin = encode(first.result())
    except BaseException:
        first.cancel()
        stream.cancel()
        raise
    finally:
        gone.cancel()
    keep_alive = KEEPALIVE_COMMENT if media_type == "text/event-stream" else b""

    async def body() -> AsyncIterator[bytes]:
        try:
            for part in begin:
                yield part
            async for reply in _with_pauses(stream):
                for part in [keep_alive] if reply is None else encode(reply):
                    yield part
        except Exception as error:  # noqa: BLE001  an answer that has begun ends in its own words
            for part in failed(_told(error)):
                yield part
        finally:
            stream.cancel()

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(body(), media_type=media_type, headers=headers)


def _told(error: Exception) -> OptiqError:
    """What a reader is told; what nobody expected is logged."""
    if isinstance(error, OptiqError):
        return error
    log_fault(error, "a stream failed")
    return EngineFailure("internal error; the server's log says more")


async def _with_pauses(stream: Stream) -> AsyncIterator[Reply | None]:
    """The replies, and None whenever none has come for a while."""
    waiting: asyncio.Future[Reply] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(stream))
            await asyncio.wait({waiting}, timeout=KEEPALIVE_S)
            if not waiting.done():
                yield None
                continue
            done, waiting = waiting, None
            try:
                yield done.result()
            except StopAsyncIteration:
                return
    finally:
        if waiting is not None:
            waiting.cancel()


async def _until(gone: asyncio.Task[None], stream: Stream) -> AsyncIterator[Reply]:
    """The replies, as long as the client is there."""
    while True:
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            raise _client_closed()
        try:
            yield waiting.result()
        except StopAsyncIteration:
            return


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(_POLL_S)


def _client_closed() -> RequestRejected:
    return RequestRejected("the client has closed the connection", http_status=499)
