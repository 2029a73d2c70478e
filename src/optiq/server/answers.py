"""Answers on their way from the engine process to who asked for them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final, Literal

from optiq.errors import OptiqError
from optiq.server.jobs import Reply, Said, Started, Written
from optiq.server.messages import Value

Outcome = Literal[
    "finished",  # all that was asked for
    "cancelled",  # by who asked
    "rejected",  # what was asked for is not possible
    "timeout",
    "slow_reader",
    "failed",  # this request alone
    "died",  # with the engine process
    "cut",  # by shutting down
    "refused",  # before it began: too many wait, or there is no engine
]
"""How a request ended: each in one way."""

_OBJECT_BYTES: Final = 200  # about what a small Python object with its parts takes


class Answer:
    """What a job gives, kept until it is read; implements `service.Stream`.

    Attributes:
        number: of the job.
        width: sequences that the engine runs for it.
        outcome: how it ended; None while it goes on.
        begun: whether anything was written.
        timer: ends it when its time is over.
    """

    def __init__(self, number: int, width: int, cancel: Callable[[Answer], None]) -> None:
        self.number, self.width = number, width
        self.outcome: Outcome | None = None
        self.begun = False
        self.timer: asyncio.TimerHandle | None = None
        self._cancel = cancel
        self._kept: deque[tuple[Reply | Value, int]] = deque()
        self._kept_bytes = 0
        self._error: OptiqError | None = None
        self._waiter: asyncio.Future[None] | None = None

    # -- what the supervisor calls ---------------------------------------------------------------

    def put(self, reply: Reply | Value) -> int:
        """Keep a reply; bytes that are kept now, the beginning of the answer not counted."""
        size = 0 if isinstance(reply, Started) else _size(reply)
        self._kept.append((reply, size))
        self._kept_bytes += size
        self._wake()
        return self._kept_bytes

    def end(self, outcome: Outcome, error: OptiqError | None = None) -> None:
        """Say how it ended; what nobody will read is dropped."""
        self.outcome, self._error = outcome, error
        if outcome in {"cancelled", "slow_reader"}:
            self._kept.clear()
        if self.timer is not None:
            self.timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- what the protocols call -----------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[Reply]:
        return self

    async def __anext__(self) -> Reply:
        """The next reply.

        Raises:
            OptiqError: why the answer failed.
        """
        reply = await self.next()
        assert isinstance(reply, Started | Written | Said)
        return reply

    async def next(self) -> Reply | Value:
        """The next reply of whatever kind.

        Raises:
            OptiqError: why the job failed.
            StopAsyncIteration: if nothing more comes.
        """
        while not self._kept:
            if self._error is not None:
                raise self._error
            if self.outcome is not None:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        reply, size = self._kept.popleft()
        self._kept_bytes -= size
        return reply

    def cancel(self) -> None:
        """Write no more. May be called at any time, and more than once."""
        self._cancel(self)


def _size(reply: Reply | Value) -> int:
    """About the memory of a reply."""
    match reply:
        case Written(_, pieces):
            return _OBJECT_BYTES * sum(1 + len(piece.top) for piece in pieces)
        case Said(_, event):
            text = getattr(event, "text", "") or getattr(event, "arguments", "")
            return _OBJECT_BYTES + len(text)
    return _OBJECT_BYTES
