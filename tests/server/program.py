"""A server with a scripted engine as a program: `python -m tests.server.program SCRIPT PORT DRAIN`.

Scripts: `quick`; `slow`, which writes a word and then nothing for a minute; `wait`, which says the
rest when the server is told to stop; `broken`, which cannot be loaded.
"""

import asyncio
import signal
import sys

from optiq.configs import ServeConfig
from optiq.errors import EngineFailure, OptiqError, UsageError
from optiq.server import app, life
from optiq.server.jobs import Started
from tests.server import echo
from tests.server.fake import DEFAULT, FakeService, FakeStream, ended, said


class Engine(FakeService):
    """Starts as its script says, and can begin to write when it is drained."""

    async def start(self):
        if self.kind in {"usage", "failure"}:
            await asyncio.sleep(0.2)
            raise (
                UsageError("no such model") if self.kind == "usage" else EngineFailure("no memory")
            )

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


class Waiting(FakeStream):
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
    kind, port, drain = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    script = (Started(1), *said("first"), 60.0, *said("late"), ended())
    engine = Engine(script if kind == "slow" else DEFAULT)
    engine.kind = kind
    app.ROUTERS = (*app.ROUTERS, echo.router)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test may be started without one
    try:
        config = ServeConfig(port=port, drain=drain)
        return life.serve(engine, config, lambda url: print(url, flush=True))
    except OptiqError as error:
        print(error, file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
