"""/v1/completions: texts to go on with."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from optiq.engine.events import Finished, ReasoningDelta, TextDelta, Usage
from optiq.errors import EngineFailure, RequestRejected
from optiq.server.jobs import GenerateJob, ModelCard, Piece, Reply, Said, Started, Written
from optiq.server.openai import replies
from optiq.server.openai.merged import Merged
from optiq.server.openai.parameters import Count, GenerationBody, TokenId, grammar_of
from optiq.server.openai.routes import card_of, documented
from optiq.server.respond import collected, streamed
from optiq.server.service import Service
from optiq.server.wire import Engine, note_ignored, read

router = APIRouter(tags=["OpenAI"])

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256
_Tokens = Annotated[list[TokenId], Field(min_length=1)]
_Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
_TokenPrompts = Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]


class CompletionBody(GenerationBody):
    """Texts to go on with."""

    refused: ClassVar[dict[str, str]] = {"suffix": "no model here fills a gap; leave it out"}
    refused_values: ClassVar[dict[str, str]] = {
        "best_of other than n": "answers are not ranked; ask for n and choose"
    }

    prompt: str | _Prompts | _Tokens | _TokenPrompts = Field(
        description="A text, token ids, or a list of either; special tokens in it are read as such."
    )
    max_tokens: Count | None = Field(
        default=None, description=f"Tokens of a text at most; {DEFAULT_MAX_TOKENS} without it."
    )
    echo: bool | None = Field(default=None, description="Put the prompt before the text.")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=5,
        description="Report log-probabilities, and of so many likely tokens.",
    )
    best_of: int | None = Field(default=None, ge=1, le=128, description="The same as n.")

    def prompts(self) -> list[str | tuple[int, ...]]:
        """One or more of them."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(token for token in self.prompt if isinstance(token, int))]
        return [one if isinstance(one, str) else tuple(one) for one in self.prompt if one != []]


@router.post(
    "/v1/completions",
    response_model=replies.Completion,
    **documented(CompletionBody, replies.Completion),
)
async def create_completion(request: Request, engine: Engine) -> Response:
    """Go on with one text or several."""
    body = await read(request, CompletionBody)
    if body.reports_usage and not body.stream:
        note_ignored(request, "stream_options.include_usage")  # a whole answer always has it
    if body.best_of not in {None, body.n or 1}:
        raise RequestRejected(
            f"best_of: {body.best_of} answers are not ranked; ask for n and choose", param="best_of"
        )
    card = card_of(engine, body.model)
    jobs = _jobs(body, card)
    merged = Merged(_submitted(engine, jobs), body.n or 1)
    writer = _Writer(body, card, len(jobs))
    if body.stream:
        return await streamed(request, merged, writer.encode, replies.failed)
    _, choices = await collected(request, merged, len(jobs) * (body.n or 1))
    for started in merged.started:
        writer.begin(started)
    completion = replies.Completion(
        **writer.head,
        choices=[
            writer.choice(
                i,
                _text(choice.events),
                choice.pieces,
                replies.completion_finish(choice.finish.reason),
            )
            for i, choice in enumerate(choices)
        ],
        usage=writer.usage([choice.finish.usage for choice in choices]),
    )
    return JSONResponse(replies.dumped(completion))


def _jobs(body: CompletionBody, card: ModelCard) -> list[GenerateJob]:
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = body.sampling(
        max_tokens=limit,
        logprobs=None if body.logprobs is None else True,
        top_logprobs=body.logprobs or None,
    )
    return [
        GenerateJob(
            model=card.name,
            prompt=prompt,
            grammar=grammar_of(body.response_format),
            sampling=sampling,
            choices=body.n or 1,
            echo=bool(body.echo),
        )
        for prompt in body.prompts()
    ]


def _submitted(engine: Service, jobs: Iterable[GenerateJob]) -> list[Any]:
    """Streams of all jobs, or of none if one of them is refused."""
    streams: list[Any] = []
    try:
        for job in jobs:
            streams.append(engine.submit(job))
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    return streams


def _text(events: Iterable[Any]) -> str:
    """A text as the model went on: what it would call thinking is part of it."""
    return "".join(event.text for event in events if isinstance(event, TextDelta | ReasoningDelta))


