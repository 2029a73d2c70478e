"""Jobs in the engine process: from what was asked to what a step gave.

The functions at the end are all that knows how the engine is called.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, cast

from optiq.engine.engine import Generation
from optiq.engine.events import Event, Finished, Tokens
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
_ARGUMENTS: Final = {
    "thinking": False,
    "thinking_budget": None,
    "continue_final": False,
    "image_detail": None,
    "tool_choice": "auto",
    "function": None,
    "parallel_tool_calls": True,
    "grammar": None,
}
"""Arguments of `Engine.generate` that are fields of a job, and what they are by default."""


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
            return Embedding(number, job, loaded)
        case CountJob():
            return Reading(number, _counted(loaded, job.prompt), loaded)
        case DetokenizeJob():
            return Reading(number, _detokenized(loaded, job), loaded)


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
        self._started: Started | None = _started(loaded, job, self._going[0])

    def collect(self) -> Part | None:
        """See `Task`."""
        replies: list[Reply] = []
        if self._started is not None:
            replies.append(self._started)
            self._started = None
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


class Embedding:
    """Texts to embed, one between two steps, so that answers go on."""

    def __init__(self, number: int, job: EmbedJob, loaded: Loaded) -> None:
        self.number, self.loaded, self._job = number, loaded, job
        self._vectors: list[tuple[float, ...]] = []
        self._num_tokens = 0

    def collect(self) -> Part | None:
        """See `Task`."""
        rest = self._job.inputs[len(self._vectors) :]
        if rest:
            vector, num_tokens = _embedded(self.loaded, rest[0], self._job.dimensions)
            self._vectors.append(vector)
            self._num_tokens += num_tokens
            if len(rest) > 1:
                return None
        value = Embedded(tuple(self._vectors), self._num_tokens)
        return Part(self.number, (value,), ended=True)

    def cancel(self) -> None:
        """Nothing goes on by itself."""


class Reading:
    """Something that is known at once."""

    def __init__(self, number: int, value: Value, loaded: Loaded) -> None:
        self.number, self.loaded, self._value = number, loaded, value

    def collect(self) -> Part | None:
        """See `Task`."""
        return Part(self.number, (self._value,), ended=True)

    def cancel(self) -> None:
        """Nothing goes on by itself."""


def _pieces(loaded: Loaded, event: Tokens) -> tuple[Piece, ...]:
    """Tokens of an answer with their bytes."""
    bytes_of = loaded.pieces.bytes_of
    if not event.logprobs:
        return tuple(Piece(token, bytes_of(token)) for token in event.ids)
    return tuple(
        Piece(
            one.token,
            bytes_of(one.token),
            one.logprob,
            tuple((token, bytes_of(token), logprob) for token, logprob in one.top),
        )
        for one in event.logprobs
    )


# -- how the engine is called ----------------------------------------------------------------------


def _generations(loaded: Loaded, job: GenerateJob) -> Sequence[Generation]:
    """The answers of a job, one a choice."""
    _check_length(loaded, job)
    prompt: Any = _prompt(job)
    arguments = _arguments(job) | dict(job.sampling)
    generate = loaded.engine.generate
    out: list[Generation] = []
    try:
        for choice in range(job.choices):
            out.append(generate(prompt, job.images, job.tools, choice=choice, **arguments))
    except BaseException:
        for generation in out:
            generation.cancel()
        raise
    return out


def _arguments(job: GenerateJob) -> dict[str, Any]:
    """Arguments of `Engine.generate` that are not as it has them by default."""
    given = {name: getattr(job, name) for name in _ARGUMENTS}
    return {name: value for name, value in given.items() if value != _ARGUMENTS[name]}


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


def _started(loaded: Loaded, job: GenerateJob, generation: Generation) -> Started:
    """The beginning of the answers."""
    tokens = generation.prompt
    if not job.echo:
        return Started(len(tokens))
    if job.sampling.get("logprobs"):
        raise RequestRejected("echo with logprobs is not served", param="echo")
    bytes_of = loaded.pieces.bytes_of
    return Started(len(tokens), tuple(Piece(token, bytes_of(token)) for token in tokens))


def _counted(loaded: Loaded, job: GenerateJob) -> Counted:
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
    bytes_of = loaded.pieces.bytes_of
    return Counted(tuple(Piece(token, bytes_of(token)) for token in tokens), len(tokens))


def _detokenized(loaded: Loaded, job: DetokenizeJob) -> Detokenized:
    size = loaded.engine.vocab_size
    wrong = [token for token in job.tokens if not 0 <= token < size]
    if wrong:
        raise RequestRejected(f"token id {wrong[0]} is not 0 to {size - 1}", param="tokens")
    return Detokenized(loaded.pieces.decode(job.tokens))


def _embedded(
    loaded: Loaded, text: str | tuple[int, ...], dimensions: int | None
) -> tuple[tuple[float, ...], int]:
    """Embedding of one text, and its tokens."""
    embed = getattr(loaded.engine, "embed", None)
    if embed is None:
        raise RequestRejected("this engine does not embed", code="unsupported")
    vectors, num_tokens = embed([text], dimensions=dimensions)
    return tuple(vectors[0]), num_tokens
