"""Gemma-4's own drafter, which reads the keys and values of its target."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import cast

from optiq.backend import mx
from optiq.engine.drafters.base import Pairing, check_tokenizer, needed
from optiq.engine.kv_cache import SequenceCache
from optiq.engine.target import Gemma4Target
from optiq.errors import UsageError
from optiq.models.families.gemma4_assistant import Drafting, Gemma4Drafter
from optiq.models.gemma4 import load_drafter
from optiq.models.load import load_tokenizer, read_config


class AssistantDrafter:
    """A `gemma4_assistant` at work; it keeps nothing between rounds.

    Args:
        drafter: bound to its target.
        suppressed: tokens that the target never writes.
    """

    name = "gemma4_assistant"
    reads_states = True

    def __init__(self, drafter: Gemma4Drafter, suppressed: Sequence[int] = ()) -> None:
        self._drafter = drafter
        self._suppressed = mx.array(list(suppressed)) if suppressed else None

    def start(self) -> AssistantDrafter:
        """See `Drafter`."""
        return self

    def propose(
        self, tokens: Sequence[int], state: mx.array | None, cache: SequenceCache, count: int
    ) -> list[int]:
        """See `Session`; nothing where there is no state."""
        if state is None or not count or cache.length != len(tokens) - 1:
            return []
        drafter = self._drafter
        shared = drafter.shared(cache.layers)
        last, drafts = mx.array([[tokens[-1]]]), []
        for _ in range(count):
            draft = drafter.step(last, state, shared, len(tokens))
            last, state = self._best(draft.logits), draft.hidden
            drafts.append(last)
        return cast(list[int], mx.concatenate(drafts, axis=1)[0].tolist())

    def logits(
        self,
        tokens: Sequence[int],
        state: mx.array | None,
        cache: SequenceCache,
        count: int,
    ) -> mx.array:
        """See `Drafter`."""
        assert state is not None
        steps = self._drafter.drafts(
            tokens[-1], state, self._drafter.shared(cache.layers), len(tokens)
        )
        return mx.concatenate([draft.logits[0] for draft in islice(steps, count)])

    def _best(self, logits: mx.array) -> mx.array:
        """(1, 1, V) -> (1, 1), the most likely token that the target may write."""
        if self._suppressed is not None:
            logits[..., self._suppressed] = -mx.inf
        return logits.argmax(axis=-1)


def open_drafter(path: Path | None, pairing: Pairing) -> AssistantDrafter:
    """See `Opener`.

    Raises:
        UsageError: if the directory is no assistant, or one of another target.
    """
    folder = needed(path, AssistantDrafter.name)
    if not isinstance(pairing.target, Gemma4Target):
        raise UsageError(
            f"{folder} drafts for Gemma-4 models, and the target is none; give a smaller model "
            "with the target's tokenizer, or ngram"
        )
    if (folder / "tokenizer.json").is_file():
        own = load_tokenizer(folder, read_config(folder))
        check_tokenizer(folder, own, pairing.tokenizer)
    drafting = Drafting(pairing.position_base, pairing.sliding_keys)
    drafter = load_drafter(folder, pairing.target.model, drafting)
    mx.eval(drafter.model.parameters())
    return AssistantDrafter(drafter, pairing.suppressed)
