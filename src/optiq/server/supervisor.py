"""Keeps an engine process running and answers for it: the real `service.Service`.

All of it runs in one event loop. A request that was taken ends in exactly one way, whatever
happens to the engine process; that is decided here and nowhere else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import deque
from collections.abc import Sequence
from typing import Final, Literal, TypeVar

from optiq.errors import EngineFailure, OptiqError, RequestRejected, UsageError
from optiq.events import Emit, Notice, no_emit
from optiq.server import messages
from optiq.server.answers import Answer, Outcome
from optiq.server.catalog import Catalog
from optiq.server.child import COMMAND, Child
from optiq.server.counts import Counts, Snapshot
from optiq.server.jobs import (
    Counted,
    CountJob,
    Detokenized,
    DetokenizeJob,
    Embedded,
    EmbedJob,
    GenerateJob,
    Job,
    ModelCard,
    Written,
)
from optiq.server.messages import (
    Begin,
    Broken,
    Cancel,
    Loading,
    Message,
    Models,
    Part,
    Report,
    Setup,
    Told,
    WorkerOptions,
)

_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 8.0
_WATCH_S: Final = 1.0
_ENGINE_KNOWS: Final = frozenset({"finished", "rejected", "failed", "died"})

State = Literal["starting", "ready", "down", "closed"]
T = TypeVar("T", Embedded, Counted, Detokenized)


@dataclasses.dataclass(frozen=True)
class SupervisorOptions:
    """Limits of what is taken and waited for.

    Attributes:
        worker: how the engine process runs.
        max_queue: answers that may wait beside those that one model writes at a time.
        request_timeout_s: from asking to the end of the answer; None for no limit.
        step_timeout_s: longest silence of an engine that has work; then it is taken for hung.
        buffer_bytes: what is kept for one reader, about; who falls further behind is cut off.
        restarts: of the engine process within `restart_window_s`; one more, and it stays down.
        restart_window_s: see there.
    """

    worker: WorkerOptions = dataclasses.field(default_factory=WorkerOptions)
    max_queue: int = 64
    request_timeout_s: float | None = 600.0
    step_timeout_s: float = 300.0
    buffer_bytes: int = 4 << 20
    restarts: int = 5
    restart_window_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse limits under which nothing works."""
        positive = ("step_timeout_s", "buffer_bytes", "restart_window_s", "request_timeout_s")
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name} is {value}; give more than 0")
        if self.max_queue < 0 or self.restarts < 0:
            raise UsageError("max_queue and restarts cannot be less than 0")


