"""Typed progress events, and renderers: a progress bar, plain lines or JSON lines.

An `Emit` is any callable that takes an event. `no_emit` drops them, which is the default of the
Python API.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Literal, Protocol, TypeVar


@dataclasses.dataclass(frozen=True)
class StageStarted:
    """A stage begins; `total` units of work are known, or 0."""

    stage: str
    total: int = 0
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Progress:
    """`done` units of the stage are finished."""

    stage: str
    done: int
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class StageDone:
    """A stage ended; `reused` when its artifact was already there."""

    stage: str
    reused: bool = False
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number worth showing."""

    name: str
    value: float
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Notice:
    """A sentence for the user."""

    text: str
    level: Literal["info", "warning"] = "info"


Event = StageStarted | Progress | StageDone | Metric | Notice
Emit = Callable[[Event], None]


def no_emit(event: Event) -> None:
    """Drop an event."""


T = TypeVar("T")


def track(items: Iterable[T], emit: Emit, stage: str, total: int, unit: str = "") -> Iterator[T]:
    """Yield the items of a stage and emit its start, its progress and its end."""
    emit(StageStarted(stage, total, unit))
    for done, item in enumerate(items):
        yield item
        emit(Progress(stage, done + 1))
    emit(StageDone(stage))


class Renderer(Protocol):
    """Shows events; used as a context manager around a run."""

    def __enter__(self) -> Emit: ...

    def __exit__(self, *exc: object) -> None: ...


class JsonRenderer:
    """One JSON object a line: the event's fields, its type and seconds since the start."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._start = time.monotonic()

    def __enter__(self) -> Emit:
        return self.emit

    def __exit__(self, *exc: object) -> None:
        self._stream.flush()

    def emit(self, event: Event) -> None:
        """Write one line."""
        record: dict[str, Any] = {
            "event": type(event).__name__,
            "time_s": round(time.monotonic() - self._start, 3),
        }
        self._stream.write(json.dumps(record | dataclasses.asdict(event)) + "\n")
        self._stream.flush()


class _Writable(Protocol):
    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


class PlainRenderer:
    """Lines without control characters; progress with ETA, at most every `every_s` seconds.

    The ETA counts what was done since the first progress: a resumed stage starts part done.
    """

    def __init__(self, stream: _Writable, every_s: float = 10.0) -> None:
        self._stream = stream
        self._every_s = every_s
        self._started: dict[str, tuple[float, int]] = {}
        self._before: dict[str, int] = {}
        self._last = 0.0

    def __enter__(self) -> Emit:
        return self.emit

    def __exit__(self, *exc: object) -> None:
        self._stream.flush()

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def emit(self, event: Event) -> None:
        """Write a line, or hold it back when the last one is recent."""
        now = time.monotonic()
        match event:
            case StageStarted(stage, total, _):
                self._started[stage] = (now, total)
                self._before.pop(stage, None)
                self._last = now
            case Progress(stage, done, detail):
                start, total = self._started.get(stage, (now, 0))
                before = self._before.setdefault(stage, done - 1)
                if now - self._last >= self._every_s and 0 < done < total:
                    self._last = now
                    eta = (now - start) / max(1, done - before) * (total - done)
                    self._line(f"  {stage}: {done}/{total}, {eta:.0f} s left {detail}".rstrip())
            case StageDone(stage, reused, detail):
                start, _ = self._started.pop(stage, (now, 0))
                how = "from an earlier run" if reused else f"{now - start:.1f} s"
                self._line(f"{stage}: {how}{', ' + detail if detail else ''}")
            case Metric(name, value, unit):
                self._line(f"{name}: {value:.4g} {unit}".rstrip())
            case Notice(text, level):
                self._line(f"warning: {text}" if level == "warning" else text)


class RichRenderer:
    """A progress bar with ETA in the terminal."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415  0.1 s, only in a terminal
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
        from rich.progress import Progress as Bar  # noqa: PLC0415

        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=self._console, transient=True)
        self._tasks: dict[str, Any] = {}
        self._lines = PlainRenderer(_ConsoleStream(self._console), every_s=float("inf"))

    def __enter__(self) -> Emit:
        self._bar.start()
        return self.emit

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def emit(self, event: Event) -> None:
        """Update the bar; print the line of what ended."""
        match event:
            case StageStarted(stage, total, _):
                self._tasks[stage] = self._bar.add_task(stage, total=total or None)
            case Progress(stage, done, _) if stage in self._tasks:
                self._bar.update(self._tasks[stage], completed=done)
            case StageDone(stage, _, _) if stage in self._tasks:
                self._bar.remove_task(self._tasks.pop(stage))
            case _:
                pass
        self._lines.emit(event)


class _ConsoleStream:
    """A text stream over a rich console, so that lines appear above the bar."""

    def __init__(self, console: Any) -> None:  # noqa: ANN401  rich is imported late
        self._console = console

    def write(self, text: str) -> None:
        self._console.print(text, end="", highlight=False, markup=False)

    def flush(self) -> None:
        self._console.file.flush()