class _Writer:
    """Writes the texts of one request.

    Answers are numbered through: prompt after prompt, each with its n.
    """

    def __init__(self, body: CompletionBody, card: ModelCard, num_prompts: int) -> None:
        self.head = replies.new_head("cmpl", "text_completion", card.name)
        self._body, self._card = body, card
        self._n = body.n or 1
        self._prompts = body.prompts()
        self._started: list[Started] = []
        count = num_prompts * self._n
        self._pieces: list[list[Piece]] = [[] for _ in range(count)]
        self._usages: list[Usage | None] = [None] * count
        self._offsets: list[_Offsets] = []
        self._echoes: list[tuple[str, replies.LegacyLogprobs | None]] = []

    def begin(self, started: Started) -> range:
        """Note the next prompt that was understood; what comes back are its answers."""
        at = len(self._started)
        self._started.append(started)
        text = _echo(self._prompts[at], started.prompt) if self._body.echo else ""
        offsets = _Offsets(text, started.prompt if self._body.echo else ())
        logprobs = self._logprobs(started.prompt, offsets) if self._body.echo else None
        self._echoes.append((text, logprobs))
        self._offsets += [_Offsets(text) for _ in range(self._n)]
        return range(at * self._n, (at + 1) * self._n)

    def encode(self, reply: Reply) -> list[bytes]:
        """The events of a stream for a reply."""
        match reply:
            case Started():
                indices = self.begin(reply)
                return [self._echo_chunk(i) for i in indices] if self._body.echo else []
            case Written(choice, pieces):
                self._pieces[choice] += pieces
                return []
            case Said(choice, Finished() as finished):
                return self._end(choice, finished)
            case Said(choice, event):
                text = _text([event])
                return [self._chunk(choice, text, None)] if text else []

    def choice(
        self, index: int, text: str, pieces: Sequence[Piece], reason: replies.TextFinish
    ) -> replies.CompletionChoice:
        """A whole text, with its prompt where that is wanted."""
        before, logprobs = self._echoes[index // self._n]
        after = self._logprobs(pieces, self._offsets[index])
        return replies.CompletionChoice(
            index=index,
            text=before + text,
            logprobs=_sum(logprobs, after),
            finish_reason=reason,
        )

    def usage(self, usages: Sequence[Usage]) -> replies.CompletionUsage:
        """The usage of all texts."""
        prompt_tokens = sum(started.prompt_tokens for started in self._started)
        firsts = usages[:: self._n]
        rest = [usage for i, usage in enumerate(usages) if i % self._n]
        return replies.usage_of(self._card, prompt_tokens, firsts, rest)

    def _logprobs(
        self, pieces: Sequence[Piece], offsets: _Offsets
    ) -> replies.LegacyLogprobs | None:
        if self._body.logprobs is None:
            return None
        return replies.LegacyLogprobs(
            text_offset=[offsets.of(piece) for piece in pieces],
            tokens=[_name(piece.data) for piece in pieces],
            token_logprobs=[piece.logprob for piece in pieces],
            top_logprobs=[_top(piece, self._body.logprobs) for piece in pieces],
        )

    def _echo_chunk(self, index: int) -> bytes:
        text, logprobs = self._echoes[index // self._n]
        return self._event(
            replies.CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=None)
        )

    def _chunk(self, index: int, text: str, reason: replies.TextFinish | None) -> bytes:
        pieces, self._pieces[index] = self._pieces[index], []
        logprobs = self._logprobs(pieces, self._offsets[index])
        return self._event(
            replies.CompletionChoice(
                index=index, text=text, logprobs=logprobs, finish_reason=reason
            )
        )

    def _end(self, index: int, finished: Finished) -> list[bytes]:
        self._usages[index] = finished.usage
        events = [self._chunk(index, "", replies.completion_finish(finished.reason))]
        usages = [usage for usage in self._usages if usage is not None]
        if len(usages) < len(self._usages):
            return events
        if self._body.reports_usage:
            last = replies.Completion(**self.head, choices=[], usage=self.usage(usages))
            events.append(replies.event(last))
        return [*events, replies.DONE]

    def _event(self, choice: replies.CompletionChoice) -> bytes:
        rest: dict[str, Any] = {"usage": None} if self._body.reports_usage else {}
        return replies.event(replies.Completion(**self.head, choices=[choice], **rest))


class _Offsets:
    """Where in the text tokens begin, in characters.

    Args:
        before: text that stands before them; or, with `pieces`, the text that they are.
        pieces: tokens of `before`, which may have more at its front: a BOS is no part of a prompt.
    """

    def __init__(self, before: str, pieces: Sequence[Piece] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = len(before)
        if pieces:
            self._at -= len(_joined(pieces))

    def of(self, piece: Piece) -> int:
        """Where a token begins; the next one begins behind it."""
        at = self._at
        self._at += len(self._decoder.decode(piece.data))
        return max(at, 0)


def _joined(pieces: Sequence[Piece]) -> str:
    return b"".join(piece.data for piece in pieces).decode("utf-8", "replace")


def _echo(prompt: str | tuple[int, ...], pieces: Sequence[Piece]) -> str:
    """The text of a prompt: the client's own, or what its tokens say."""
    if isinstance(prompt, str):
        return prompt
    if len(pieces) < len(prompt):
        raise EngineFailure("the engine left out tokens of the prompt; try again without echo")
    return _joined(pieces)


def _name(data: bytes) -> str:
    """A token as a key: its text, or its bytes where they are no text."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _top(piece: Piece, count: int) -> dict[str, float] | None:
    """The most likely tokens at a place, and the one that is there."""
    if piece.logprob is None:
        return None
    top: dict[str, float] = {}
    for _, data, logprob in piece.top[:count]:
        top.setdefault(_name(data), logprob)
    return {_name(piece.data): piece.logprob} | top


def _sum(
    first: replies.LegacyLogprobs | None, second: replies.LegacyLogprobs | None
) -> replies.LegacyLogprobs | None:
    if first is None or second is None:
        return second
    return replies.LegacyLogprobs(
        text_offset=first.text_offset + second.text_offset,
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
    )
