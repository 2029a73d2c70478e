"""The engine process, seen from the one that starts it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Final

from optiq.server import messages
from optiq.server.messages import Message

COMMAND: Final = (sys.executable, "-m", "optiq.server.worker")
_STDERR: Final = 2
_GRACE_S: Final = 5.0  # from the end of the pipe to the end of the process


class Child:
    """A running engine process, and the pipe to it.

    It is a program of its own and not a fork: nothing of this process is run again or inherited
    but standard error and the pipe.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer

    @classmethod
    async def start(cls, command: Sequence[str] = COMMAND) -> Child:
        """Start one; its end of the pipe is the last argument of the command.

        Raises:
            OSError: if the machine has no room for one.
        """
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.enter_context(ours)
            with theirs:
                end = theirs.fileno()
                process = await asyncio.create_subprocess_exec(
                    *command,
                    str(end),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=_STDERR,  # standard output is the server's own
                    pass_fds=(end,),
                )
            reader, writer = await asyncio.open_connection(sock=ours)
            stack.pop_all()  # the streams own it now
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def send(self, frame: bytes) -> None:
        """Hand over a frame; it is dropped if the process has ended."""
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def receive(self) -> Message | None:
        """The next message; None when the process has ended."""
        try:
            header = await self._reader.readexactly(messages.HEADER_BYTES)
            data = await self._reader.readexactly(messages.length_of(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        message: Message = messages.unpacked(data)
        return message

    def kill(self) -> None:
        """End it at once."""
        if self._process.returncode is None:
            self._process.kill()

    async def ended(self) -> str:
        """Close the pipe, wait for the end, and say what it was: `signal SIGKILL`, `status 1`."""
        self._writer.close()
        try:
            status = await asyncio.wait_for(self._process.wait(), _GRACE_S)
        except TimeoutError:
            self.kill()
            status = await self._process.wait()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            pass  # it has closed its end first
        return f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
