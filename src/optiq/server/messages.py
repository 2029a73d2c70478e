"""What goes through the pipe between the HTTP process and the engine process.

A frame is the length of a pickle, eight bytes, and the pickle. Both ends are the same program, and
the pipe has no name that anyone else could open.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from typing import Any, Final

from optiq.engine.scheduler import Limits
from optiq.errors import EngineFailure, RequestRejected, UsageError
from optiq.events import Notice
from optiq.server.catalog import Entry
from optiq.server.jobs import Counted, Detokenized, Embedded, Job, ModelCard, Reply

HEADER_BYTES: Final = 8


@dataclasses.dataclass(frozen=True)
class WorkerOptions:
    """How the engine process runs its models.

    Attributes:
        memory_limit: most bytes of weights of all models together, such as `8GB`; default: four
            fifths of the memory.
        max_context: tokens of prompt and answer at most, where a model could read more.
        idle_unload_s: seconds without a request after which a model is unloaded; None for never.
        limits: of a step of one model.
        engine: further fields of `engine.engine.EngineOptions`.
    """

    memory_limit: str | None = None
    max_context: int | None = None
    idle_unload_s: float | None = None
    limits: Limits = Limits()
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# -- to the engine process -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setup:
    """The first message: what to serve. The first entry is loaded at once."""

    entries: tuple[Entry, ...]
    options: WorkerOptions


@dataclasses.dataclass(frozen=True)
class Begin:
    """A job to do, under a number that no other job has."""

    number: int
    job: Job


@dataclasses.dataclass(frozen=True)
class Cancel:
    """A job to leave, if it has not ended."""

    number: int


Order = Setup | Begin | Cancel


# -- from the engine process of rank 0 to those of the others --------------------------------------


@dataclasses.dataclass(frozen=True)
class Turn:
    """What the leader does next, and so do the followers. Before the first comes the setup.

    Attributes:
        orders: that it has taken.
        tasks: numbers of the jobs that it is doing, before those orders.
    """

    orders: tuple[Order, ...]
    tasks: tuple[int, ...]


# -- from the engine process -----------------------------------------------------------------------

Value = Embedded | Counted | Detokenized
Failure = RequestRejected | EngineFailure


@dataclasses.dataclass(frozen=True)
class Part:
    """What a step gave for one job.

    Attributes:
        number: of the job.
        replies: in order.
        ended: whether nothing more follows.
        error: why it ended, if it failed.
    """

    number: int
    replies: tuple[Reply | Value, ...] = ()
    ended: bool = False
    error: Failure | None = None


@dataclasses.dataclass(frozen=True)
class Load:
    """Measurements since the report before, and the memory in use.

    Attributes:
        steps: that were run.
        step_seconds: time that they took.
        longest_step_s: time of the longest.
        active_memory_bytes: arrays of the engine process.
        peak_memory_bytes: most of them since it started.
    """

    steps: int
    step_seconds: float
    longest_step_s: float
    active_memory_bytes: int
    peak_memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that a step gave; a sign of life where that is nothing."""

    parts: tuple[Part, ...] = ()
    load: Load | None = None


@dataclasses.dataclass(frozen=True)
class Models:
    """The models that can be named, the default one first; sent when something changes.

    The first of them says that the engine process is ready.
    """

    cards: tuple[ModelCard, ...]


@dataclasses.dataclass(frozen=True)
class Loading:
    """A model is read from disk, which takes longer than a step may; `Models` follows."""

    model: str


@dataclasses.dataclass(frozen=True)
class Told:
    """A sentence for the operator."""

    notice: Notice


@dataclasses.dataclass(frozen=True)
class Broken:
    """The last message: why the engine process cannot go on."""

    error: UsageError | EngineFailure


Message = Report | Models | Loading | Told | Broken


def packed(message: Order | Turn | Message) -> bytes:
    """A frame.

    Raises:
        RecursionError: if a value is nested too deeply.
    """
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(HEADER_BYTES, "little") + data


def length_of(header: bytes) -> int:
    """Bytes that follow a header."""
    return int.from_bytes(header, "little")


def unpacked(data: bytes) -> Any:  # noqa: ANN401  Order or Message, by the end of the pipe
    """The message of a frame, without its header."""
    return pickle.loads(data)
