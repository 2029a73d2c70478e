"""The engine process: one thread owns the models, another listens to the pipe.

It is started as `python -m optiq.server.worker FD`, where FD is its end of a pair of sockets, and
ends when the other end is closed, however that came about. Signals are the business of the process
that started it.

Between two steps the owner takes what has come: new jobs, in their order, and jobs to leave. Then
every model writes one step, and one message carries all that the step gave. Making tokens of a
prompt holds Python's lock, so that a thread of its own would not help: it is done between steps,
for as many new jobs as fit into a fraction of a second.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NoReturn

from optiq.backend import mx
from optiq.errors import EngineFailure, OptiqError, UsageError
from optiq.events import Event, Notice
from optiq.server import messages
from optiq.server.messages import (
    Begin,
    Broken,
    Cancel,
    Load,
    Loading,
    Message,
    Models,
    Order,
    Part,
    Report,
    Setup,
    Told,
    Turn,
)
from optiq.server.shelf import Shelf
from optiq.server.tasks import Task, begun, failure_of, model_of

_LOG: Final = logging.getLogger(__name__)
_BEGIN_S: Final = 0.02  # of a step, for new jobs, while others write
_BEAT_S: Final = 1.0  # between signs of life


class Pipe:
    """The engine's end of the pair of sockets."""

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._file = end, end.makefile("rb")
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Hand over a message; the other end always reads."""
        with self._lock:
            self._socket.sendall(messages.packed(message))

    def receive(self) -> Order | Turn | None:
        """The next message; None when the other end is closed."""
        try:
            header = self._file.read(messages.HEADER_BYTES)
            data = self._file.read(messages.length_of(header))
        except ConnectionError:
            return None
        whole = len(header) == messages.HEADER_BYTES and len(data) == messages.length_of(header)
        order: Order | Turn | None = messages.unpacked(data) if whole else None
        return order


class Worker:
    """Does jobs, step by step.

    Args:
        shelf: the models.
        inbox: where orders come in.
        send: takes messages.
    """

    def __init__(
        self, shelf: Shelf, inbox: queue.SimpleQueue[Order], send: Callable[[Message], None]
    ) -> None:
        self._shelf, self._inbox, self._send = shelf, inbox, send
        self._waiting: deque[Begin] = deque()
        self._tasks: dict[int, Task] = {}
        self._parts: list[Part] = []
        self._meter = _Meter()
        self._num_changes = 0

    def ready(self) -> None:
        """Load the default model, and say that jobs can come.

        Raises:
            OptiqError: if it cannot be loaded.
        """
        self._shelf.load(self._shelf.default)
        self._tell_models()

    def turn(self) -> None:
        """Take what has come, run one step of every model, report."""
        self._take()
        self._begin()
        self._step()
        self._collect()
        self._report()

    # -- taking ----------------------------------------------------------------------------------

    def _take(self) -> None:
        """Obey what has come."""
        for order in self._received():
            self._obey(order)
        self._shelf.unload_idle()

    def _received(self) -> list[Order]:
        """Everything in the inbox; waits while there is nothing to do."""
        busy = bool(self._tasks or self._waiting)
        orders: list[Order] = []
        try:
            if not busy:
                left = self._shelf.idle_left_s()
                orders.append(self._inbox.get(timeout=None if left is None else max(left, 0)))
            while True:
                orders.append(self._inbox.get_nowait())
        except queue.Empty:
            return orders

    def _obey(self, order: Order) -> None:
        if isinstance(order, Begin):
            self._waiting.append(order)
        elif isinstance(order, Cancel):
            self._waiting = deque(one for one in self._waiting if one.number != order.number)
            task = self._tasks.get(order.number)
            if task is not None:
                task.cancel()
                self._drop(task)

    def _begin(self) -> None:
        """Jobs that wait, in order, up to one whose model has no room yet."""
        others = bool(self._tasks)
        start, count = time.monotonic(), 0
        while self._waiting and not (others and self._is_enough(count, start)):
            begin, count = self._waiting[0], count + 1
            try:
                loaded = self._shelf.use(model_of(begin.job))
                if loaded is None:
                    return
                self._add(begun(begin.number, begin.job, loaded))
            except BaseException as error:  # noqa: BLE001  a tokenizer's panic is no Exception
                self._fail(begin.number, error)
            self._waiting.popleft()

    def _is_enough(self, count: int, start: float) -> bool:
        """Whether those that write have waited long enough for new jobs.

        Args:
            count: jobs that were begun.
            start: when the first of them was, on the monotonic clock.
        """
        del count
        return time.monotonic() > start + _BEGIN_S

    def _add(self, task: Task) -> None:
        task.loaded.num_tasks += 1
        self._tasks[task.number] = task

    def _drop(self, task: Task) -> None:
        del self._tasks[task.number]
        task.loaded.num_tasks -= 1
        task.loaded.used_at = time.monotonic()

    def _fail(self, number: int, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        self._parts.append(Part(number, ended=True, error=failure_of(error)))

    # -- working ---------------------------------------------------------------------------------

    def _step(self) -> None:
        """One step of every model that writes."""
        for loaded in self._shelf.loaded:
            if loaded.num_tasks and not loaded.engine.idle:
                start = time.perf_counter()
                loaded.engine.step()
                self._meter.count(time.perf_counter() - start)

    def _collect(self) -> None:
        """What the jobs have given."""
        for task in list(self._tasks.values()):
            try:
                part = task.collect()
            except Exception as error:  # noqa: BLE001  whatever it is belongs to this job
                task.cancel()
                self._drop(task)
                self._fail(task.number, error)
                continue
            if part is not None:
                self._parts.append(part)
                if part.ended:
                    self._drop(task)

    def _report(self) -> None:
        if self._shelf.num_changes != self._num_changes:
            self._tell_models()
        load = self._meter.due(at_once=not self._tasks)
        if self._parts or load is not None:
            self._send(Report(tuple(self._parts), load))
            self._parts.clear()

    def _tell_models(self) -> None:
        self._num_changes = self._shelf.num_changes
        self._send(Models(self._shelf.cards()))


class _Meter:
    """Counts steps until they are reported."""

    def __init__(self) -> None:
        self._steps, self._seconds, self._longest = 0, 0.0, 0.0
        self._reported_at = 0.0

    def count(self, seconds: float) -> None:
        """A step took so long."""
        self._steps += 1
        self._seconds += seconds
        self._longest = max(self._longest, seconds)

    def due(self, *, at_once: bool) -> Load | None:
        """The counts since the last time: now and then, or at once if there are any; else None."""
        now = time.monotonic()
        if now < self._reported_at + _BEAT_S and not (at_once and self._steps):
            return None
        load = Load(
            self._steps,
            self._seconds,
            self._longest,
            mx.get_active_memory(),
            mx.get_peak_memory(),
        )
        self._steps, self._seconds, self._longest = 0, 0.0, 0.0
        self._reported_at = now
        return load


def _listen(pipe: Pipe, inbox: queue.SimpleQueue[Order]) -> None:
    """Put orders into the inbox; the end of the pipe is the end of the process."""
    while (order := pipe.receive()) is not None:
        assert not isinstance(order, Turn)
        inbox.put(order)
    os._exit(0)  # nothing here is worth keeping, and the owner may be in a long step


def _emitter(pipe: Pipe) -> Callable[[Event], None]:
    """Sends notices on; there is nobody to look at progress."""

    def emit(event: Event) -> None:
        if isinstance(event, Notice):
            pipe.send(Told(event))

    return emit


Maker = Callable[[Setup, queue.SimpleQueue[Order], Pipe], Worker]
"""What to serve, where orders come in and the pipe for what is said -> what serves."""


def shelf_of(setup: Setup, pipe: Pipe) -> Shelf:
    """The models of a setup; what there is to say about them goes into the pipe."""
    return Shelf(
        setup.entries, setup.options, _emitter(pipe), lambda name: pipe.send(Loading(name))
    )


def _alone(setup: Setup, inbox: queue.SimpleQueue[Order], pipe: Pipe) -> Worker:
    return Worker(shelf_of(setup, pipe), inbox, pipe.send)


def serve(pipe: Pipe, make: Maker = _alone) -> NoReturn:
    """Do what comes through a pipe, for as long as it is open.

    Args:
        pipe: to the process that started this one.
        make: makes the worker.

    Raises:
        OptiqError: if what is to be served cannot be.
    """
    setup = pipe.receive()
    if not isinstance(setup, Setup):
        raise EngineFailure(f"the first message was {setup!r}; it must say what to serve")
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, inbox), daemon=True).start()
    worker = make(setup, inbox, pipe)
    worker.ready()
    while True:
        worker.turn()


def main(arguments: list[str], make: Maker = _alone) -> NoReturn:
    """The process: serve the pipe whose number is the first argument; see `serve`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    logging.basicConfig(format="%(asctime)s engine %(levelname)s %(message)s")
    pipe = Pipe(socket.socket(fileno=int(arguments[0])))
    try:
        serve(pipe, make)
    except ConnectionError:
        os._exit(0)
    except OptiqError as error:
        kind = UsageError if isinstance(error, UsageError) else EngineFailure
        send_last(pipe, Broken(kind(str(error))))
    except BaseException as error:  # noqa: BLE001  the other end has to know of any
        _LOG.critical("the engine process failed", exc_info=error)
        failure = EngineFailure(f"the engine failed ({type(error).__name__}: {error})")
        send_last(pipe, Broken(failure))
    os._exit(1)  # a thread is waiting at the pipe


def send_last(pipe: Pipe, message: Message) -> None:
    """Say something to a process that may have ended."""
    try:
        pipe.send(message)
    except OSError:
        os._exit(1)  # there is nobody to tell


if __name__ == "__main__":
    main(sys.argv[1:])
