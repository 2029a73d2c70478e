"""Texts that are read, a chunk at a time, without an answer: states, log-probabilities, embeddings.

What takes long is a generator that stops after each chunk, so that answers can be written between.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

import numpy as np

from optiq.backend import mx
from optiq.engine.events import TokenLogprob
from optiq.engine.kv_cache import SequenceCache
from optiq.engine.prefill import MOST_PADDING
from optiq.engine.prompts import Prompt
from optiq.engine.sampling import reported_rows
from optiq.engine.target import Target, as_row
from optiq.models.families.gemma4 import chunks

_CHUNK = 512
_ROWS = 64  # logits that are held at a time

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work in steps; what it returns is the result."""


def drained(steps: Steps[T]) -> T:
    """The result of work that nothing comes between."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


class Part(NamedTuple):
    """A chunk of a prompt: its tokens, and the features of its images."""

    tokens: tuple[int, ...]
    features: mx.array | None


def parts(prompt: Prompt, image_token_id: int | None) -> Iterator[Part]:
    """The chunks of a prompt, none of which ends within an image."""
    features, used = prompt.features, 0
    image = image_token_id if features is not None else None
    for span in chunks(prompt.tokens, _CHUNK, image):
        tokens = prompt.tokens[span]
        count = tokens.count(image) if image is not None else 0
        given = features[used : used + count] if features is not None and count else None
        used += count
        yield Part(tokens, given)


def states_of(target: Target, prompt: Prompt, cache: SequenceCache) -> mx.array:
    """States after all tokens of a prompt: (1, N, any)."""
    out = []
    for part in parts(prompt, target.image_token_id):
        out.append(target.states(as_row(part.tokens), cache, part.features))
        mx.eval(out[-1], cache.arrays)
    return mx.concatenate(out, axis=1)


def scored(
    target: Target,
    prompt: Prompt,
    suppressed: Sequence[int],
    top: int,
    lock: AbstractContextManager[object],
) -> Steps[list[TokenLogprob | None]]:
    """Log-probabilities of a prompt; see `Engine.prompt_logprobs`.

    Args:
        target: the model.
        prompt: what to read.
        suppressed: tokens that are never written.
        top: most likely tokens to name at each place.
        lock: held while the model runs.
    """
    cache = target.make_cache()
    out: list[TokenLogprob | None] = [None]
    for part in parts(prompt, target.image_token_id):
        with lock:
            states = target.states(as_row(part.tokens), cache, part.features)
            mx.eval(states, cache.arrays)
            following = prompt.tokens[len(out) : len(out) + len(part.tokens)]
            for start in range(0, len(following), _ROWS):
                tokens = following[start : start + _ROWS]
                logits = target.logits(states[0, start : start + len(tokens)])
                out += reported_rows(logits, tokens, suppressed, [top] * len(tokens))
        yield
    return out  # noqa: B901  the result of the steps


def embedded(
    target: Target,
    texts: Sequence[Sequence[int]],
    special: Collection[int],
    lock: AbstractContextManager[object],
) -> Steps[list[np.ndarray]]:
    """Embeddings of texts; see `Engine.embed`.

    Args:
        target: the model.
        texts: their tokens.
        special: tokens that do not count.
        lock: held while the model runs.
    """
    vectors: dict[int, np.ndarray] = {}
    for group in _alike([len(tokens) for tokens in texts]):
        shape = len(group), max(len(texts[number]) for number in group)
        ids, counts = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, number in enumerate(group):  # what pads a text comes behind it: nothing sees it
            tokens = texts[number]
            ids[row, : len(tokens)] = tokens
            counts[row, : len(tokens)] = [token not in special for token in tokens]
        cache, total = target.make_cache(), mx.array(0.0)
        width = _CHUNK // len(group)
        for start in range(0, shape[1], width):
            columns = slice(start, start + width)
            with lock:
                states = target.hidden(mx.array(ids[:, columns]), cache).astype(mx.float32)
                total = total + (mx.array(counts[:, None, columns]) @ states)[:, 0]
                mx.eval(total, cache.arrays)
            yield
        vectors |= zip(group, np.array(total, dtype=np.float64), strict=True)
    return [_unit(vectors[number]) for number in range(len(texts))]  # noqa: B901  the result


def _unit(vector: np.ndarray) -> np.ndarray:
    """Of length 1; a sum has the direction of the mean."""
    unit: np.ndarray = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of texts that are read together: in a chunk, with a quarter of padding at most."""
    group: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        used = sum(lengths[other] for other in group) + lengths[number]
        if group and (len(group) + 1) * lengths[number] > min(_CHUNK, MOST_PADDING * used):
            yield group
            group = []
        group.append(number)
    if group:
        yield group