class Supervisor:
    """The engine process and the requests to it.

    Args:
        catalog: what is served.
        options: limits.
        emit: receives notices of the engine process, and of its end.
        command: starts the engine process.
    """

    def __init__(
        self,
        catalog: Catalog,
        options: SupervisorOptions | None = None,
        emit: Emit = no_emit,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._catalog, self._options = catalog, options or SupervisorOptions()
        self._emit, self._command = emit, command
        self._state: State = "starting"
        self._why = "the engine process is being started"
        self._draining = False
        self._counts = Counts()
        self._cards: tuple[ModelCard, ...] = ()
        self._known = asyncio.Event()
        self._numbers = itertools.count()
        self._answers: dict[int, Answer] = {}
        self._unsent: dict[int, bytes] = {}
        self._width = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._child: Child | None = None
        self._loading: str | None = None
        self._fault: OptiqError | None = None
        self._lived = False
        self._heard = 0.0
        self._main: asyncio.Task[None] | None = None

    # -- Service ---------------------------------------------------------------------------------

    async def known(self) -> None:
        """Returns when `models` is complete, or the engine process stays down."""
        await self._known.wait()

    def models(self) -> Sequence[ModelCard]:
        """All models that can be named, the default one first; none before the first start."""
        return self._cards

    def resolve(self, name: str | None) -> str:
        """The model that a request means; None and `default_model` mean the first.

        Raises:
            RequestRejected: 404, if there is none of that name.
        """
        return self._catalog.resolve(name)

    def submit(self, job: GenerateJob) -> Answer:
        """Begin a job; it is queued when this returns.

        Raises:
            RequestRejected: 429 with `retry_after_s` if the queue is full; 503 if there is no
                engine, nor will be.
        """
        return self._submit(job)

    async def embed(self, job: EmbedJob) -> Embedded:
        """Embed texts. Raises as `submit` and `Stream` do."""
        return await self._value(job, Embedded)

    async def count(self, job: CountJob) -> Counted:
        """Put a prompt into tokens. Raises as `submit` and `Stream` do."""
        return await self._value(job, Counted)

    async def detokenize(self, job: DetokenizeJob) -> Detokenized:
        """Put tokens into text. Raises as `submit` and `Stream` do."""
        return await self._value(job, Detokenized)

    # -- its life --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine process; returns when the default model is ready.

        Requests may come before that; they wait.

        Raises:
            UsageError: if what is to be served cannot be.
            EngineFailure: if the engine process ends before it is ready.
        """
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._main = asyncio.create_task(self._run(started))
        await asyncio.wait({started, self._main}, return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            self._main.result()
            raise self._fault or EngineFailure(self._why)

    def ready(self) -> tuple[bool, str]:
        """Whether a request would be worked on now, and if not, why."""
        if self._draining:
            return False, "the server is shutting down"
        return self._state == "ready", "ready" if self._state == "ready" else self._why

    def snapshot(self) -> Snapshot:
        """Counters and gauges."""
        running = sum(answer.begun for answer in self._answers.values())
        return self._counts.snapshot(
            queued=len(self._answers) - running,
            running=running,
            loaded=tuple(card.name for card in self._cards if card.loaded),
        )

    async def drain(self, seconds: float) -> int:
        """Take no more requests and let those that were taken end; how many had to be cut off."""
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            pass
        left = list(self._answers.values())
        for answer in left:
            self._settle(answer, "cut", _shutting_down())
        return len(left)

    async def close(self) -> None:
        """End the engine process, and what is left of the requests."""
        self._draining = True
        for answer in list(self._answers.values()):
            self._settle(answer, "cut", _shutting_down())
        self._state, self._why = "closed", "the server has been shut down"
        if self._child is not None:
            self._child.kill()
        if self._main is not None:
            self._main.cancel()
            await asyncio.wait({self._main})

    # -- requests --------------------------------------------------------------------------------

    def _submit(self, job: Job) -> Answer:
        self._counts.submitted += 1
        loop = asyncio.get_running_loop()
        width = job.choices if isinstance(job, GenerateJob) else 1
        answer = Answer(next(self._numbers), width, self._cancelled)
        try:
            self._check_room()
            frame = _packed(Begin(answer.number, job))
        except RequestRejected as error:
            refused = error.http_status in {429, 503}
            self._counts.outcome("refused" if refused else "rejected", loop.time())
            raise
        if not self._answers:
            self._heard = loop.time()  # it had nothing to say before
        self._answers[answer.number] = answer
        self._width += width
        self._empty.clear()
        if self._options.request_timeout_s is not None:
            answer.timer = loop.call_later(self._options.request_timeout_s, self._late, answer)
        if self._child is None:
            self._unsent[answer.number] = frame
        else:
            self._child.send(frame)
        return answer

    def _check_room(self) -> None:
        """Refuse a request that would wait for too long, or for ever."""
        if self._draining:
            raise _shutting_down()
        if self._state in {"down", "closed"}:
            raise RequestRejected(self._why, http_status=503, code="engine_down")
        waiting = self._width - self._options.worker.limits.running
        if self._width and waiting >= self._options.max_queue:
            raise RequestRejected(
                f"{max(waiting, 0)} answers wait already, and {self._options.max_queue} may; try "
                "again later",
                http_status=429,
                code="queue_full",
                retry_after_s=self._counts.wait_s(max(waiting, 1)),
            )

    async def _value(self, job: Job, kind: type[T]) -> T:
        """The one reply of a job."""
        answer = self._submit(job)
        try:
            value = await answer.next()
        finally:
            answer.cancel()
        assert isinstance(value, kind)
        return value

    def _cancelled(self, answer: Answer) -> None:
        self._settle(answer, "cancelled")

    def _late(self, answer: Answer) -> None:
        seconds = self._options.request_timeout_s
        error = RequestRejected(
            f"the answer was not complete after {seconds:g} s; ask for less, or raise the limit",
            http_status=504,
            code="timeout",
        )
        self._settle(answer, "timeout", error)

    def _settle(self, answer: Answer, outcome: Outcome, error: OptiqError | None = None) -> None:
        """The end of a request; only the first one counts."""
        if answer.outcome is not None:
            return
        del self._answers[answer.number]
        unsent = self._unsent.pop(answer.number, None)
        self._width -= answer.width
        answer.end(outcome, error)
        self._counts.outcome(outcome, asyncio.get_running_loop().time())
        if self._child is not None and unsent is None and outcome not in _ENGINE_KNOWS:
            self._child.send(messages.packed(Cancel(answer.number)))
        if not self._answers:
            self._empty.set()

    # -- the engine process ----------------------------------------------------------------------

    async def _run(self, started: asyncio.Future[None]) -> None:
        """Engine processes, one after the other."""
        loop = asyncio.get_running_loop()
        ends: deque[float] = deque()
        while True:
            try:
                how = await self._one_life(started)
            except Exception as error:  # noqa: BLE001  requests must end whatever it is
                how = f"{type(error).__name__}: {error}"
            ends.append(loop.time())
            while self._lived and ends[0] < loop.time() - self._options.restart_window_s:
                ends.popleft()
            self._why = f"the engine process ended ({how})"
            again = "; send the request again"
            if not started.done() or len(ends) > self._options.restarts:
                self._state, again = "down", ""
                self._known.set()
                times = f", {len(ends)} times by now" if len(ends) > 1 else ""
                self._why += f"{times}; start the server again"
                self._unsent.clear()
            lost = [one for one in self._answers.values() if one.number not in self._unsent]
            for answer in lost:
                self._settle(answer, "died", EngineFailure(self._why + again))
            if self._state == "down":
                self._emit(Notice(self._why, "warning"))
                return
            self._why += " and is being started again"
            self._emit(Notice(self._why, "warning"))
            pause = 0 if len(ends) == 1 else _FIRST_PAUSE_S * 2 ** (len(ends) - 2)
            await asyncio.sleep(min(pause, _LONGEST_PAUSE_S))
            self._counts.restarts += 1

    async def _one_life(self, started: asyncio.Future[None]) -> str:
        """An engine process from its start to its end; how it ended."""
        self._fault, self._loading, self._lived = None, None, False
        child = self._child = await Child.start(self._command)
        self._heard = asyncio.get_running_loop().time()
        watch = asyncio.create_task(self._watch(child))
        try:
            child.send(messages.packed(Setup(self._catalog.entries, self._options.worker)))
            for frame in self._unsent.values():
                child.send(frame)
            self._unsent.clear()
            while (message := await child.receive()) is not None:
                self._heard = asyncio.get_running_loop().time()
                self._hear(message, started)
        finally:
            self._child = None  # what comes from now on is for the next one
            if self._state == "ready":
                self._state, self._why = "starting", "the engine process has ended"
            self._cards = tuple(dataclasses.replace(card, loaded=False) for card in self._cards)
            watch.cancel()
            how = await child.ended()
        return how if self._fault is None else str(self._fault)

    def _hear(self, message: Message, started: asyncio.Future[None]) -> None:
        match message:
            case Report(parts, load):
                self._loading = None
                for part in parts:
                    self._take(part)
                if load is not None:
                    self._counts.load(load)
            case Models(cards):
                self._cards, self._loading, self._state = cards, None, "ready"
                self._lived = True
                self._known.set()
                self._catalog = self._catalog.only({card.name for card in cards})
                if not started.done():
                    started.set_result(None)
            case Loading(model):
                self._loading = model
                self._why = f"model {model!r} is being loaded"
            case Told(notice):
                self._emit(notice)
            case Broken(error):
                self._fault = error

    def _take(self, part: Part) -> None:
        """What a step gave for one request."""
        answer = self._answers.get(part.number)
        if answer is None:
            return  # it was cancelled, and the engine did not know yet
        kept_bytes = 0
        for reply in part.replies:
            self._counts.reply(reply)
            kept_bytes = answer.put(reply)
            answer.begun = answer.begun or isinstance(reply, Written)
        if part.error is not None:
            refused = isinstance(part.error, RequestRejected)
            self._settle(answer, "rejected" if refused else "failed", part.error)
        elif part.ended:
            self._settle(answer, "finished")
        elif kept_bytes > self._options.buffer_bytes:
            error = RequestRejected(
                f"slow reader: {kept_bytes} bytes of the answer wait to be read, and "
                f"{self._options.buffer_bytes} may",
                http_status=408,
                code="slow_reader",
            )
            self._settle(answer, "slow_reader", error)

    async def _watch(self, child: Child) -> None:
        """Kill an engine process that has work and says nothing."""
        loop = asyncio.get_running_loop()
        while True:
            limit = self._options.step_timeout_s
            pause = min(limit / 8, _WATCH_S)
            planned = loop.time() + pause
            await asyncio.sleep(pause)
            if loop.time() > planned + max(pause, _WATCH_S):
                self._heard = loop.time()  # this process was stopped itself
            silent = loop.time() - self._heard
            busy = self._state == "ready" and self._loading is None and bool(self._answers)
            if busy and silent > limit:
                self._fault = EngineFailure(f"a step took more than {silent:.0f} s")
                child.kill()
                return


def _packed(begin: Begin) -> bytes:
    try:
        return messages.packed(begin)
    except RecursionError:
        raise RequestRejected("the request is nested too deeply; make it flatter") from None


def _shutting_down() -> RequestRejected:
    return RequestRejected(
        "the server is shutting down", http_status=503, code="shutting_down", retry_after_s=5
    )
