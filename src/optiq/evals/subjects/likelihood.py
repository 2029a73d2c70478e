"""Log-likelihoods of continuations, with the KV cache of a shared beginning computed once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from optiq.backend import mx, nn
from optiq.errors import UnsupportedModel
from optiq.upstream import make_prompt_cache

_PREFILL_STEP = 2048

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ChoiceTokens:
    """Token ids of a question with its options.

    Attributes:
        prefix: ids that the model reads once for all neighbours with the same; may be empty.
        contexts: for every option, the ids between the prefix and the option; never empty.
        options: the ids of every option; never empty.
    """

    prefix: Ids
    contexts: tuple[Ids, ...]
    options: tuple[Ids, ...]


@dataclasses.dataclass(frozen=True)
class _Row:
    """One sequence for the model: `tail` follows `context`, or any of single `tokens` does."""

    owner: int
    slots: tuple[int, ...]
    context: Ids
    tokens: Ids


class Likelihoods:
    """Log-likelihoods under one model.

    Args:
        model: an mlx-lm model with its weights.
        batch_size: sequences of a forward pass.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._prefix: tuple[Ids, list[Any]] = ((), [])

    def __call__(self, questions: Sequence[ChoiceTokens]) -> list[tuple[float, ...]]:
        """Log-likelihood in nats of every option of every question.

        Neighbours with the same prefix share its cache, which is kept for the next call.

        Raises:
            UnsupportedModel: if the family's cache cannot be batched.

        Cost: a forward pass over every distinct prefix, context and option. The head runs on
            single positions alone.
        """
        found = [[0.0] * len(question.options) for question in questions]
        for prefix, numbers in itertools.groupby(
            range(len(questions)), key=lambda i: questions[i].prefix
        ):
            # neighbours in length, so that little of a batch is padding
            rows = sorted(
                (row for i in numbers for row in _rows(i, questions[i])),
                key=lambda row: len(row.context),
            )
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                for row, values in zip(batch, self._forward(prefix, batch), strict=True):
                    for slot, value in zip(row.slots, values, strict=True):
                        found[row.owner][slot] = value
        return [tuple(values) for values in found]

    def _forward(self, prefix: Ids, rows: Sequence[_Row]) -> Iterator[list[float]]:
        """Values of every slot of every row: contexts first, then the options' positions."""
        cache = self._batched(prefix, len(rows))
        heads = [row.context[:-1] for row in rows]
        if any(heads):
            self._read(heads, cache)
        single = [len(row.slots) > 1 for row in rows]
        tails = [
            row.context[-1:] + (() if many else row.tokens[:-1])
            for row, many in zip(rows, single, strict=True)
        ]
        logits = self._logits(tails, cache)
        for index, (row, many) in enumerate(zip(rows, single, strict=True)):
            places = [0] * len(row.tokens) if many else list(range(len(row.tokens)))
            values = logits[index, places, list(row.tokens)]
            yield [float(v) for v in values] if many else [float(values.sum(dtype=np.float64))]

    def _batched(self, prefix: Ids, count: int) -> list[Any]:
        """The cache of the prefix, for `count` sequences."""
        if self._prefix[0] != prefix or not self._prefix[1]:
            cache = make_prompt_cache(self._model)
            for start in range(0, len(prefix), _PREFILL_STEP):
                self._model(mx.array([prefix[start : start + _PREFILL_STEP]]), cache=cache)
                mx.eval([layer.state for layer in cache])
            self._prefix = (prefix, cache)
        try:
            return [layer.merge([layer] * count) for layer in self._prefix[1]]
        except AttributeError as error:
            raise UnsupportedModel(
                f"mlx-lm cannot run this family in batches ({error}); log-likelihoods need that"
            ) from None

    def _read(self, heads: Sequence[Ids], cache: list[Any]) -> None:
        """Run the contexts up to their last token; logits are never computed."""
        tokens, padding = _padded(heads, cache)
        self._model(tokens, cache=cache)
        if padding:
            for layer in cache:
                layer.finalize()
        mx.eval([layer.state for layer in cache])

    def _logits(self, tails: Sequence[Ids], cache: list[Any]) -> npt.NDArray[np.float32]:
        """Log-probabilities after every token of the tails, (rows, longest tail, vocabulary)."""
        tokens, _ = _padded(tails, cache)
        logits = self._model(tokens, cache=cache).astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def _rows(owner: int, question: ChoiceTokens) -> list[_Row]:
    """One row where all options are single tokens after one context, else one an option."""
    contexts, options = question.contexts, question.options
    if len(options) > 1 and len(set(contexts)) == 1 and all(len(o) == 1 for o in options):
        tokens = tuple(option[0] for option in options)
        return [_Row(owner, tuple(range(len(options))), contexts[0], tokens)]
    pairs = zip(contexts, options, strict=True)
    return [_Row(owner, (slot,), context, option) for slot, (context, option) in enumerate(pairs)]


def _padded(rows: Sequence[Ids], cache: list[Any]) -> tuple[mx.array, bool]:
    """Rows padded to the right, which the cache is told of; whether there is padding."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    padding = [longest - length for length in lengths]
    if any(padding):
        for layer in cache:
            layer.prepare(lengths=lengths, right_padding=padding)
    tokens = mx.array([(*row, *([0] * pad)) for row, pad in zip(rows, padding, strict=True)])
    return tokens, any(padding)
