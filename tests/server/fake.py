"""An engine that follows a script: protocols are tested against it, without a model."""

import asyncio
import dataclasses

from optiq.engine.events import Finished, TextDelta, Usage
from optiq.errors import RequestRejected
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


def default(job):
    """The same answer for every choice of a job, and the prompt where the job echoes it."""
    first = Started(3, (Piece(1, b"Hi"),) if job.echo else ())
    answers = [[*said("Hello", i), *said(" world", i), ended(choice=i)] for i in range(job.choices)]
    return [first, *(reply for answer in answers for reply in answer)]


class FakeStream:
    """A stream of a script; a number in it is a pause, an exception is raised."""

    def __init__(self, script):
        self._script = iter(script)
        self.cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        for step in self._script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, int | float):
                await asyncio.sleep(step)
                continue
            await asyncio.sleep(0)
            return step
        raise StopAsyncIteration

    def cancel(self):
        self.cancelled = True


@dataclasses.dataclass
class FakeService:
    """An engine whose answers are given.

    Attributes:
        script: what every generation replies, or a function of the job that gives it.
        jobs: what it was asked, in order.
        streams: what it answered with.
    """

    script: object = default
    jobs: list = dataclasses.field(default_factory=list)
    streams: list = dataclasses.field(default_factory=list)
    cards: tuple = (CARD,)

    async def known(self):
        pass

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
