"""From logits to a token: the settings, the processed distribution and the draw.

The order is that of transformers 5: logit bias, repetition penalty, [presence and frequency
penalties], grammar, suppressed tokens, temperature, top-k, top-p, min-p. The two in brackets are
OpenAI's, which transformers does not have; they stand where vLLM has them.

A draw takes its random numbers from (seed, choice, position) alone. It is the same in a batch,
alone, and in a round of speculative decoding, so that a draft is right exactly where it equals the
token that would have been drawn without it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from optiq.backend import mx
from optiq.engine import ranks
from optiq.engine.events import TokenLogprob
from optiq.errors import UsageError
from optiq.models.generation import GenerationDefaults

MAX_TOP_LOGPROBS = 20
_INFINITY = float("inf")
_SMALLEST = 2.0**-33  # half a step of 32 random bits: the noise stays finite
_FROM_CHECKPOINT = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop; names as OpenAI spells them.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the most likely tokens whose probability sums up to it; 1 keeps all.
        top_k: keep as many of the most likely tokens; 0 keeps all. Ties at the edge are kept.
        min_p: keep tokens at least as likely as this share of the most likely one.
        repetition_penalty: above 1, tokens of prompt and answer become less likely.
        presence_penalty: subtracted from the logits of tokens that are in the answer.
        frequency_penalty: subtracted once for every time that they are in it.
        logit_bias: token id -> what is added to its logit.
        seed: of the draws; None for a fresh one.
        max_tokens: most tokens of an answer; None for the rest of the context.
        stop: texts that end an answer, none of which is part of it.
        logprobs: whether to report the log-probability of every token.
        top_logprobs: how many of the most likely tokens to report with it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name, (fits, range_text) in _RANGES.items():
            value = getattr(self, name)
            if not fits(value):
                raise UsageError(f"{name} is {value!r}; give {range_text}")
        if self.top_logprobs and not self.logprobs:
            raise UsageError(f"top_logprobs is {self.top_logprobs}; it needs logprobs=True")

    @classmethod
    def of(cls, defaults: GenerationDefaults | None = None, **given: Any) -> Sampling:  # noqa: ANN401
        """What was given, else what the checkpoint says, else temperature 1 and nothing cut off.

        Args:
            defaults: of the checkpoint.
            given: fields by name; None is the same as not given. A `stop` may be one string, and
                token ids of `logit_bias` may be strings of digits, as JSON has them.

        Raises:
            UsageError: if a name is unknown or a value is out of its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise UsageError(f"no sampling setting {unknown[0]!r}; there are {sorted(known)}")
        values = {name: getattr(defaults, name) for name in _FROM_CHECKPOINT} if defaults else {}
        values |= {name: value for name, value in given.items() if value is not None}
        values = {name: value for name, value in values.items() if value is not None}
        if isinstance(stop := values.get("stop"), str):
            values["stop"] = (stop,)
        elif isinstance(stop, list):
            values["stop"] = tuple(stop)
        if isinstance(bias := values.get("logit_bias"), Mapping):
            values["logit_bias"] = {_token_id(key): value for key, value in bias.items()}
        return cls(**values)

    def seeded(self) -> Sampling:
        """The same with a fresh seed where there is none."""
        if self.seed is not None:
            return self
        return dataclasses.replace(self, seed=ranks.fresh_seed())

    def check_vocabulary(self, num_tokens: int) -> None:
        """Refuse a bias on tokens that the model does not have.

        Raises:
            UsageError: naming the token.
        """
        highest = max(self.logit_bias, default=-1)
        if highest >= num_tokens:
            raise UsageError(
                f"logit_bias names token {highest}; the model's tokens go up to {num_tokens - 1}"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        """Whether the tokens so far change the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


def _token_id(key: Any) -> Any:  # noqa: ANN401  any key of a mapping
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: _is_number(value) and low <= value <= high


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_bias(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        type(token) is int and 0 <= token < 2**31 and _number(-100, 100)(bias)
        for token, bias in value.items()
    )


def _is_stop(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)


_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (_number(0, 1e6), "a number from 0"),
    "top_p": (_number(0, 1), "a number from 0 to 1"),
    "top_k": (_whole(0, 2**31 - 1), "a whole number, 0 for all tokens"),
    "min_p": (_number(0, 1), "a number from 0 to 1"),
    "repetition_penalty": (_number(1e-3, 1e3), "a number above 0, 1 for none"),
    "presence_penalty": (_number(-2, 2), "a number from -2 to 2"),
    "frequency_penalty": (_number(-2, 2), "a number from -2 to 2"),
    "logit_bias": (_is_bias, "token ids with numbers from -100 to 100"),
    "seed": (lambda v: v is None or _whole(-(2**63), 2**63 - 1)(v), "a whole number of 64 bits"),
    "max_tokens": (lambda v: v is None or _whole(0, 2**31 - 1)(v), "a whole number from 0"),
    "stop": (_is_stop, "texts that are not empty"),
    "logprobs": (lambda value: isinstance(value, bool), "true or false"),
    "top_logprobs": (_whole(0, MAX_TOP_LOGPROBS), f"a whole number from 0 to {MAX_TOP_LOGPROBS}"),
}


class History:
    """Tokens of one sequence so far, counted for the penalties.

    Args:
        prompt: its tokens; the repetition penalty knows them, the other two do not.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._counts = dict.fromkeys(prompt, 0)

    def add(self, tokens: Iterable[int]) -> None:
        """Count tokens of the answer."""
        for token in tokens:
            self._counts[token] = self._counts.get(token, 0) + 1

    def after(self, tokens: Iterable[int]) -> History:
        """A copy that has counted more tokens of the answer, as drafts ask for."""
        other = History()
        other._counts = dict(self._counts)
        other.add(tokens)
        return other

    def counted(self) -> tuple[list[int], list[int]]:
        """Distinct tokens, and how often each is in the answer."""
        return list(self._counts), list(self._counts.values())


@dataclasses.dataclass(frozen=True)
class Row:
    """Whose logits a row holds.

    Attributes:
        sampling: its settings.
        history: tokens before the one to draw; read only where the settings penalize.
    """

    sampling: Sampling
    history: History = dataclasses.field(default_factory=History)


@dataclasses.dataclass(frozen=True)
class Place:
    """What the random numbers of one draw follow from.

    Attributes:
        seed: of the request.
        choice: number of the answer among those of one prompt.
        position: number of the token in the answer.
    """

    seed: int
    choice: int = 0
    position: int = 0

    def key(self) -> tuple[int, int]:
        """Two words of 32 bits for MLX's counter-based generator."""
        packed = struct.pack("<QQQ", self.seed % 2**64, self.choice, self.position)
        first, second = struct.unpack("<II", hashlib.blake2b(packed, digest_size=8).digest())
        return first, second


def processed(
    logits: mx.array,
    rows: Sequence[Row],
    suppressed: Sequence[int] = (),
    allowed: mx.array | None = None,
) -> mx.array:
    """Log-probabilities that tokens are drawn with.

    Args:
        logits: (n, vocabulary), after the soft-cap.
        rows: n.
        suppressed: tokens that are never drawn.
        allowed: of a grammar, (n, vocabulary) or (vocabulary), bool; at least one a row is true.

    Returns:
        (n, vocabulary), float32. A row at temperature 0 is 0 at its most likely token (the first
        of equals) and -inf elsewhere.

    Raises:
        UsageError: if a bias is on a token that the model does not have.

    Cost: with top-k on every row that cuts off, a partial sort; with top-p alone a whole one.
    """
    scores = _scores(logits, rows, suppressed, allowed)
    greedy = [row.sampling.is_greedy for row in rows]
    if all(greedy):
        return _one_hot(scores)
    temperature = _column(row.sampling.temperature or 1.0 for row in rows)
    # the largest first goes to 0, so that the smallest temperature does not overflow
    scaled = (scores - mx.max(scores, axis=-1, keepdims=True)) / temperature
    drawn = _log_softmax(_min_p(_top(scaled, rows), rows))
    if not any(greedy):
        return drawn
    return mx.where(mx.array(greedy)[:, None], _one_hot(scores), drawn)


def draw(log_probs: mx.array, places: Sequence[Place]) -> mx.array:
    """One token a row, distributed as the row says.

    The most likely token after Gumbel noise that belongs to (place, token id).

    Args:
        log_probs: (n, vocabulary), normalized or not.
        places: n.

    Returns:
        (n,), uint32.

    Reference: Gumbel-max trick (Maddison et al. 2014, arXiv:1411.0030), with threefry keys.
    """
    keys = mx.array([place.key() for place in places], dtype=mx.uint32)
    size = log_probs.shape[-1]
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=(size,), key=key))(keys)
    return mx.argmax(log_probs + _gumbel(uniform), axis=-1)


