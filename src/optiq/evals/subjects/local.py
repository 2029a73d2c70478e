"""A model directory, run in this process."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optiq.artifacts import BitPlan, SubjectInfo
from optiq.backend import is_cpu, mx, nn
from optiq.configs import EvalConfig
from optiq.data.calibration import needs_bos
from optiq.data.chat import offers_tools, question
from optiq.errors import EngineFailure, UsageError
from optiq.evals.loops import ends_in_loop
from optiq.evals.subjects.base import Answer, Ask
from optiq.evals.subjects.decoding import Job, Written, write
from optiq.evals.subjects.likelihood import ChoiceTokens, Likelihoods
from optiq.evals.subjects.outputs import parts
from optiq.evals.subjects.sampling import Sampling, sampling_of
from optiq.evals.task import Chat, Choice, Continuation, Prompt, Response
from optiq.models.load import (
    load_tokenizer,
    open_quantized,
    read_config,
    size_on_disk,
    stored_bpw,
)
from optiq.models.safetensors_io import fingerprint
from optiq.upstream import dense_float32, load_quantized, make_prompt_cache

_WAVE_BATCHES = 4
_PROBE_TOKENS = 256
_LONG_PROBE_TOKENS = 1024
_PROBE_STEPS = 8


class LocalModel:
    """A model directory in this process; weights are loaded when they are first needed.

    On the CPU the weights are unpacked to float32 once: four bytes a weight of memory.

    Args:
        model_dir: a directory that mlx-lm can load.
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
        self._sampling: Sampling | None = None
        if config.sampling == "model":
            self._sampling = sampling_of(model_dir)
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
            sampling=str(self._sampling) if self._sampling else "greedy",
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
        """`max_position_embeddings` of the config."""
        text = self._config.get("text_config")
        for part in (text if isinstance(text, dict) else {}, self._config):
            value = part.get("max_position_embeddings")
            if isinstance(value, int) and value > 0:
                return value
        return None

    @property
    def wave(self) -> int:
        """Questions asked together: a few batches."""
        return _WAVE_BATCHES * self._options.batch_size

    def check(self, prompt: Prompt) -> None:
        """Refuse functions where the chat template has no place for them.

        Raises:
            UsageError: in that case.
        """
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
        if not others:
            return
        jobs = [self._job(asks[i]) for i in others]
        written = write(
            self._model, self._tokenizer, jobs, self._options.batch_size, self._sampling
        )
        for number, result in written:
            index = others[number]
            yield index, self._read(prompts[index], jobs[number], result)

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
            cache = make_prompt_cache(self._model)
            start = time.perf_counter()
            self._model(mx.array([tokens]), cache=cache)
            mx.eval([layer.state for layer in cache])  # without the head, as prompts are read
            seconds = time.perf_counter() - start
        return seconds

    @functools.cached_property
    def _decode_tps(self) -> float:
        """Tokens a second of a full batch."""
        ids = tuple(self._tokenizer.encode("a b", add_special_tokens=False))
        batch = self._options.batch_size
        jobs = [Job(ids, _PROBE_STEPS) for _ in range(batch)]
        start = time.perf_counter()
        written = [w.num_tokens for _, w in write(self._model, self._tokenizer, jobs, batch, None)]
        return sum(written) / (time.perf_counter() - start)

    @functools.cached_property
    def _model(self) -> nn.Module:
        try:
            model, _ = load_quantized(self._path)
            if is_cpu():
                model = dense_float32(model)
            mx.eval(model.parameters())
        except (ValueError, KeyError, TypeError, FileNotFoundError, RuntimeError) as error:
            reason = str(error).strip().split("\n", maxsplit=1)[0]
            raise UsageError(
                f"mlx-lm cannot load {self._path}: {reason}; convert it again"
            ) from None
        return model

    @functools.cached_property
    def _likelihood(self) -> Likelihoods:
        return Likelihoods(self._model, self._options.batch_size)

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
            return self._encoded(prompt.text)
        messages = [dict(message) for message in prompt.messages]
        tools = [dict(tool) for tool in prompt.tools]
        thinking = self._options.thinking if prompt.thinking is None else prompt.thinking
        return self._encoded(question(self._tokenizer, messages, tools, thinking=thinking))

    def _job(self, ask: Ask) -> Job:
        prompt = ask.prompt
        assert not isinstance(prompt, Choice)
        ids = self._ids(prompt)
        room = prompt.max_tokens if self.context is None else max(1, self.context - len(ids))
        stop = prompt.stop if isinstance(prompt, Continuation) else ()
        return Job(ids, min(prompt.max_tokens, room), stop, ask.key)

    def _read(self, prompt: Prompt, job: Job, written: Written) -> Answer:
        """An answer without its reasoning, its native calls parsed."""
        looped = ends_in_loop(written.text)
        if not isinstance(prompt, Chat):
            response = Response(
                written.text, num_tokens=written.num_tokens, truncated=written.truncated
            )
            return Answer(response, looped=looped)
        response, reasoning = parts(self._tokenizer, job.prompt, written.text, prompt.tools)
        response = dataclasses.replace(
            response, num_tokens=written.num_tokens, truncated=written.truncated
        )
        return Answer(response, reasoning, looped)


def _short_hash(template: Any) -> str:  # noqa: ANN401  a text, or texts by name
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
