"""A model in this process: prompts in, events or logits out."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np

from optiq.backend import mx
from optiq.engine import ranks
from optiq.engine.asking import Asked
from optiq.engine.drafters import Drafter, Pairing, open_drafter
from optiq.engine.events import TokenLogprob
from optiq.engine.generation import Generation, Result, Writing
from optiq.engine.grammar import Grammar
from optiq.engine.grammar.planner import Planner, ToolChoice
from optiq.engine.loading import Opened, open_target
from optiq.engine.loop import Loop
from optiq.engine.messages import ChatOptions, Message, Tool
from optiq.engine.options import EngineOptions
from optiq.engine.output import OutputFormat
from optiq.engine.prompts import Prompt, Prompts
from optiq.engine.reading import drained, embedded, scored, states_of
from optiq.engine.requests import Request
from optiq.engine.sampling import MAX_TOP_LOGPROBS, Sampling
from optiq.engine.text import keep_few_words
from optiq.errors import ContextExceeded, UsageError
from optiq.events import Emit, no_emit
from optiq.models.generation import read_generation
from optiq.models.load import context_length, load_tokenizer
from optiq.models.vision.gemma4 import Picture
from optiq.models.vision.patches import Detail
from optiq.upstream import TokenizerWrapper

__all__ = ["Engine", "EngineOptions", "Generation", "Result", "load"]

_NO_CONTEXT = 1 << 20


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
        self.tokenizer: TokenizerWrapper = load_tokenizer(
            self._options.tokenizer or folder, opened.config
        )
        keep_few_words(self.tokenizer)
        self.context = context_length(opened.config)
        self.prompts = Prompts(folder, opened.config, self.tokenizer)
        self._defaults = read_generation(folder)
        self._stop = frozenset(self._defaults.stop) | set(self.tokenizer.eos_token_ids)
        self._output = OutputFormat.of(self.tokenizer)
        self._planner = Planner(self.tokenizer, self._target.vocab_size, self._stop, self._output)
        self._drafter: Drafter | None = None
        if drafter is not None:
            ranks.refuse_drafter(drafter)
            pairing = Pairing(
                self._target,
                self.tokenizer,
                self._defaults.suppressed,
                self._options.position_base,
                self._options.sliding_keys,
            )
            self._drafter = open_drafter(drafter, pairing)
        self._loop = Loop(
            self._target,
            self._defaults.suppressed,
            self._drafter,
            self._options.limits,
            self._options.storage(),
        )
        self._writing = Writing(self._loop)
        self._lock = self._writing.lock

    # -- writing ---------------------------------------------------------------------------------

    def generate(  # noqa: PLR0913  what a request consists of
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        images: Sequence[Picture] = (),
        tools: Sequence[Tool] = (),
        *,
        thinking: bool = False,
        thinking_budget: int | None = None,
        continue_final: bool = False,
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
            prompt: text to go on with, in which special tokens are parsed; token ids, which are
                taken as they are; or messages, which go through the chat template.
            images: pictures, paths, or patches with positions; the prompt has an image marker, the
                messages a part of type `image`, for each. Default: what the parts hold.
            tools: OpenAI function schemas, for messages.
            thinking: let the model think first, where it can.
            thinking_budget: tokens of it at most; then its end is written.
            continue_final: go on with the last message, which is the assistant's.
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
        asked = Asked(
            prompt,
            images,
            tools,
            thinking,
            thinking_budget,
            continue_final,
            image_detail,
            tool_choice,
            function,
            parallel_tool_calls,
            grammar,
        )
        return self._begin(asked, (choice,), sampling)[0]

    def generate_choices(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        images: Sequence[Picture] = (),
        tools: Sequence[Tool] = (),
        *,
        choices: int,
        **how: Any,  # noqa: ANN401  what `generate` takes besides
    ) -> list[Generation]:
        """Write several answers to one prompt, which is read once.

        They are the answers of `generate` with the numbers 0 to `choices` - 1 and one seed. Of more
        answers than run at a time, those that wait read the prompt again, unless it is kept.

        Args:
            prompt: see `generate`.
            images: see there.
            tools: see there.
            choices: number of answers, at least 1.
            how: what else `generate` takes, but for `choice`.

        Raises:
            UsageError: if something cannot be honoured.
        """
        if choices < 1:
            raise UsageError(f"{choices} answers are not possible; ask for at least 1")
        own = {field.name for field in dataclasses.fields(Asked)} & how.keys()
        asked = Asked(prompt, images, tools, **{name: how[name] for name in own})
        sampling = {name: value for name, value in how.items() if name not in own}
        return self._begin(asked, range(choices), sampling)

    def _begin(
        self, asked: Asked, choices: Sequence[int], sampling: dict[str, Any]
    ) -> list[Generation]:
        """Queue the answers to one prompt, each with its number."""
        demand = asked.demand
        settings = Sampling.of(self._defaults, **sampling).seeded()
        settings.check_vocabulary(self._target.vocab_size)
        raw, read = self._read(asked)
        room = self._room(read, settings)
        requests = [
            Request(
                read.tokens,
                settings,
                room,
                self._stop,
                read.features,
                self._target.image_token_id,
                choice,
                self._options.num_drafts,
                self._planner.guide(demand, read.tokens),
                read.keys,
                read.marks,
                self._options.image_mask or "",
            )
            for choice in choices
        ]
        tools = asked.heard_tools
        parsers = [
            self._output.parser(stop=settings.stop, tools=tools, prompt=read.tokens, raw=raw)
            for _ in requests
        ]
        return self._writing.begin(requests, parsers)

    def _read(self, asked: Asked) -> tuple[bool, Prompt]:
        """A prompt of any kind as tokens, and whether it is none of messages."""
        prompt, images, detail = asked.prompt, asked.images, asked.image_detail
        raw = isinstance(prompt, str) or _is_ids(prompt)
        if raw and asked.chat != ChatOptions():
            raise UsageError(
                "tools, thinking and continue_final need messages; the prompt is text or tokens"
            )
        if isinstance(prompt, str):
            return raw, self.prompts.raw(prompt, images, detail)
        if _is_ids(prompt):
            self._check_ids(prompt)
            return raw, self.prompts.ids(tuple(prompt), images, detail)
        messages = cast(Sequence[Message], prompt)
        marks = self._loop.store.needs_marks
        return raw, self.prompts.chat(messages, asked.chat, images, detail, find_marks=marks)

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
        used, most = len(prompt.tokens), sampling.max_tokens
        room = (self.context or _NO_CONTEXT) - used
        if room < 1:
            raise ContextExceeded(
                f"the prompt has {used} tokens, and the context of the model is {self.context}; "
                "shorten it"
            )
        room = room if most is None else min(most, room)
        if self._loop.longest is None or used + room <= self._loop.longest:
            return room
        fits = self._loop.longest - used
        if fits < 1 or most is not None:
            raise ContextExceeded(
                f"a prompt of {used} tokens with an answer of {room if most else 1} does not fit "
                f"into the memory for pasts, which takes {self._loop.longest}; shorten them, or "
                "give more kv_memory"
            )
        return fits

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._target.vocab_size

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._stop

    @property
    def idle(self) -> bool:
        """Whether every answer that was begun has ended."""
        return self._writing.idle

    def step(self) -> None:
        """Run one step for all answers that are being written; their events are then pending.

        What fails for one answer ends that answer. Whoever iterates over answers needs no steps.
        """
        self._writing.step()

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
            return self._target.logits(states_of(self._target, read, cache))[0]

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
            all_but_last = dataclasses.replace(read, tokens=read.tokens[:-1])
            states = states_of(self._target, all_but_last, cache)
            return self._drafter.logits(read.tokens, states[:, -1:], cache, num_drafts)

    def _checked(self, token_ids: Sequence[int], images: Sequence[Picture]) -> Prompt:
        self._check_ids(token_ids)
        return self.prompts.expanded([int(token) for token in token_ids], images)

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        wrong = [token for token in token_ids if not 0 <= token < self._target.vocab_size]
        if wrong or not len(token_ids):
            raise UsageError(
                f"token ids must be 0 to {self._target.vocab_size - 1}, not "
                f"{wrong[0] if wrong else 'none at all'}"
            )

    # -- texts that are read and not answered ----------------------------------------------------

    def embed(self, inputs: Sequence[str | Sequence[int]]) -> list[np.ndarray]:
        """What the model makes of texts as wholes: (H,) float32 each, of length 1.

        The mean of the states after the final norm over all tokens that are not special.

        Args:
            inputs: texts, which get a BOS where the model wants one and in which special tokens are
                ordinary text; or token ids, which are taken as they are.

        Raises:
            UsageError: if one has nothing but special tokens, or is longer than the context.
        """
        return drained(self.embed_steps(inputs))

    def embed_steps(
        self, inputs: Sequence[str | Sequence[int]]
    ) -> Generator[None, None, list[np.ndarray]]:
        """`embed` in steps, one after each chunk, so that answers can go on between them."""
        texts = [self._embeddable(given) for given in inputs]
        special = set(self.tokenizer.all_special_ids)
        return embedded(self._target, texts, special, self._lock)

    def prompt_logprobs(
        self, token_ids: Sequence[int], images: Sequence[Picture] = (), *, top: int = 0
    ) -> list[TokenLogprob | None]:
        """How likely every token of a text was after those before it; None for the first.

        They are those that answers report: float32, after the soft-cap and without the tokens that
        are never written, before temperature.

        Args:
            token_ids: the text, with one image id for each soft token.
            images: of the text.
            top: most likely tokens to name at each place.

        Raises:
            UsageError: if there are no tokens, too many, or the images are not those of the text.
        """
        return drained(self.prompt_logprob_steps(token_ids, images, top=top))

    def prompt_logprob_steps(
        self, token_ids: Sequence[int], images: Sequence[Picture] = (), *, top: int = 0
    ) -> Generator[None, None, list[TokenLogprob | None]]:
        """`prompt_logprobs` in steps, one after each chunk."""
        if not 0 <= top <= MAX_TOP_LOGPROBS:
            raise UsageError(f"top is {top}; give 0 to {MAX_TOP_LOGPROBS}")
        read = self._checked(token_ids, images)
        self._check_length(len(read.tokens))
        return scored(self._target, read, self._defaults.suppressed, top, self._lock)

    def _embeddable(self, given: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(given, str):
            tokens = self.prompts.plain(given)
        else:
            self._check_ids(given)
            tokens = tuple(given)
        self._check_length(len(tokens))
        if set(tokens) <= set(self.tokenizer.all_special_ids):
            raise UsageError("an input has no tokens but special ones; give some text")
        return tokens

    def _check_length(self, count: int) -> None:
        """Refuse a text that cannot be read."""
        longest = min(self.context or _NO_CONTEXT, self._loop.longest or _NO_CONTEXT)
        if count > longest:
            raise UsageError(
                f"the text has {count} tokens, and there is room for {longest}: the context of the "
                f"model is {self.context}; shorten it, or give more kv_memory"
            )


def _is_ids(prompt: Sequence[Any]) -> TypeGuard[Sequence[int]]:
    """Whether a prompt is token ids, and not text or messages."""
    return bool(prompt) and all(type(token) is int for token in prompt)


def load(
    path: str | Path,
    drafter: str | Path | None = None,
    options: EngineOptions | None = None,
    emit: Emit = no_emit,
) -> Engine:
    """A model directory, ready to write.

    Under `mlx.launch` every process has its part of the model. All of them have to ask for the
    same answers in the same order, and take the same steps.

    Args:
        path: the directory, source or artifact.
        drafter: what proposes tokens: the directory of an assistant or of a smaller model with the
            same tokenizer, or `ngram`. It changes the speed and never the text.
        options: see `EngineOptions`.
        emit: receives notices, such as the form of the weights.

    Raises:
        UsageError: if the directory is no model, the drafter is not for it, or the model cannot be
            shared out among the ranks of a launch.
        UnsupportedModel: if the family keeps its past in a way that the engine does not know.
    """
    folder, options = Path(path), options or EngineOptions()
    opened = open_target(
        folder,
        memory_limit=options.memory_limit,
        image_mask=options.image_mask,
        kv_bits=options.kv_bits,
        emit=emit,
    )
    return Engine(folder, opened, drafter, options)
