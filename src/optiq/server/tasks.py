"""Jobs in the engine process: from what was asked to what a step gave.

The functions at the end are all that knows how the engine is called.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar, cast

import numpy as np

from optiq.engine.asking import Asked
from optiq.engine.engine import Generation
from optiq.engine.events import Event, Finished, TokenLogprob, Tokens
from optiq.engine.messages import ChatOptions, Message
from optiq.errors import (
    ContextExceeded,
    EngineFailure,
    OptiqError,
    RequestRejected,
    UsageError,
)
from optiq.server.jobs import (
    Counted,
    CountJob,
    Detokenized,
    DetokenizeJob,
    Embedded,
    EmbedJob,
    GenerateJob,
    Job,
    Piece,
    Reply,
    Said,
    Started,
    Written,
)
from optiq.server.messages import Failure, Part, Value
from optiq.server.shelf import Loaded

_LOG: Final = logging.getLogger(__name__)
_TINY: Final = 1e-12
_ARGUMENTS: Final = tuple(
    field.name
    for field in dataclasses.fields(Asked)
    if field.name not in {"prompt", "images", "tools"}
)
"""Arguments of `Engine.generate` that are fields of a job."""


T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work that stops now and then, so that others can go on, and what comes of it."""


class Task(Protocol):
    """A job that is being done.

    Attributes:
        number: of the job.
        loaded: its model.
    """

    number: int
    loaded: Loaded

    def collect(self) -> Part | None:
        """What there is since the last time; None if that is nothing.

        Raises:
            OptiqError: if the job has failed.
        """
        ...

    def cancel(self) -> None:
        """Do no more."""
        ...


def model_of(job: Job) -> str:
    """Name of the model that a job needs."""
    return job.prompt.model if isinstance(job, CountJob) else job.model


def begun(number: int, job: Job, loaded: Loaded) -> Task:
    """A job, begun.

    Raises:
        OptiqError: if it cannot be done.
    """
    match job:
        case GenerateJob():
            return Writing(number, job, loaded)
        case EmbedJob():
            return Reading(number, _embedded(loaded, job), loaded)
        case CountJob():
            return Reading(number, _done(_counted(loaded, job.prompt)), loaded)
        case DetokenizeJob():
            return Reading(number, _done(_detokenized(loaded, job)), loaded)


def failure_of(error: BaseException) -> Failure:
    """What ends a request, as an error that can cross the pipe."""
    match error:
        case RequestRejected():
            return error
        case ContextExceeded():
            return RequestRejected(str(error), code="context_length_exceeded")
        case UsageError():
            return RequestRejected(str(error))
        case OptiqError():
            _LOG.error("a request failed: %s", error, exc_info=error.__cause__)
            return EngineFailure(str(error))
    _LOG.error("a request failed", exc_info=error)
    return EngineFailure(f"the engine failed at this request ({type(error).__name__}: {error})")


class Writing:
    """Answers of one prompt."""

    def __init__(self, number: int, job: GenerateJob, loaded: Loaded) -> None:
        self.number, self.loaded = number, loaded
        self._going = dict(enumerate(_generations(loaded, job)))
        self._start: Steps[Started] | None = _start(loaded, job, self._going[0].prompt)

    def collect(self) -> Part | None:
        """See `Task`."""
        replies: list[Reply] = []
        if self._start is not None:
            started = _advanced(self._start)
            if started is None:
                return None
            replies.append(started)
            self._start = None
        for choice, generation in list(self._going.items()):
            events = generation.pending()
            for event in events:
                replies.append(self._reply(choice, event))
            if events and isinstance(events[-1], Finished):
                del self._going[choice]
        if not replies:
            return None
        return Part(self.number, tuple(replies), ended=not self._going)

    def _reply(self, choice: int, event: Event) -> Reply:
        if isinstance(event, Tokens):
            return Written(choice, _pieces(self.loaded, event))
        return Said(choice, event)

    def cancel(self) -> None:
        """See `Task`."""
        for generation in self._going.values():
            generation.cancel()


class Reading:
    """A job of one reply, which is made in steps between which answers go on."""

    def __init__(self, number: int, steps: Steps[Value], loaded: Loaded) -> None:
        self.number, self.loaded, self._steps = number, loaded, steps

    def collect(self) -> Part | None:
        """See `Task`."""
        value = _advanced(self._steps)
        return None if value is None else Part(self.number, (value,), ended=True)

    def cancel(self) -> None:
        """See `Task`."""
        self._steps.close()


def _done(result: T) -> Steps[T]:
    """Steps that are over."""
    yield from ()
    return result  # noqa: B901  the result of the steps


def _advanced(steps: Steps[T]) -> T | None:
    """The result of steps after one more of them; None while it is not there."""
    try:
        next(steps)
    except StopIteration as end:
        result: T = end.value
        return result
    return None


def _pieces(loaded: Loaded, event: Tokens) -> tuple[Piece, ...]:
    """Tokens of an answer with their bytes."""
    if not event.logprobs:
        return _plain(loaded, event.ids)
    return tuple(_scored(loaded, one) for one in event.logprobs)


def _plain(loaded: Loaded, tokens: Sequence[int]) -> tuple[Piece, ...]:
    bytes_of = loaded.pieces.bytes_of
    return tuple(Piece(token, bytes_of(token)) for token in tokens)


