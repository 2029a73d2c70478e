"""A model in this process: prompts in, events or logits out."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optiq.backend import mx
from optiq.engine.drafters import Drafter, Pairing, open_drafter
from optiq.engine.events import (
    Answer,
    Event,
    Finished,
    FinishReason,
    TokenLogprob,
    ToolCallDone,
    Usage,
    collect,
)
from optiq.engine.grammar import Grammar
from optiq.engine.grammar.planner import Demand, Planner, ToolChoice
from optiq.engine.loading import Opened, open_target
from optiq.engine.loop import Loop
from optiq.engine.messages import ChatOptions, Message, Tool
from optiq.engine.output import OutputFormat
from optiq.engine.pace import MAX_DRAFTS, DraftReport
from optiq.engine.prompts import Prompt, Prompts
from optiq.engine.requests import Request
from optiq.engine.sampling import Sampling
from optiq.engine.scheduler import Limits
from optiq.engine.sequence import SequenceState
from optiq.engine.target import as_row
from optiq.errors import EngineFailure, OptiqError, UsageError
from optiq.events import Emit, no_emit
from optiq.models.families.gemma4 import ImageMask, chunks
from optiq.models.generation import read_generation
from optiq.models.load import context_length, load_tokenizer
from optiq.models.vision.gemma4 import Picture
from optiq.models.vision.patches import Detail
from optiq.upstream import TokenizerWrapper

_NO_CONTEXT = 1 << 20
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How a model is loaded and run.

    Attributes:
        memory_limit: most bytes of weights, such as `8GB`; default: four fifths of the memory.
        num_drafts: drafts of a round; None lets measurements decide.
        image_mask: see `families.gemma4.Gemma4`.
        position_base: of a Gemma-4 drafter, see `families.gemma4_assistant.Drafting`.
        sliding_keys: of a Gemma-4 drafter, see there.
        limits: of a step.
    """

    memory_limit: str | None = None
    num_drafts: int | None = None
    image_mask: ImageMask | None = None
    position_base: int = 1
    sliding_keys: int | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        """Refuse a number of drafts that no round can have."""
        if self.num_drafts is not None and not 0 <= self.num_drafts <= MAX_DRAFTS:
            raise UsageError(f"num_drafts is {self.num_drafts}; give 0 to {MAX_DRAFTS}, or None")


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished answer.

    Attributes:
        text: of the answer.
        reasoning: text of the thinking before it.
        tool_calls: calls in it, in order.
        token_ids: all that were drawn, a stop token among them.
        finish_reason: why it ended.
        stop: the stop string that ended it, if one did.
        usage: counts of tokens.
        logprobs: one a token, where they were asked for.
        acceptance: what the drafter was good for; None without one.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCallDone, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop: str | None
    usage: Usage
    logprobs: tuple[TokenLogprob, ...]
    acceptance: DraftReport | None


class Generation:
    """An answer that is being written: iterate over its events, or take the `result`."""

    def __init__(self, engine: Engine, sequence: SequenceState) -> None:
        self._engine, self._sequence = engine, sequence
        self._seen: list[Event] = []
        weakref.finalize(self, engine._abandoned.append, sequence)  # noqa: SLF001  its own engine

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        """The next event; the model runs until there is one.

        Raises:
            EngineFailure: if the machine fails, or optiq does.
        """
        event = self._engine._next(self._sequence)  # noqa: SLF001
        if event is None:
            raise StopIteration
        self._seen.append(event)
        return event

    def pending(self) -> list[Event]:
        """Events that are there already, in order; for who calls `Engine.step` himself.

        Raises:
            EngineFailure: if the machine fails, or optiq does.
        """
        events = self._engine._pending(self._sequence)  # noqa: SLF001
        self._seen += events
        return events

    @property
    def done(self) -> bool:
        """Whether no more is written; there may be events that were not taken."""
        return self._sequence.done

    def cancel(self) -> None:
        """Write no more; the last event says `cancelled`."""
        self._engine._cancel(self._sequence)  # noqa: SLF001

    @property
    def acceptance(self) -> DraftReport | None:
        """What the drafter was good for so far; None without one."""
        return self._sequence.report

    def result(self) -> Result:
        """Everything, when it has ended.

        Raises:
            EngineFailure: if the machine fails, or optiq does.
        """
        for _ in self:
            pass
        answer: Answer = collect(self._seen)
        finish = answer.finish
        assert isinstance(finish, Finished)
        return Result(
            text=answer.text,
            reasoning=answer.reasoning,
            tool_calls=tuple(answer.tool_calls),
            token_ids=tuple(answer.token_ids),
            finish_reason=finish.reason,
            stop=finish.stop,
            usage=finish.usage,
            logprobs=tuple(answer.logprobs),
            acceptance=self.acceptance,
        )


