"""Where a model is far from its source: by position and language, in the tail, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from optiq.artifacts import Depth, PartFidelity, WorstToken
from optiq.data.calibration import Windows
from optiq.numerics.divergence import Divergence, clustered_mean
from optiq.upstream import TokenizerWrapper

_FIRST_BUCKET = 64
_WORST_SHARE = 0.01
_NUM_WORST = 20
_CONTEXT_TOKENS = 48

Positions = npt.NDArray[np.bool_]


def depth(
    found: Divergence,
    chosen: Windows,
    languages: Sequence[str | None],
    tokenizer: TokenizerWrapper,
) -> Depth:
    """Divergence taken apart.

    Args:
        found: (N, T) of both models.
        chosen: the windows.
        languages: language of every record that the windows were cut from; None where it is not
            known: such positions are in no language.
        tokenizer: to show text.
    """
    kl = np.sort(found.kl, axis=None)[::-1].astype(np.float64)
    num_worst = max(1, round(_WORST_SHARE * kl.size))
    total = float(kl.sum())
    return Depth(
        by_position=_by_position(found),
        by_language=_by_language(found, chosen, languages),
        worst_share=float(kl[:num_worst].sum()) / total if total > 0 else 0.0,
        tail_source=float(found.tail_p.mean(dtype=np.float64)),
        tail_model=float(found.tail_q.mean(dtype=np.float64)),
        worst=_worst(found, chosen, tokenizer),
    )


def _part(name: str, found: Divergence, member: Positions) -> PartFidelity:
    kl = clustered_mean(found.kl, member)
    return PartFidelity(
        part=name,
        kl_nats_per_token=kl.mean,
        kl_se=kl.stderr if np.isfinite(kl.stderr) else None,
        num_tokens=int(member.sum()),
    )


def _by_position(found: Divergence) -> tuple[PartFidelity, ...]:
    """KL in buckets of doubling width: 0-63, 64-127, 128-255, ..."""
    window = found.kl.shape[1]
    parts, start, stop = [], 0, _FIRST_BUCKET
    while start < window:
        stop = min(stop, window)
        member = np.zeros(found.kl.shape, dtype=bool)
        member[:, start:stop] = True
        parts.append(_part(f"{start}-{stop - 1}", found, member))
        start, stop = stop, 2 * stop
    return tuple(parts)


def _by_language(
    found: Divergence, chosen: Windows, languages: Sequence[str | None]
) -> tuple[PartFidelity, ...]:
    """KL by language, most tokens first; the model has read what came before in the window."""
    known = sorted({language for language in languages if language is not None})
    codes = {language: code for code, language in enumerate(known)}
    code_of = np.array([-1 if name is None else codes[name] for name in languages])
    members = code_of[chosen.records]
    parts = [
        _part(language, found, members == code)
        for language, code in codes.items()
        if (members == code).any()
    ]
    return tuple(sorted(parts, key=lambda part: (-part.num_tokens, part.part)))


def _worst(
    found: Divergence, chosen: Windows, tokenizer: TokenizerWrapper
) -> tuple[WorstToken, ...]:
    """The positions with the largest KL."""
    order = np.argsort(-found.kl, axis=None, kind="stable")[:_NUM_WORST]
    window = found.kl.shape[1]
    worst = []
    for place in order:
        row, position = divmod(int(place), window)
        tokens = chosen.tokens[row]
        context = tokens[max(0, position + 1 - _CONTEXT_TOKENS) : position + 1]
        following = None
        if position + 1 < window:
            following = _text(tokenizer, [tokens[position + 1]])
        worst.append(
            WorstToken(
                domain=chosen.domains[row],
                position=position,
                context=_text(tokenizer, context),
                following=following,
                kl_nats=float(found.kl[row, position]),
                source_token=_text(tokenizer, [found.top_p[row, position]]),
                source_probability=float(found.sure_p[row, position]),
                model_token=_text(tokenizer, [found.top_q[row, position]]),
                model_probability=float(found.sure_q[row, position]),
            )
        )
    return tuple(worst)


def _text(tokenizer: TokenizerWrapper, tokens: Sequence[int] | npt.NDArray[np.int32]) -> str:
    """Text of tokens; halves of a character show as the replacement character."""
    return str(tokenizer.decode([int(token) for token in tokens]))
