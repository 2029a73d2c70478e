"""Answers in batches, through mlx-lm's continuous batching."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from optiq.backend import mx, nn
from optiq.errors import UnsupportedModel
from optiq.evals.subjects.sampling import Sampling
from optiq.upstream import BatchGenerator, TokenizerWrapper


@dataclasses.dataclass(frozen=True)
class Job:
    """A sequence to go on with.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: most tokens to write.
        stop: strings that end the answer and are not part of it.
        key: seed of the sampler.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    key: int = 0


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written: text without end token and stop string, tokens, whether it was cut."""

    text: str
    num_tokens: int
    truncated: bool


class _Sequence:
    """A sequence that is being written."""

    def __init__(self, index: int, job: Job, tokenizer: TokenizerWrapper) -> None:
        self.index, self.job = index, job
        self.tokens: list[int] = []
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._detokenizer: Any = tokenizer.detokenizer if job.stop else None
        self._reach = max(map(len, job.stop), default=0)
        self._seen = 0

    def add(self, token: int) -> bool:
        """Take a token; whether a stop string is complete."""
        self.tokens.append(token)
        if self._detokenizer is None:
            return False
        self._detokenizer.add_token(token)
        text = self._detokenizer.text
        recent = text[max(0, self._seen - self._reach) :]
        self._seen = len(text)
        return any(stop in recent for stop in self.job.stop)

    def written(self, *, cut: bool) -> Written:
        """The text as it follows the prompt, up to a stop string; `cut` says tokens ran out."""
        last = [self.job.prompt[-1]]
        whole = _decoded(self._tokenizer, last + self.tokens)
        text = whole[len(_decoded(self._tokenizer, last)) :]
        ends = [found for stop in self.job.stop if (found := text.find(stop)) >= 0]
        end = min(ends, default=len(text))
        return Written(text[:end], self.num_tokens, truncated=cut and not ends)


def _decoded(tokenizer: TokenizerWrapper, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def write(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    jobs: Sequence[Job],
    batch_size: int,
    sampling: Sampling | None,
) -> Iterator[tuple[int, Written]]:
    """Write answers, `batch_size` at a time; a finished one makes room for the next.

    Args:
        model: an mlx-lm model with its weights.
        tokenizer: the model's; its eos ids end an answer.
        jobs: what to go on with.
        batch_size: sequences in the batch.
        sampling: None always takes the most likely token.

    Yields:
        Index of the job and what was written, as they end. A sampled answer depends on the job and
        its key, not on its company beyond rounding.

    Raises:
        UnsupportedModel: if the family's cache cannot be batched.
    """
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(tokenizer.eos_token_ids)],
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
    )
    try:
        samplers: list[Callable[[mx.array], mx.array]] | None = None
        if sampling is not None:
            samplers = [sampling.sampler(job.key) for job in jobs]
        uids = generator.insert(
            [list(job.prompt) for job in jobs],
            [job.max_tokens for job in jobs],
            samplers=samplers,
            logits_processors=[sampling.processors() for _ in jobs] if sampling else None,
        )
        running = {
            uid: _Sequence(index, job, tokenizer)
            for index, (uid, job) in enumerate(zip(uids, jobs, strict=True))
        }
        while running:
            yield from _step(generator, running)
    except ValueError as error:
        if "batching" not in str(error):
            raise
        raise UnsupportedModel(f"mlx-lm cannot run this family in batches: {error}") from None
    finally:
        generator.close()


def _step(
    generator: BatchGenerator, running: dict[int, _Sequence]
) -> Iterator[tuple[int, Written]]:
    """One token for every sequence of the batch; those that end leave `running`."""
    stopped = []
    for response in generator.next_generated():
        sequence = running[response.uid]
        sequence.num_tokens += 1
        ended = response.finish_reason is not None
        stop = response.finish_reason != "stop" and sequence.add(response.token)
        if stop and not ended:
            stopped.append(response.uid)
        if ended or stop:
            del running[response.uid]
            yield sequence.index, sequence.written(cut=response.finish_reason == "length")
    if stopped:
        generator.remove(stopped)