class Engine:
    """A model, its tokenizer, and a drafter if it has one. Use `optiq.load` to make one.

    Args:
        folder: the model's directory.
        opened: the model.
        drafter: directory or name of a drafter.
        options: see `EngineOptions`.

    Attributes:
        config: config.json of the model.
        tokenizer: its tokenizer.
        dtype: of its activations.
        context: tokens of prompt and answer at most; None where the model does not say.
    """

    def __init__(
        self,
        folder: Path,
        opened: Opened,
        drafter: str | Path | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self._options = options or EngineOptions()
        self._target = opened.target
        self.config, self.dtype = opened.config, opened.dtype
        self.tokenizer: TokenizerWrapper = load_tokenizer(folder, opened.config)
        self.context = context_length(opened.config)
        self.prompts = Prompts(folder, opened.config, self.tokenizer)
        self._defaults = read_generation(folder)
        self._stop = frozenset(self._defaults.stop) | set(self.tokenizer.eos_token_ids)
        self._output = OutputFormat.of(self.tokenizer)
        self._planner = Planner(self.tokenizer, self._target.vocab_size, self._stop, self._output)
        self._drafter: Drafter | None = None
        if drafter is not None:
            pairing = Pairing(
                self._target,
                self.tokenizer,
                self._defaults.suppressed,
                self._options.position_base,
                self._options.sliding_keys,
            )
            self._drafter = open_drafter(drafter, pairing)
        slack = max(0, (self._options.sliding_keys or 0) - 1)
        self._loop = Loop(
            self._target, self._defaults.suppressed, self._drafter, self._options.limits, slack
        )
        self._lock = threading.RLock()
        self._abandoned: deque[SequenceState] = deque()

    # -- writing ---------------------------------------------------------------------------------

    def generate(  # noqa: PLR0913  what a request consists of
        self,
        prompt: str | Sequence[Message],
        images: Sequence[Picture] = (),
        tools: Sequence[Tool] = (),
        *,
        thinking: bool = False,
        thinking_budget: int | None = None,
        image_detail: int | Detail | None = None,
        tool_choice: ToolChoice = "auto",
        function: str | None = None,
        parallel_tool_calls: bool = True,
        grammar: Grammar | None = None,
        choice: int = 0,
        **sampling: Any,  # noqa: ANN401  fields of Sampling
    ) -> Generation:
        """Write an answer.

        Several answers at a time share the passes of the model: begin them all, then iterate.

        Args:
            prompt: text to go on with, in which special tokens are parsed, or messages, which go
                through the chat template.
            images: pictures, paths, or patches with positions; the prompt has an image marker, the
                messages a part of type `image`, for each. Default: what the parts hold.
            tools: OpenAI function schemas, for messages.
            thinking: let the model think first, where it can.
            thinking_budget: tokens of it at most; then its end is written.
            image_detail: soft tokens of an image at most, or `low`, `auto`, `high`.
            tool_choice: whether the model may, must not, or must call functions.
            function: name of the one that it must call, once.
            parallel_tool_calls: whether there may be more than one call.
            grammar: what the answer obeys, after the thinking; calls may come in its place.
            choice: number of the answer among those of one prompt and seed.
            sampling: fields of `engine.sampling.Sampling`, named as in OpenAI's API. What is not
                given is as the checkpoint says, else temperature 1; `max_tokens` is the rest of
                the context.

        Raises:
            UsageError: if something cannot be honoured.
        """
        demand = Demand(
            grammar,
            tools,
            tool_choice,
            function,
            parallel_tool_calls,
            thinking,
            thinking_budget,
        )
        settings = Sampling.of(self._defaults, **sampling).seeded()
        settings.check_vocabulary(self._target.vocab_size)
        raw = isinstance(prompt, str)
        if isinstance(prompt, str):
            if tools or thinking:
                raise UsageError("tools and thinking need messages; the prompt is text")
            read = self.prompts.raw(prompt, images, image_detail)
        else:
            chat = ChatOptions(tools, thinking)
            read = self.prompts.chat(prompt, chat, images, image_detail)
        request = Request(
            read.tokens,
            settings,
            self._room(read, settings),
            self._stop,
            read.features,
            self._target.image_token_id,
            choice,
            self._options.num_drafts,
            self._planner.guide(demand, read.tokens),
        )
        heard = () if tool_choice == "none" else tools
        parser = self._output.parser(stop=settings.stop, tools=heard, prompt=read.tokens, raw=raw)
        with self._lock:
            self._clear()
            return Generation(self, self._loop.add(request, parser))

    def prepare_grammars(self) -> None:
        """Read the tokenizer for grammars now, which the first request that has one waits for.

        Raises:
            UsageError: if the package that it needs is not installed.
            UnsupportedModel: if the tokenizer cannot be used.

        Cost: a few seconds with a large vocabulary.
        """
        self._planner.compiler  # noqa: B018  made once

    def _room(self, prompt: Prompt, sampling: Sampling) -> int:
        """Most tokens of the answer."""
        room = (self.context or _NO_CONTEXT) - len(prompt.tokens)
        if room < 1:
            raise UsageError(
                f"the prompt has {len(prompt.tokens)} tokens, and the context of the model is "
                f"{self.context}; shorten it"
            )
        return room if sampling.max_tokens is None else min(sampling.max_tokens, room)

    def _next(self, sequence: SequenceState) -> Event | None:
        """The next event of a sequence; steps of the loop are run until there is one."""
        with self._lock:
            while not sequence.events and not sequence.done:
                self._clear()
                self._loop.step()
            if sequence.events:
                return sequence.events.popleft()
            if sequence.error is not None:
                raise _failure(sequence)
            return None

    @property
    def idle(self) -> bool:
        """Whether every answer that was begun has ended."""
        with self._lock:
            self._clear()
            return self._loop.idle

    def step(self) -> None:
        """Run one step for all answers that are being written; their events are then pending.

        What fails for one answer ends that answer. Whoever iterates over answers needs no steps.
        """
        with self._lock:
            self._clear()
            self._loop.step()

    def _pending(self, sequence: SequenceState) -> list[Event]:
        with self._lock:
            events = list(sequence.events)
            sequence.events.clear()
            if not events and sequence.error is not None:
                raise _failure(sequence)
            return events

    def _cancel(self, sequence: SequenceState) -> None:
        with self._lock:
            self._loop.cancel(sequence)

    def _clear(self) -> None:
        """Cancel answers that nobody holds any more."""
        while self._abandoned:
            self._loop.cancel(self._abandoned.popleft())

    # -- logits ----------------------------------------------------------------------------------

    def logits(self, token_ids: Sequence[int], images: Sequence[Picture] = ()) -> mx.array:
        """Logits after every token of a text: (num_tokens, vocabulary), in `dtype`.

        They are after the soft-cap and nothing else: nothing is suppressed, no BOS is added.

        Args:
            token_ids: the text, with one image id for each soft token.
            images: of the text; patches with positions are taken as they are.

        Raises:
            UsageError: if there are no tokens, or the images are not those of the text.
        """
        read = self._checked(token_ids, images)
        with self._lock:
            cache = self._target.make_cache()
            return self._target.logits(self._states(read, cache))[0]

    def draft_logits(
        self, token_ids: Sequence[int], images: Sequence[Picture] = (), *, num_drafts: int = 3
    ) -> mx.array:
        """Logits of the first drafts after a text: (num_drafts, vocabulary of the drafter).

        All tokens but the last are in the target's cache, and the last is drafted from, as in a
        round; every further draft follows the most likely one before it.

        Raises:
            UsageError: if there is no drafter, it has no logits, or there are fewer than 2 tokens.
        """
        if self._drafter is None:
            raise UsageError("there is no drafter; give one to optiq.load")
        if len(token_ids) < 2 or num_drafts < 1:
            raise UsageError(
                f"{num_drafts} drafts after {len(token_ids)} tokens are not possible; give at "
                "least 1 after 2"
            )
        read = self._checked(token_ids, images)
        with self._lock:
            cache = self._target.make_cache(self._options.sliding_keys or 0)
            states = self._states(dataclasses.replace(read, tokens=read.tokens[:-1]), cache)
            return self._drafter.logits(read.tokens, states[:, -1:], cache, num_drafts)

    def _checked(self, token_ids: Sequence[int], images: Sequence[Picture]) -> Prompt:
        wrong = [token for token in token_ids if not 0 <= token < self._target.vocab_size]
        if wrong or not len(token_ids):
            raise UsageError(
                f"token ids must be 0 to {self._target.vocab_size - 1}, not "
                f"{wrong[0] if wrong else 'none at all'}"
            )
        return self.prompts.expanded([int(token) for token in token_ids], images)

    def _states(self, prompt: Prompt, cache: Any) -> mx.array:  # noqa: ANN401
        """States after all tokens, a chunk at a time."""
        features, used, out = prompt.features, 0, []
        image = self._target.image_token_id if features is not None else None
        for part in chunks(prompt.tokens, _CHUNK, image):
            tokens = prompt.tokens[part]
            count = tokens.count(image) if image is not None else 0
            given = features[used : used + count] if features is not None and count else None
            used += count
            out.append(self._target.states(as_row(tokens), cache, given))
            mx.eval(out[-1], cache.arrays)
        return mx.concatenate(out, axis=1)


def _failure(sequence: SequenceState) -> OptiqError:
    """What ended a sequence, as an error of ours."""
    if isinstance(sequence.error, OptiqError):
        return sequence.error
    failure = EngineFailure(
        f"the engine failed at token {len(sequence.tokens)} ({sequence.error!r})"
    )
    failure.__cause__ = sequence.error
    return failure


def load(
    path: str | Path,
    drafter: str | Path | None = None,
    options: EngineOptions | None = None,
    emit: Emit = no_emit,
) -> Engine:
    """A model directory, ready to write.

    Args:
        path: the directory, source or artifact.
        drafter: what proposes tokens: the directory of an assistant or of a smaller model with the
            same tokenizer, or `ngram`. It changes the speed and never the text.
        options: see `EngineOptions`.
        emit: receives notices, such as the form of the weights.

    Raises:
        UsageError: if the directory is no model, or the drafter is not for it.
        UnsupportedModel: if the family keeps its past in a way that the engine does not know.
    """
    folder, options = Path(path), options or EngineOptions()
    opened = open_target(
        folder, memory_limit=options.memory_limit, image_mask=options.image_mask, emit=emit
    )
    return Engine(folder, opened, drafter, options)
