"""What protocols program against: the engine, seen from the HTTP side.

`supervisor.Supervisor` is the real one; tests have one that follows a script.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from optiq.server.jobs import (
    Counted,
    CountJob,
    Detokenized,
    DetokenizeJob,
    Embedded,
    EmbedJob,
    GenerateJob,
    ModelCard,
    Reply,
)


class Stream(Protocol):
    """Answers that are being written.

    Iterating gives `Started` first; after the `Finished` of every choice it ends.

    Raises, while iterating:
        RequestRejected: if the request cannot be honoured (before `Started`), or ran out of time.
        EngineFailure: if the engine failed; nothing more comes.
    """

    def __aiter__(self) -> AsyncIterator[Reply]: ...

    async def __anext__(self) -> Reply: ...

    def cancel(self) -> None:
        """Write no more. May be called at any time, and more than once."""
        ...


class Service(Protocol):
    """The engine process."""

    def models(self) -> Sequence[ModelCard]:
        """All models that can be named, the default one first."""
        ...

    def resolve(self, name: str | None) -> str:
        """The model that a request means; None and `default_model` mean the first.

        Raises:
            RequestRejected: 404, if there is none of that name.
        """
        ...

    def submit(self, job: GenerateJob) -> Stream:
        """Begin a job; it is queued when this returns.

        Raises:
            RequestRejected: 429 with `retry_after_s` if the queue is full; 503 if it is shut down.
        """
        ...

    async def embed(self, job: EmbedJob) -> Embedded:
        """Embed texts. Raises as `submit` and `Stream` do."""
        ...

    async def count(self, job: CountJob) -> Counted:
        """Put a prompt into tokens. Raises as `submit` and `Stream` do."""
        ...

    async def detokenize(self, job: DetokenizeJob) -> Detokenized:
        """Put tokens into text. Raises as `submit` and `Stream` do."""
        ...
