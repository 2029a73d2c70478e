"""Several streams as one, for a request with several prompts."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence

from optiq.server.jobs import Reply, Said, Started, Written
from optiq.server.service import Stream


class Merged:
    """A stream of `Started` of all, in order, and then of their replies as they come.

    Answers are numbered through: those of the second stream come after those of the first.

    Attributes:
        started: what was understood so far, in the order of the prompts.

    Args:
        streams: of the prompts.
        choices: answers to each.
    """

    def __init__(self, streams: Sequence[Stream], choices: int) -> None:
        self.started: list[Started] = []
        self._streams, self._choices = streams, choices
        self._replies = self._merged()

    def __aiter__(self) -> AsyncIterator[Reply]:
        return self

    async def __anext__(self) -> Reply:
        return await anext(self._replies)

    def cancel(self) -> None:
        """Write no more."""
        for stream in self._streams:
            stream.cancel()

    async def _merged(self) -> AsyncIterator[Reply]:
        for stream in self._streams:
            first = await anext(stream)
            if isinstance(first, Started):
                self.started.append(first)
            yield first
        waiting = {asyncio.ensure_future(anext(s)): i for i, s in enumerate(self._streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number = waiting.pop(task)
                    try:
                        reply = task.result()
                    except StopAsyncIteration:
                        continue
                    following = asyncio.ensure_future(anext(self._streams[number]))
                    waiting[following] = number
                    yield _shifted(reply, number * self._choices)
        finally:
            for task in waiting:
                task.cancel()


def _shifted(reply: Reply, by: int) -> Reply:
    if isinstance(reply, Written | Said):
        return dataclasses.replace(reply, choice=reply.choice + by)
    return reply
