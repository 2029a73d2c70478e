"""A server with a scripted engine as a program: `python -m tests.server.program SCRIPT DRAIN`.

Scripts: `slow`, which writes a word and then nothing for a minute; `wait`, which says the rest when
the server is told to stop.
"""

import asyncio
import sys

from optiq.configs import ServeConfig
from optiq.server import app, life
from optiq.server.jobs import Started
from tests.server import echo
from tests.server.fake import ended, said
from tests.server.managed import ManagedService, ManagedStream


class Engine(ManagedService):
    """Can begin to write when it is drained."""

    kind = ""

    def submit(self, job):
        stream = super().submit(job)
        if self.kind == "wait":
            self.streams[-1] = stream = Waiting()
        return stream

    async def drain(self, seconds):
        for stream in self.streams:
            if isinstance(stream, Waiting):
                stream.drained.set()
        return await super().drain(seconds)


class Waiting(ManagedStream):
    """Says its second word when the server is drained."""

    def __init__(self):
        super().__init__((Started(1), *said("first"), None, *said(" second"), ended()))
        self.drained = asyncio.Event()

    async def __anext__(self):
        reply = await super().__anext__()
        if reply is None:
            await self.drained.wait()
            return await super().__anext__()
        return reply


def main():
    kind, drain = sys.argv[1], float(sys.argv[2])
    engine = Engine((Started(1), *said("first"), 60.0, *said("late"), ended()))
    engine.kind = kind
    app.ROUTERS = (*app.ROUTERS, echo.router)
    return life.serve(engine, ServeConfig(port=0, drain=drain), announce)


def announce(url):
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
