"""A scripted engine with a beginning and an end, which says how it does."""

import asyncio
import dataclasses

from optiq.errors import RequestRejected
from tests.server.fake import DEFAULT, FakeService, FakeStream


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the engine says of itself."""

    queued: int = 0
    running: int = 0
    outcomes: dict = dataclasses.field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    restarts: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    active_memory_bytes: int = 0
    loaded: tuple = ()


class ManagedStream(FakeStream):
    """A stream that can be cut off in a pause.

    Attributes:
        ended: set when it is over.
    """

    def __init__(self, script):
        super().__init__(script)
        self._cut = asyncio.Event()
        self.ended = asyncio.Event()

    async def __anext__(self):
        for step in self._script:
            if isinstance(step, Exception):
                self.ended.set()
                raise step
            if isinstance(step, int | float):
                await self._pause(step)
                continue
            await asyncio.sleep(0)
            return step
        self.ended.set()
        raise StopAsyncIteration

    async def _pause(self, seconds):
        try:
            await asyncio.wait_for(self._cut.wait(), seconds)
        except TimeoutError:
            return
        raise RequestRejected("the server is shutting down", http_status=503, code="shutting_down")

    def cancel(self):
        super().cancel()
        self.ended.set()

    def cut(self):
        """The engine goes away."""
        self._cut.set()


@dataclasses.dataclass
class ManagedService(FakeService):
    """A scripted engine that `life` can have in hand.

    Attributes:
        not_ready: why it is not ready; "" if it is.
    """

    script: object = DEFAULT
    not_ready: str = ""

    def submit(self, job):
        stream = super().submit(job)
        self.streams[-1] = ManagedStream(stream._script)
        return self.streams[-1]

    def ready(self):
        return not self.not_ready, self.not_ready

    def snapshot(self):
        return Figures(running=sum(not stream.ended.is_set() for stream in self.streams))

    async def start(self):
        pass

    async def drain(self, seconds):
        waiting = [asyncio.ensure_future(stream.ended.wait()) for stream in self.streams]
        _, late = await asyncio.wait(waiting, timeout=seconds) if waiting else ((), ())
        for task in late:
            task.cancel()
        await self.close()
        return len(late)

    async def close(self):
        for stream in self.streams:
            stream.cut()