def sampled(
    logits: mx.array,
    rows: Sequence[Row],
    places: Sequence[Place],
    suppressed: Sequence[int] = (),
    allowed: mx.array | None = None,
) -> mx.array:
    """`draw` from `processed`; neither is needed where every row is greedy."""
    if all(row.sampling.is_greedy for row in rows):
        return mx.argmax(_scores(logits, rows, suppressed, allowed), axis=-1)
    return draw(processed(logits, rows, suppressed, allowed), places)


def reported_logprobs(logits: mx.array, suppressed: Sequence[int] = ()) -> mx.array:
    """Log-probabilities that answers report: before bias, penalties, grammar and temperature.

    Args:
        logits: (..., vocabulary), after the soft-cap.
        suppressed: tokens that are never drawn.

    Returns:
        (..., vocabulary), float32.
    """
    return _log_softmax(_without(logits.astype(mx.float32), suppressed))


def most_likely(log_probs: mx.array, count: int) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and log-probabilities of the `count` largest of each row, largest first.

    Of equals the lower token id comes first. Suppressed tokens are left out.
    """
    values = np.array(log_probs, dtype=np.float32)
    count = min(count, values.shape[-1])
    tokens, best = [], []
    for row in values:
        edge = np.partition(row, -count)[-count] if count else _INFINITY
        candidates = np.flatnonzero((row >= edge) & (row > -_INFINITY))
        order = candidates[np.argsort(-row[candidates], kind="stable")][:count]
        tokens.append([int(token) for token in order])
        best.append([float(row[token]) for token in order])
    return tokens, best


def reported_rows(
    logits: mx.array, tokens: Sequence[int], suppressed: Sequence[int], top: Sequence[int]
) -> list[TokenLogprob]:
    """What answers report of their tokens.

    Args:
        logits: (n, vocabulary), after the soft-cap.
        tokens: one a row.
        suppressed: tokens that are never drawn.
        top: most likely tokens to name, by row.
    """
    reported = reported_logprobs(logits, suppressed)
    own = np.array(mx.take_along_axis(reported, mx.array(list(tokens))[:, None], axis=-1)[:, 0])
    ids, values = most_likely(reported, max(top))
    return [
        TokenLogprob(token, float(own[i]), tuple(zip(ids[i], values[i], strict=True))[: top[i]])
        for i, token in enumerate(tokens)
    ]


def _scores(
    logits: mx.array, rows: Sequence[Row], suppressed: Sequence[int], allowed: mx.array | None
) -> mx.array:
    """The logits before temperature: biased, penalized, and -inf where no token can be drawn."""
    for row in rows:
        row.sampling.check_vocabulary(logits.shape[-1])
    scores = _penalized(_biased(logits.astype(mx.float32), rows), rows)
    if allowed is not None:
        scores = mx.where(allowed, scores, -_INFINITY)
    return _without(scores, suppressed)


def _gumbel(uniform: mx.array) -> mx.array:
    """Gumbel noise from MLX's uniform numbers, which are multiples of 2^-32 below 1.

    It is large where they are small. So the tail of a vocabulary of 262,144 is drawn as often as
    it should be: of a number near 1 float32 would keep 24 bits.
    """
    return -mx.log(-mx.log1p(-mx.maximum(uniform, _SMALLEST)))


def _column(values: Iterable[float]) -> mx.array:
    return mx.array(list(values), dtype=mx.float32)[:, None]


def _log_softmax(scores: mx.array) -> mx.array:
    return scores - mx.logsumexp(scores, axis=-1, keepdims=True)


def _one_hot(scores: mx.array) -> mx.array:
    best = mx.argmax(scores, axis=-1, keepdims=True)
    return mx.where(mx.arange(scores.shape[-1]) == best, 0.0, -_INFINITY)


def _without(scores: mx.array, tokens: Sequence[int]) -> mx.array:
    if not tokens:
        return scores
    out = mx.array(scores)
    out[..., mx.array(list(tokens))] = -_INFINITY
    return out


def _biased(scores: mx.array, rows: Sequence[Row]) -> mx.array:
    given = [(i, t, b) for i, row in enumerate(rows) for t, b in row.sampling.logit_bias.items()]
    if not given:
        return scores
    numbers, tokens, bias = zip(*given, strict=True)
    return scores.at[mx.array(numbers), mx.array(tokens)].add(mx.array(bias, dtype=mx.float32))


def _penalized(scores: mx.array, rows: Sequence[Row]) -> mx.array:
    """Repetition, presence and frequency penalties, by one gather and one scatter."""
    numbers: list[int] = []
    tokens: list[int] = []
    counts: list[int] = []
    for number, row in enumerate(rows):
        if row.sampling.penalizes:
            seen, times = row.history.counted()
            numbers += [number] * len(seen)
            tokens += seen
            counts += times
    if not tokens:
        return scores
    which, where, times_in = mx.array(numbers), mx.array(tokens), mx.array(counts)
    repetition, presence, frequency = (
        mx.array([getattr(row.sampling, name) for row in rows], dtype=mx.float32)[which]
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    )
    old = scores[which, where]
    new = mx.where(old < 0, old * repetition, old / repetition)
    new = new - frequency * times_in - mx.where(times_in > 0, presence, 0.0)
    out = mx.array(scores)
    out[which, where] = new
    return out


def _top(scores: mx.array, rows: Sequence[Row]) -> mx.array:
    """Top-k, then top-p of what is left, in one sort of as many as the rows need."""
    size = scores.shape[-1]
    ks = [min(row.sampling.top_k or size, size) for row in rows]
    ps = [row.sampling.top_p for row in rows]
    # rows that cut nothing off, and greedy ones, need no sort
    needed = [
        k
        for k, p, row in zip(ks, ps, rows, strict=True)
        if (k < size or p < 1) and not row.sampling.is_greedy
    ]
    if not needed:
        return scores
    width = max(needed)
    best = scores if width == size else mx.topk(scores, width, axis=-1)
    best = -mx.sort(-best, axis=-1)
    last = mx.array([min(k, width) - 1 for k in ks])[:, None]
    no_k = mx.array([k == size for k in ks])[:, None]
    edge = mx.where(no_k, -_INFINITY, mx.take_along_axis(best, last, axis=-1))
    scores = mx.where(scores < edge, -_INFINITY, scores)
    if all(p == 1 for p in ps):
        return scores
    share = mx.exp(best - mx.logsumexp(scores, axis=-1, keepdims=True))
    above = mx.cumsum(share, axis=-1, inclusive=False)
    kept = mx.sum(above < _column(ps), axis=-1, keepdims=True)
    edge = mx.take_along_axis(best, mx.maximum(kept, 1) - 1, axis=-1)
    no_p = mx.array([p == 1 for p in ps])[:, None]
    return mx.where((scores < edge) & ~no_p, -_INFINITY, scores)


def _min_p(scores: mx.array, rows: Sequence[Row]) -> mx.array:
    shares = [row.sampling.min_p for row in rows]
    if not any(shares):
        return scores
    edge = _column(math.log(share) if share else -_INFINITY for share in shares)
    return mx.where(scores < mx.max(scores, axis=-1, keepdims=True) + edge, -_INFINITY, scores)
