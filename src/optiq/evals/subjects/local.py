"""A model directory, run in this process."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optiq.artifacts import BitPlan, SubjectInfo
from optiq.backend import mx
from optiq.configs import EvalConfig
from optiq.data.calibration import needs_bos
from optiq.data.chat import offers_tools, question
from optiq.engine.engine import Engine, EngineOptions, Generation
from optiq.engine.loading import Opened, open_target
from optiq.engine.messages import ChatOptions, Prompter
from optiq.engine.sampling import Sampling
from optiq.engine.scheduler import Limits
from optiq.engine.tools import call_format
from optiq.errors import EngineFailure, UsageError
from optiq.evals.loops import ends_in_loop
from optiq.evals.subjects.base import Answer, Ask
from optiq.evals.subjects.likelihood import ChoiceTokens, Likelihoods
from optiq.evals.task import Chat, Choice, Continuation, Prompt, Response, ToolCall
from optiq.models.generation import read_generation
from optiq.models.load import (
    context_length,
    load_tokenizer,
    open_quantized,
    read_config,
    size_on_disk,
    stored_bpw,
)
from optiq.models.safetensors_io import fingerprint
from optiq.models.vision.gemma4 import Gemma4Vision
from optiq.upstream import make_prompt_cache

_WAVE_BATCHES = 4
_PROBE_TOKENS = 256
_LONG_PROBE_TOKENS = 1024
_PROBE_STEPS = 8
_GREEDY: dict[str, Any] = {
    "temperature": 0,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
}
_SAMPLING: dict[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


class LocalModel:
    """A model directory in the engine; weights are loaded when they are first needed.

    Args:
        model_dir: a model directory.
        config: batch size, sampling, thinking.
        tokenizer_dir: where the tokenizer lies, if not in `model_dir`.
        share_prefix: compute the KV cache of what questions have in common once.

    Raises:
        UsageError: if the directory is no model, or says nothing of the sampling that is asked for.
    """

    def __init__(
        self,
        model_dir: Path,
        config: EvalConfig,
        *,
        tokenizer_dir: Path | None = None,
        share_prefix: bool = True,
    ) -> None:
        self._path, self._options, self._share = model_dir, config, share_prefix
        self._config = read_config(model_dir)
        self._tokenizer = load_tokenizer(tokenizer_dir or model_dir, self._config)
        self._tokenizer_dir = tokenizer_dir
        self._sampling = _sampling_of(model_dir) if config.sampling == "model" else None
        self._prompter = Prompter(self._tokenizer, self._config)
        bos = self._tokenizer.bos_token_id
        self._bos: tuple[int, ...] = (bos,) if needs_bos(self._tokenizer, self._config) else ()

    @functools.cached_property
    def info(self) -> SubjectInfo:
        """What logs tell of it."""
        tokenizer = self._tokenizer
        plan = self._path / "optiq" / "plan.json"
        template = tokenizer.chat_template if self.has_template else None
        return SubjectInfo(
            kind="local",
            name=self._path.resolve().name,  # logs are published: no places of this machine
            fingerprint=fingerprint(self._path),
            size_bytes=size_on_disk(self._path),
            bpw=self._bpw(),
            source=BitPlan.load(plan).source.name if plan.is_file() else None,
            bos=str(tokenizer.bos_token) if self._bos else None,
            template=_short_hash(template) if template else None,
            stop=tuple(tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))),
            thinking="on" if self._options.thinking else "off",
            sampling=self._sampling or "greedy",
            batch_size=self._options.batch_size,
        )

    def _bpw(self) -> float | None:
        """Stored bits per weight; None for a format that is not affine or names of a source."""
        quantization = self._config.get("quantization") or {}
        modes = {q.get("mode", "affine") for q in quantization.values() if isinstance(q, dict)}
        if modes | {quantization.get("mode", "affine")} != {"affine"}:
            return None
        return stored_bpw(self._path, open_quantized(self._path).modules) or None

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self._tokenizer.has_chat_template)

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer at most; None where the config does not say."""
        return context_length(self._config)

    @property
    def wave(self) -> int:
        """Questions asked together: a few batches."""
        return _WAVE_BATCHES * self._options.batch_size

    def check(self, prompt: Prompt) -> None:
        """Refuse functions where the chat template has no place for them, and pictures unseen.

        Raises:
            UsageError: in that case.
        """
        if isinstance(prompt, Chat) and prompt.images:
            Gemma4Vision(self._path, self._config)
        if isinstance(prompt, Chat) and prompt.tools and not self._offers_tools:
            raise UsageError(
                f"the chat template of {self._path} has no place for functions; ask with "
                f"--bfcl-form prompt, or leave the benchmark out with --tasks"
            )

    @functools.cached_property
    def _offers_tools(self) -> bool:
        return offers_tools(self._tokenizer)

    def num_tokens(self, prompt: Prompt) -> int:
        """Tokens of the prompt; of a choice, with its longest option."""
        if isinstance(prompt, Choice):
            tokens = self._choice(prompt)
            pairs = zip(tokens.contexts, tokens.options, strict=True)
            return len(tokens.prefix) + max(len(c) + len(o) for c, o in pairs)
        return len(self._ids(prompt))

    def answer(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Answer]]:
        """Answers with the position of their question, as they are ready.

        Raises:
            EngineFailure: if the model gives log-likelihoods that are not finite.
        """
        prompts = [ask.prompt for ask in asks]
        choices = [i for i, prompt in enumerate(prompts) if isinstance(prompt, Choice)]
        tokens = [self._choice(p) for p in prompts if isinstance(p, Choice)]
        for index, values in zip(choices, self._likelihoods(tokens), strict=True):
            if not all(map(math.isfinite, values)):
                raise EngineFailure(
                    f"{self._path} gives log-likelihoods that are not finite ({values[0]}); check "
                    f"the model and convert it again"
                )
            yield index, Answer(Response("", logprobs=values))
        others = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, Choice)]
        yield from self._written({i: asks[i] for i in others})

    def seconds(self, asks: Sequence[Ask]) -> float:
        """Time the questions take if every answer is as long as it may be, from a short probe.

        The time of a prompt grows with its length and the square of it.
        """
        lengths, decode, last = [], 0, None
        for ask in asks:
            if isinstance(ask.prompt, Choice):
                tokens = self._choice(ask.prompt)
                single = all(len(option) == 1 for option in tokens.options)
                lengths += [len(c) for c in tokens.contexts[: 1 if single else None]]
                lengths += [len(tokens.prefix)] if tokens.prefix != last else []
                last = tokens.prefix
            else:
                lengths.append(len(self._ids(ask.prompt)))
                decode += ask.prompt.max_tokens
        short = self._prefill_s(_PROBE_TOKENS) / _PROBE_TOKENS
        slope = 0.0
        if max(lengths) > _LONG_PROBE_TOKENS:
            long = self._prefill_s(_LONG_PROBE_TOKENS) / _LONG_PROBE_TOKENS
            slope = max(0.0, long - short) / (_LONG_PROBE_TOKENS - _PROBE_TOKENS)
        prefill = sum(n * (short + slope * max(0, n - _PROBE_TOKENS)) for n in lengths)
        return prefill + (decode / self._decode_tps if decode else 0.0)

    @functools.lru_cache(maxsize=2)  # noqa: B019  few models live as long as the process
    def _prefill_s(self, count: int) -> float:
        """Seconds to read a text of `count` tokens, after a run to warm up."""
        ids = (self._tokenizer.encode("a b c d e f g h", add_special_tokens=False) * count)[:count]
        seconds = 0.0
        for tokens in (ids[:2], ids):
            cache = make_prompt_cache(self._opened.tree)
            start = time.perf_counter()
            self._opened.tree(mx.array([tokens]), cache=cache)
            mx.eval([layer.state for layer in cache])  # without the head, as prompts are read
            seconds = time.perf_counter() - start
        return seconds

    @functools.cached_property
    def _decode_tps(self) -> float:
        """Tokens a second of a full batch."""
        prompt = Continuation("a b", _PROBE_STEPS)
        asks = dict.fromkeys(range(self._options.batch_size), Ask(prompt))
        start = time.perf_counter()
        responses = [answer.response for _, answer in self._written(asks)]
        tokens = sum(response.num_tokens for response in responses if response)
        return tokens / (time.perf_counter() - start)

    @functools.cached_property
    def _opened(self) -> Opened:
        try:
            return open_target(self._path)
        except (ValueError, KeyError, TypeError, FileNotFoundError, RuntimeError) as error:
            reason = str(error).strip().split("\n", maxsplit=1)[0]
            raise UsageError(f"{self._path} cannot be loaded: {reason}; convert it again") from None

    @functools.cached_property
    def _engine(self) -> Engine:
        options = EngineOptions(
            limits=Limits(running=self._options.batch_size), tokenizer=self._tokenizer_dir
        )
        return Engine(self._path, self._opened, options=options)

    @functools.cached_property
    def _likelihood(self) -> Likelihoods:
        return Likelihoods(self._opened.tree, self._options.batch_size)

    def _likelihoods(self, questions: Sequence[ChoiceTokens]) -> list[tuple[float, ...]]:
        return self._likelihood(questions) if questions else []

    def _encoded(self, text: str) -> tuple[int, ...]:
        """Ids of a whole text, BOS in front once where the family needs it."""
        ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def _choice(self, prompt: Choice) -> ChoiceTokens:
        """Ids of a choice; every text is tokenized whole and cut between tokens.

        An option's ids are those of text and option together that come after as many as the text
        has alone.
        """
        text, head = prompt.shared + prompt.own, prompt.shared
        if prompt.chat:
            message = {"role": "user", "content": text}
            text = question(self._tokenizer, [message], thinking=self._options.thinking)
            end = text.find(prompt.shared) + len(prompt.shared)
            head = text[:end] if prompt.shared and end >= len(prompt.shared) else ""
        alone = self._encoded(text)
        whole = [self._encoded(text + option) for option in prompt.options]
        cut = len(alone)
        if cut == 0 or any(len(ids) <= cut for ids in whole):
            raise UsageError(
                f"an option of {list(prompt.options)} is no token of its own after its text; the "
                f"benchmark cannot be asked as log-likelihoods"
            )
        shared = self._shared(head, alone, whole)
        return ChoiceTokens(
            prefix=alone[:shared],
            contexts=tuple(ids[shared:cut] for ids in whole),
            options=tuple(ids[cut:] for ids in whole),
        )

    def _shared(self, head: str, alone: tuple[int, ...], whole: Sequence[tuple[int, ...]]) -> int:
        """How many ids of the head every sequence begins with; a token of the text is left."""
        if not self._share or not head:
            return 0
        limit = len(alone) - 1
        prefix = self._head_ids(head)
        for ids in (alone, *whole):
            limit = min(limit, len(prefix), len(ids))
            limit = next((i for i in range(limit) if ids[i] != prefix[i]), limit)
        return limit

    @functools.lru_cache(maxsize=8)  # noqa: B019  few models live as long as the process
    def _head_ids(self, head: str) -> tuple[int, ...]:
        return self._encoded(head)

    def _ids(self, prompt: Chat | Continuation) -> tuple[int, ...]:
        if isinstance(prompt, Continuation):
            return self._prompter.raw(prompt.text).ids
        options = ChatOptions(prompt.tools, self._thinks(prompt))
        return self._prompter.chat(prompt.messages, options).ids

    def _thinks(self, prompt: Chat) -> bool:
        return self._options.thinking if prompt.thinking is None else prompt.thinking

    def _written(self, asks: Mapping[int, Ask]) -> Iterator[tuple[int, Answer]]:
        """Answers of the model as they end, `batch_size` at a time."""
        writing: dict[int, Generation] = {}
        for index, ask in asks.items():
            try:
                writing[index] = self._begun(ask)
            except UsageError as error:
                yield index, Answer(None, failure=str(error))
        while writing:
            self._engine.step()
            for index in [i for i, answer in writing.items() if answer.done]:
                yield index, self._read(asks[index].prompt, writing.pop(index))

    def _begun(self, ask: Ask) -> Generation:
        prompt = ask.prompt
        assert not isinstance(prompt, Choice)
        settings: dict[str, Any] = {"max_tokens": prompt.max_tokens, "seed": ask.key}
        settings |= {} if self._sampling else _GREEDY
        if isinstance(prompt, Continuation):
            return self._engine.generate(prompt.text, stop=prompt.stop, **settings)
        return self._engine.generate(
            prompt.messages, prompt.images, prompt.tools, thinking=self._thinks(prompt), **settings
        )

    def _read(self, prompt: Prompt, generation: Generation) -> Answer:
        """An answer without its reasoning, its native calls parsed."""
        result = generation.result()
        tools = isinstance(prompt, Chat) and bool(prompt.tools) and self._has_calls
        calls = [ToolCall(call.name, call.data()) for call in result.tool_calls]
        response = Response(
            result.text.strip() if tools or result.reasoning else result.text,
            tuple(calls) if tools else None,
            num_tokens=result.usage.completion_tokens,
            truncated=result.finish_reason == "length",
        )
        return Answer(response, result.reasoning, ends_in_loop(result.reasoning + result.text))

    @functools.cached_property
    def _has_calls(self) -> bool:
        """Whether the format of its calls is known."""
        return call_format(self._tokenizer) is not None


def _sampling_of(model_dir: Path) -> str:
    """The checkpoint's own sampling in words, such as `temperature 0.7, top_p 0.9`.

    Raises:
        UsageError: if it says nothing of it, says greedy, or holds values that cannot be used.
    """
    defaults = read_generation(model_dir)
    given = {name: getattr(defaults, name) for name in _SAMPLING}
    if set(given.values()) == {None} or given["temperature"] == 0:
        raise UsageError(
            f"{model_dir} says nothing of sampling in generation_config.json; leave out "
            f"--sampling model for greedy answers"
        )
    Sampling.of(defaults)
    told = {name: value if value is not None else _SAMPLING[name] for name, value in given.items()}
    return ", ".join(
        f"{name} {value:g}"
        for name, value in told.items()
        if name == "temperature" or value != _SAMPLING[name]
    )


def _short_hash(template: Any) -> str:  # noqa: ANN401  a text, or texts by name
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
