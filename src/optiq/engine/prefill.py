"""Chunks of prompts: which are read in one pass, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from optiq.backend import is_cuda, mx
from optiq.engine.kv_cache import SequenceCache
from optiq.engine.scheduler import PREFILL_TOKENS, Limits
from optiq.engine.sequence import SequenceState
from optiq.engine.target import Target, as_row

MOST_PADDING = 1.25
"""Tokens of a pass over those that are not padding, at most."""
_CUDA_STEP = 64
"""Widths of passes are multiples of this on CUDA, which plans attention anew for every shape."""
_CUDA_TOKENS = 2048
_FILLER = 0
"""Token id in the places of a shorter chunk; nothing sees it, and it is taken back."""


def step_tokens(limits: Limits) -> int:
    """Tokens of prompts that a step reads at most, and the most in one chunk.

    On CUDA 2,048 where the limits do not say: every pass unpacks all weights, whatever it reads.
    """
    return limits.prefill_tokens or (_CUDA_TOKENS if is_cuda() else PREFILL_TOKENS)


def groups(sequences: Sequence[SequenceState]) -> Iterator[list[SequenceState]]:
    """Sequences whose next chunks are read side by side.

    Short chunks cost little more together than one does alone. They share a pass while padding adds
    less than a quarter to it. A group must have been read before the next one is asked for.

    Args:
        sequences: one for each chunk to read, in order; one may come several times.
    """
    group: list[SequenceState] = []
    for sequence in sequences:
        if group and not sequence.done and not _joins(sequence, group):
            yield group
            group = []
        if not sequence.done:  # reading may have ended it
            group.append(sequence)
    if group:
        yield group


def _joins(sequence: SequenceState, group: Sequence[SequenceState]) -> bool:
    everyone = [*group, sequence]
    if sequence in group or not all(map(_can_share, everyone)):
        return False
    sizes = [other.parts[0] for other in everyone]
    return len(sizes) * max(sizes) <= MOST_PADDING * sum(sizes)


def _can_share(sequence: SequenceState) -> bool:
    """Padding cannot be taken back from states that cannot forget; an image has its own mask."""
    return sequence.request.features is None and not sequence.cache.states


def read(target: Target, group: Sequence[SequenceState]) -> list[mx.array]:
    """Read the next chunk of each sequence of a group.

    Returns:
        The state after the last token of each, (1, 1, any); lazy, like the caches.
    """
    chunks = [sequence.unread[: sequence.parts[0]] for sequence in group]
    if len(group) == 1:
        (sequence,), (chunk,) = group, chunks
        states = target.states(as_row(chunk), sequence.cache, sequence.features_of(chunk))
        last = [states[:, -1:]]
    else:
        last = _side_by_side(target, group, chunks)
    for sequence in group:
        sequence.parts.popleft()
    return last


def _side_by_side(
    target: Target, group: Sequence[SequenceState], chunks: Sequence[Sequence[int]]
) -> list[mx.array]:
    step = _CUDA_STEP if is_cuda() else 1
    width = step * -(-max(map(len, chunks)) // step)
    padding = [width - len(chunk) for chunk in chunks]
    rows = [[*chunk, *[_FILLER] * missing] for chunk, missing in zip(chunks, padding, strict=True)]
    cache = SequenceCache.join([sequence.cache for sequence in group])
    states = target.states(mx.array(rows, dtype=mx.int32), cache)
    for leaf in cache.attention:
        leaf.trim(padding)
    for index, (sequence, chunk) in enumerate(zip(group, chunks, strict=True)):
        sequence.cache = cache.row(index, sequence.cache.length + len(chunk))
    return [states[i : i + 1, len(c) - 1 : len(c)] for i, c in enumerate(chunks)]