def _scored(loaded: Loaded, one: TokenLogprob) -> Piece:
    bytes_of = loaded.pieces.bytes_of
    top = tuple((token, bytes_of(token), logprob) for token, logprob in one.top)
    return Piece(one.token, bytes_of(one.token), one.logprob, top)


# -- how the engine is called ----------------------------------------------------------------------


def _generations(loaded: Loaded, job: GenerateJob) -> Sequence[Generation]:
    """The answers of a job, one a choice."""
    _check_length(loaded, job)
    arguments = {name: getattr(job, name) for name in _ARGUMENTS} | dict(job.sampling)
    return loaded.engine.generate_choices(
        _prompt(job), job.images, job.tools, choices=job.choices, **arguments
    )


def _prompt(job: GenerateJob) -> str | Sequence[int] | Sequence[Message]:
    """The prompt, of which no message names a picture: a path would be read."""
    if isinstance(job.prompt, tuple):
        for message in job.prompt:
            if isinstance(message, Mapping):
                _check_parts(message.get("content"))
    return job.prompt


def _check_parts(content: Any) -> None:  # noqa: ANN401  of a message
    for part in content if isinstance(content, list | tuple) else ():
        if isinstance(part, Mapping) and part.keys() & {"image", "image_url"}:
            raise RequestRejected("an image part names a picture; give it with the job")


def _check_length(loaded: Loaded, job: GenerateJob) -> None:
    """Refuse what cannot fit before it is put into tokens, which takes time that others need."""
    context = loaded.engine.context
    if context is None:
        return
    size = len(job.prompt.encode()) if isinstance(job.prompt, str) else _text_bytes(job.prompt)
    least = size // loaded.longest_token_bytes
    if least >= context:
        raise ContextExceeded(
            f"the prompt has {size} bytes, which are {least} tokens at least, and the context of "
            f"the model is {context}; shorten it"
        )


def _text_bytes(value: Any) -> int:  # noqa: ANN401  any JSON value
    """Bytes of all texts in messages; a token id counts as one that is short."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "replace"))
    if isinstance(value, Mapping):
        return sum(_text_bytes(one) for one in value.values())
    return sum(_text_bytes(one) for one in value) if isinstance(value, list | tuple) else 0


def _start(loaded: Loaded, job: GenerateJob, tokens: tuple[int, ...]) -> Steps[Started]:
    """The beginning of the answers."""
    if not job.echo:
        return _done(Started(len(tokens)))
    if not job.sampling.get("logprobs"):
        return _done(Started(len(tokens), _plain(loaded, tokens)))
    return _echo(loaded, job, tokens)


def _echo(loaded: Loaded, job: GenerateJob, tokens: tuple[int, ...]) -> Steps[Started]:
    """The prompt with its log-probabilities."""
    engine = loaded.engine
    top = job.sampling.get("top_logprobs") or 0
    scores = yield from engine.prompt_logprob_steps(tokens, job.images, top=top)
    pieces = [
        *_plain(loaded, tokens[:1]),
        *(_scored(loaded, one) for one in scores if one is not None),
    ]
    return Started(len(tokens), tuple(pieces))  # noqa: B901  the result of the steps


def _counted(loaded: Loaded, job: GenerateJob) -> Value:
    _check_length(loaded, job)
    prompts, prompt = loaded.engine.prompts, _prompt(job)
    if isinstance(prompt, str):
        tokens = prompts.raw(prompt, job.images, job.image_detail).tokens
    elif prompt and isinstance(prompt[0], int):
        tokens = tuple(cast("Sequence[int]", prompt))
    else:
        options = ChatOptions(job.tools, job.thinking, job.continue_final)
        messages = cast("Sequence[Message]", prompt)
        tokens = prompts.chat(messages, options, job.images, job.image_detail).tokens
    return Counted(_plain(loaded, tokens), len(tokens))


def _detokenized(loaded: Loaded, job: DetokenizeJob) -> Value:
    size = loaded.engine.vocab_size
    wrong = [token for token in job.tokens if not 0 <= token < size]
    if wrong:
        raise RequestRejected(f"token id {wrong[0]} is not 0 to {size - 1}", param="tokens")
    return Detokenized(loaded.pieces.decode(job.tokens))


def _embedded(loaded: Loaded, job: EmbedJob) -> Steps[Value]:
    engine = loaded.engine
    vectors = yield from engine.embed_steps(job.inputs)
    count = sum(
        len(engine.prompts.plain(one)) if isinstance(one, str) else len(one) for one in job.inputs
    )
    short = tuple(_shortened(vector, job.dimensions) for vector in vectors)
    return Embedded(short, count)  # noqa: B901  the result of the steps


def _shortened(vector: np.ndarray, dimensions: int | None) -> tuple[float, ...]:
    """The first numbers of a vector, of length 1 again."""
    if dimensions is not None and not 1 <= dimensions <= len(vector):
        raise RequestRejected(
            f"dimensions is {dimensions}; give 1 to {len(vector)}", param="dimensions"
        )
    part = vector[:dimensions]
    return tuple((part / max(float(np.linalg.norm(part)), _TINY)).tolist())
