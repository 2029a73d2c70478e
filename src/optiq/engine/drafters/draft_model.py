"""A smaller model with the same tokenizer writes ahead, greedily.

Reference: Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2023); the
draft is checked by the target's own draw, not by a ratio of probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from optiq.backend import mx
from optiq.engine.drafters.base import Pairing, check_tokenizer, needed
from optiq.engine.kv_cache import Checkpoint, SequenceCache
from optiq.engine.loading import open_target
from optiq.engine.target import Target, as_row
from optiq.errors import UsageError
from optiq.models.load import load_tokenizer, read_config

_CHUNK = 512


class DraftModelSession:
    """The draft model's past of one sequence.

    Args:
        model: the draft model.
        vocab_size: tokens of the target; drafts lie below it.
        suppressed: tokens that the target never writes.
    """

    def __init__(self, model: Target, vocab_size: int, suppressed: Sequence[int]) -> None:
        self._model = model
        self._sizes = vocab_size, model.vocab_size
        self._suppressed = [token for token in suppressed if token < min(self._sizes)]
        self._cache = model.make_cache()
        self._known: list[int] = []
        self._point: Checkpoint = self._cache.checkpoint()

    def propose(
        self, tokens: Sequence[int], state: mx.array | None, cache: SequenceCache, count: int
    ) -> list[int]:
        """See `Session`."""
        del state, cache
        return [_best(row) for row in self.rows(tokens, count)]

    def rows(self, tokens: Sequence[int], count: int) -> list[mx.array]:
        """Logits of `count` drafts, each from the most likely token before it: (V,) each."""
        if not count:
            return []
        logits = self._read(tokens)
        self._point = self._cache.checkpoint()
        rows = [self._allowed(logits)]
        while len(rows) < count:
            last = _best(rows[-1])
            self._known.append(last)
            rows.append(self._allowed(self._forward([last])))
        return rows

    def _read(self, tokens: Sequence[int]) -> mx.array:
        """Logits after the text; the past forgets drafts that were wrong."""
        same = 0
        limit = min(len(self._known), len(tokens) - 1)
        while same < limit and self._known[same] == tokens[same]:
            same += 1
        if same < self._point.length:  # text that is no longer there at all
            self._cache, same = self._model.make_cache(), 0
        elif same < len(self._known):
            same = self._cache.back_to(self._point, same)
        self._known = list(tokens)
        for start in range(same, len(tokens) - 1, _CHUNK):
            self._forward(tokens[start : min(start + _CHUNK, len(tokens) - 1)])
            mx.eval(self._cache.arrays)
        return self._forward(tokens[-1:])

    def _forward(self, tokens: Sequence[int]) -> mx.array:
        own = self._sizes[1]
        ids = [token if token < own else 0 for token in tokens]
        states = self._model.states(as_row(ids), self._cache)
        return self._model.logits(states[:, -1])[0]

    def _allowed(self, logits: mx.array) -> mx.array:
        logits = logits[: self._sizes[0]]
        if self._suppressed:
            logits[mx.array(self._suppressed)] = -mx.inf
        return logits


def _best(row: mx.array) -> int:
    return cast(int, row.argmax().item())


class ModelDrafter:
    """A draft model with its weights.

    Args:
        model: it.
        pairing: its target.
    """

    name = "draft_model"
    reads_states = False

    def __init__(self, model: Target, pairing: Pairing) -> None:
        self._model, self._pairing = model, pairing

    def start(self) -> DraftModelSession:
        """See `Drafter`."""
        pairing = self._pairing
        return DraftModelSession(self._model, pairing.target.vocab_size, pairing.suppressed)

    def logits(
        self,
        tokens: Sequence[int],
        state: mx.array | None,
        cache: SequenceCache,
        count: int,
    ) -> mx.array:
        """See `Drafter`."""
        del state, cache
        return mx.stack(DraftModelSession(self._model, 1 << 62, ()).rows(tokens, count))


def open_drafter(path: Path | None, pairing: Pairing) -> ModelDrafter:
    """See `Opener`.

    Raises:
        UsageError: if it is no model, or has another tokenizer.
    """
    folder = needed(path, ModelDrafter.name)
    config = read_config(folder)
    check_tokenizer(folder, load_tokenizer(folder, config), pairing.tokenizer)
    opened = open_target(folder)
    if opened.target.vocab_size < len(pairing.tokenizer.get_vocab()):
        raise UsageError(
            f"{folder} has {opened.target.vocab_size} tokens, fewer than its tokenizer; get it "
            "again"
        )
    return ModelDrafter(opened.target, pairing)
