"""What protocols program against: the engine, seen from the HTTP side.

`supervisor.Supervisor` is the real one; tests have one that follows a script.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

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


class Snapshot(Protocol):
    """How the engine does now, and all that it has done: what `/metrics` says of it."""

    @property
    def queued(self) -> int:
        """Jobs of which nothing was written yet."""
        ...

    @property
    def running(self) -> int:
        """Jobs that are worked on."""
        ...

    @property
    def outcomes(self) -> Mapping[Any, int]:
        """Jobs that ended, by how."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Tokens read."""
        ...

    @property
    def completion_tokens(self) -> int:
        """Tokens written."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Tokens of prompts that were found in a cache."""
        ...

    @property
    def drafted_tokens(self) -> int:
        """Tokens that drafters proposed."""
        ...

    @property
    def accepted_tokens(self) -> int:
        """Of these, equal to what was drawn."""
        ...

    @property
    def restarts(self) -> int:
        """Times that the engine process was started again."""
        ...

    @property
    def steps(self) -> int:
        """Steps of the engine."""
        ...

    @property
    def step_seconds(self) -> float:
        """Time that they took in all."""
        ...

    @property
    def active_memory_bytes(self) -> int:
        """Arrays of the engine process."""
        ...

    @property
    def loaded(self) -> Sequence[str]:
        """Names of the models in memory."""
        ...


class Service(Protocol):
    """The engine process."""

    async def known(self) -> None:
        """Returns when `models` is complete, which it is not while the server starts."""
        ...

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

    def ready(self) -> tuple[bool, str]:
        """Whether a job would be worked on at once, and if not, why."""
        ...

    def snapshot(self) -> Snapshot:
        """What goes on."""
        ...


class Managed(Service, Protocol):
    """A service with a beginning and an end; `life` has it in hand."""

    async def start(self) -> None:
        """Load; returns when the default model is ready. Jobs may come before that; they wait.

        Raises:
            UsageError: if what is to be served cannot be.
            EngineFailure: if the engine process ends before it is ready.
        """
        ...

    async def drain(self, seconds: float) -> int:
        """Take no more jobs and let those that were taken end; how many had to be cut off."""
        ...

    async def close(self) -> None:
        """End the engine process, and every job that is left with an error that says so."""
        ...
