"""How often a drafter is right, measured on a text that is already there.

At every place of a text the drafter makes its drafts from what stands before, all places at once.
A draft counts where the target itself would have written the text so far, and all drafts before it
were right: then a round of speculative decoding would have reached it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from optiq.artifacts import Acceptance
from optiq.backend import mx
from optiq.configs import JudgeConfig
from optiq.data.calibration import Record, windows
from optiq.evals.provenance import provenance
from optiq.events import Emit, track
from optiq.models.families.gemma4 import KeyValues, last_keys
from optiq.models.families.gemma4_assistant import Gemma4Drafter
from optiq.models.gemma4 import load_drafter, load_target
from optiq.models.load import Source, load_tokenizer, read_config

_ROWS = 64
_MAX_WINDOWS = 24
NUM_DRAFTS = 4


@dataclasses.dataclass(frozen=True)
class Tally:
    """Drafts by their number in the round, the first draft first.

    Attributes:
        tried: drafts that counted.
        accepted: those that were the target's choice.
    """

    tried: npt.NDArray[np.int64]
    accepted: npt.NDArray[np.int64]

    @classmethod
    def empty(cls, num_drafts: int) -> Self:
        """Nothing counted yet."""
        return cls(np.zeros(num_drafts, np.int64), np.zeros(num_drafts, np.int64))

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.tried + other.tried, self.accepted + other.accepted)

    @property
    def rates(self) -> tuple[float, ...]:
        """Share of accepted drafts by number; NaN where none was tried."""
        pairs = zip(self.accepted, self.tried, strict=True)
        return tuple(float(a / t) if t else float("nan") for a, t in pairs)


def teacher_forced(
    drafter: Gemma4Drafter,
    tokens: Sequence[int],
    *,
    features: mx.array | None = None,
    start: int = 2,
    num_drafts: int = NUM_DRAFTS,
    suppressed: Sequence[int] = (),
) -> Tally:
    """Acceptance of a drafter on one text.

    Args:
        drafter: bound to its target.
        tokens: the text, at least three tokens.
        features: of the images in it.
        start: first token that a draft may stand for; 2 at least.
        num_drafts: drafts of a round.
        suppressed: tokens that the target never chooses.

    Cost: one pass of the target, and `num_drafts` steps of the drafter for every token.
    """
    target, count = drafter.target, len(tokens)
    cache = target.make_cache(slack=count)
    states = mx.concatenate(list(target.prefill(tokens, cache, features)), axis=1)
    logits = target.logits(states)[0]
    if suppressed:
        logits[:, mx.array(list(suppressed))] = -mx.inf
    text, chosen = np.array(tokens), np.array(logits.argmax(axis=-1))
    right = np.zeros(count + num_drafts, bool)  # a place where the target would write the text
    right[1:count] = text[1:] == chosen[:-1]
    shared = {kind: last_keys(cache[at], None) for kind, at in target.shared_layers().items()}
    tally = Tally.empty(num_drafts)
    padded = np.concatenate([text, np.full(num_drafts, -1)])
    for first in range(max(start, 2) - 1, count - 1, _ROWS):
        rows = np.arange(first, min(first + _ROWS, count - 1))
        drafts = _drafts(drafter, text, states[0], shared, rows, num_drafts)
        alive = np.ones(len(rows), bool)
        for number, draft in enumerate(drafts):
            alive &= right[rows + number + 1]
            hit = alive & (draft == padded[rows + number + 1])
            tally.tried[number] += alive.sum()
            tally.accepted[number] += hit.sum()
            alive = hit
    return tally


def _drafts(
    drafter: Gemma4Drafter,
    text: npt.NDArray[np.int64],
    states: mx.array,
    shared: dict[str, KeyValues],
    rows: npt.NDArray[np.int64],
    num_drafts: int,
) -> list[npt.NDArray[np.int64]]:
    """Greedy drafts after the tokens at `rows`: for each number one draft a row."""
    seen = mx.array(rows)[:, None, None, None]
    key = mx.arange(len(text))
    sliding = drafter.drafting.sliding_keys or drafter.target.window
    before = key < seen
    masks = {"full_attention": before, "sliding_attention": before & (key >= seen - sliding)}
    size = len(rows)
    spread = {
        kind: KeyValues(*(mx.broadcast_to(x, (size, *x.shape[1:])) for x in kv))
        for kind, kv in shared.items()
    }
    position = mx.array(rows + 1 - drafter.drafting.position_base, dtype=mx.int32)
    token, hidden = mx.array(text[rows])[:, None], states[mx.array(rows - 1)][:, None]
    found = []
    for _ in range(num_drafts):
        draft = drafter.model(drafter.target.embed(token), hidden, spread, position, masks)
        token, hidden = draft.logits.argmax(axis=-1), draft.hidden
        found.append(np.array(token[:, 0]).astype(np.int64))
    return found


def judge_drafter(
    model: Path,
    source: Source,
    target_path: Path,
    records: Sequence[Record],
    config: JudgeConfig,
    emit: Emit,
) -> Acceptance:
    """How often a drafter and what it was made from are right.

    Args:
        model: directory of the drafter.
        source: what it was made from.
        target_path: directory of the target, which both draft for.
        records: held-out text.
        config: window and number of windows, 24 at most by default.
        emit: receives progress.

    Raises:
        UsageError: if the drafter is not for this target, or the text is too short.

    Cost: two times `teacher_forced` for every window.
    """
    target = load_target(target_path)
    drafters = [load_drafter(path, target) for path in (model, source.path)]
    settings = read_config(target_path)
    chosen = windows(
        records,
        load_tokenizer(target_path, settings),
        settings,
        window=config.window,
        count=config.max_windows or _MAX_WINDOWS,
        seed=0,
    )
    own = theirs = Tally.empty(NUM_DRAFTS)
    for row in track(chosen.tokens.tolist(), emit, "draft", len(chosen.tokens), "windows"):
        own += teacher_forced(drafters[0], row)
        theirs += teacher_forced(drafters[1], row)
    return Acceptance(
        drafter=str(model),
        target=str(target_path),
        text=f"{config.text or 'built-in held-out corpus'} ({chosen.digest[:16]})",
        num_tokens=int(chosen.tokens.size),
        tried=tuple(own.tried.tolist()),
        accepted=tuple(own.accepted.tolist()),
        source_tried=tuple(theirs.tried.tolist()),
        source_accepted=tuple(theirs.accepted.tolist()),
        provenance=provenance(),
    )
