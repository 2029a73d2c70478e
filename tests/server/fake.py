"""An engine that follows a script: protocols are tested against it, without a model."""

import asyncio
import dataclasses

from optiq.engine.events import Finished, TextDelta, Usage
from optiq.errors import EngineFailure, RequestRejected
from optiq.server.jobs import (
    Counted,
    Detokenized,
    Embedded,
    ModelCard,
    Piece,
    Said,
    Started,
    Written,
)

CARD = ModelCard(
    name="tiny",
    created=1_700_000_000,
    loaded=True,
    context=4096,
    vision=True,
    tools=True,
    thinking=True,
    chat=True,
    drafter=None,
    size_bytes=1000,
    bpw=4.5,
)


def piece(text, logprob=-0.5):
    """A token that is this text; its id is the length."""
    data = text.encode()
    return Piece(len(text), data, logprob, ((len(text), data, logprob),))


def said(text, choice=0):
    """A token and its text."""
    return [Written(choice, (piece(text),)), Said(choice, TextDelta(text))]


def ended(reason="stop", choice=0, **rest):
    """The end of an answer."""
    usage = rest.pop("usage", Usage(prompt_tokens=3, completion_tokens=2))
    return Said(choice, Finished(reason, usage, **rest))


DEFAULT = (Started(3), *said("Hello"), *said(" world"), ended())


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


class FakeStream:
    """A stream of a script; a number in it is a pause, an exception is raised.

    Attributes:
        cancelled: whether somebody cancelled it.
        ended: set when it is over.
    """

    def __init__(self, script):
        self._script = iter(script)
        self._closed = asyncio.Event()
        self.ended = asyncio.Event()
        self.cancelled = False

    def __aiter__(self):
        return self

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
            await asyncio.wait_for(self._closed.wait(), seconds)
        except TimeoutError:
            return
        raise EngineFailure("the server is shutting down")

    def cancel(self):
        self.cancelled = True
        self.ended.set()

    def close(self):
        """The engine goes away."""
        self._closed.set()


@dataclasses.dataclass
class FakeService:
    """An engine whose answers are given.

    Attributes:
        script: what every generation replies, or a function of the job that gives it.
        jobs: what it was asked, in order.
        streams: what it answered with.
        not_ready: why it is not ready; "" if it is.
    """

    script: object = DEFAULT
    jobs: list = dataclasses.field(default_factory=list)
    streams: list = dataclasses.field(default_factory=list)
    cards: tuple = (CARD,)
    not_ready: str = ""

    def models(self):
        return self.cards

    def resolve(self, name):
        names = [card.name for card in self.cards]
        if name in {None, "default_model"}:
            return names[0]
        if name not in names:
            raise RequestRejected(
                f"model {name!r} is not served; there are {names}",
                http_status=404,
                param="model",
                code="model_not_found",
            )
        return name

    def submit(self, job):
        self.jobs.append(job)
        script = self.script(job) if callable(self.script) else self.script
        if isinstance(script, Exception):
            raise script
        self.streams.append(FakeStream(script))
        return self.streams[-1]

    async def embed(self, job):
        self.jobs.append(job)
        return Embedded(tuple((1.0, 0.0) for _ in job.inputs), 2 * len(job.inputs))

    async def count(self, job):
        self.jobs.append(job)
        return Counted((piece("Hi"), piece("!")), 2)

    async def detokenize(self, job):
        self.jobs.append(job)
        return Detokenized("Hi!")

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
        for stream in self.streams:
            stream.close()
        return len(late)

    async def close(self):
        for stream in self.streams:
            stream.close()
