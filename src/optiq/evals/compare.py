"""Is one model better than another? Paired statistics of two evaluations, and one verdict.

Docs: docs/statistics.md says how to read the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from optiq.eval_artifacts import BenchmarkComparison, Comparison, Overall, Verdict
from optiq.evals.scores import Evaluated, Scores
from optiq.evals.stats import (
    ALPHA,
    Floats,
    bootstrap_means,
    detectable,
    holm,
    interval,
    mcnemar,
    sign_flip_p,
    standard_error,
)

RESAMPLES = 10_000
_EQUAL_BYTES = 1.01
_NAMED_PROBLEMS = 3


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Scores of both models, item by item."""

    task: str
    version: str
    model: Floats
    rival: Floats

    @property
    def differences(self) -> Floats:
        return self.model - self.rival

    @property
    def is_binary(self) -> bool:
        return bool(np.isin(np.concatenate([self.model, self.rival]), (0.0, 1.0)).all())


def compare(
    model: Evaluated, rival: Evaluated, *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Compare a model with a rival on the same items.

    Args:
        model: whose verdict it is.
        rival: the other.
        resamples: bootstrap samples, and sign flips where p is not exact.
        seed: of both; equal seeds give equal figures.

    Returns:
        Figures of every benchmark that can be compared; those over all of them only if every one
        can; the verdict with its reason.

    Cost: a tenth of a second for six benchmarks of a thousand items.
    """
    pairs, problems = _paired(model, rival)
    rng = np.random.default_rng(seed)
    means = [bootstrap_means(pair.differences, resamples, rng) for pair in pairs]
    rows = [_row(pair, mean, resamples, rng) for pair, mean in zip(pairs, means, strict=True)]
    adjusted = holm([row.p_value for row in rows])
    rows = [
        dataclasses.replace(row, p_holm=p_holm) for row, p_holm in zip(rows, adjusted, strict=True)
    ]
    overall = None if problems or not pairs else _overall(pairs, means, resamples, rng)
    found, reason = verdict(overall, model.size_bytes, rival.size_bytes, problems)
    return Comparison(
        model=model.name,
        rival=rival.name,
        size_bytes=model.size_bytes,
        rival_size_bytes=rival.size_bytes,
        benchmarks=tuple(rows),
        overall=overall,
        verdict=found,
        reason=reason,
        resamples=resamples,
        seed=seed,
    )


def verdict(
    overall: Overall | None,
    size_bytes: int | None,
    rival_size_bytes: int | None,
    problems: Sequence[str] = (),
) -> tuple[Verdict, str]:
    """The one verdict on a model, with its reason.

    The scores differ if the 95% interval of the difference excludes 0 and the permutation test
    agrees (p at most 0.05): where few items differ the bootstrap interval is too narrow.

    - better: the scores differ in favour of the model, and its file is not more than 1% larger.
    - worse: the rival is better in the same sense, so its file is not more than 1% larger. Verdicts
      on (A, B) and (B, A) mirror each other.
    - not_comparable: bytes are not known; items, versions or prompts differ; or the scores differ
      in favour of a file that is more than 1% larger, which says nothing of equal bytes.
    - no_difference: otherwise.

    Args:
        overall: figures over all benchmarks; None if there are none.
        size_bytes: of the model.
        rival_size_bytes: of the rival.
        problems: what cannot be compared.
    """
    if problems or overall is None:
        more = len(problems) - _NAMED_PROBLEMS
        named = "; ".join(problems[:_NAMED_PROBLEMS]) or "there is no benchmark to compare"
        return "not_comparable", named + (f"; and {more} more" if more > 0 else "")
    if not size_bytes or not rival_size_bytes:
        which = "the model" if not size_bytes else "the rival"
        return "not_comparable", f"the bytes of {which} are not known"
    low, high = overall.ci_points
    found = f"{overall.delta_points:+.2f} points (95% interval {low:+.2f} to {high:+.2f})"
    if low <= 0 <= high:
        shows = f"a true difference of {overall.mde_points:.2f} points would show in 80% of cases"
        return "no_difference", f"{found}; with these items {shows}"
    if overall.p_value > ALPHA:
        return "no_difference", (
            f"{found}, but p = {overall.p_value:.2g} by sign flips: too few items differ; "
            f"detectable would be {overall.mde_points:.2f} points"
        )
    is_better = low > 0
    ratio = size_bytes / rival_size_bytes
    if (ratio if is_better else 1 / ratio) > _EQUAL_BYTES:
        which = "more" if is_better else "less"
        return "not_comparable", (
            f"{found}, but the model's file is {_size(ratio)}: it scores {which} and takes {which}"
        )
    return ("better" if is_better else "worse"), f"{found}, with a file that is {_size(ratio)}"


def _size(ratio: float) -> str:
    """A ratio of two sizes in words."""
    percent = 100 * abs(ratio - 1)
    if percent < 0.05:
        return "as large"
    return f"{percent:.1f}% {'larger' if ratio > 1 else 'smaller'}"


def _paired(model: Evaluated, rival: Evaluated) -> tuple[list[_Pair], list[str]]:
    """Benchmarks that can be compared, and why others cannot."""
    pairs, problems = [], []
    for task in dict.fromkeys([*model.scores, *rival.scores]):
        ours, theirs = model.scores.get(task), rival.scores.get(task)
        if ours is None or theirs is None:
            name = model.name if ours is None else rival.name
            problems.append(f"{name} has no results of {task}")
        elif problem := _problem(ours, theirs):
            problems.append(f"{task}: {problem}")
        else:
            by_id = dict(zip(theirs.ids, theirs.values, strict=True))
            other = np.array([by_id[name] for name in ours.ids])
            pairs.append(_Pair(task, ours.version, np.array(ours.values), other))
    return pairs, problems


def _problem(ours: Scores, theirs: Scores) -> str | None:
    """Why scores of one benchmark are not comparable."""
    if ours.version != theirs.version:
        return f"task versions differ ({ours.version} and {theirs.version})"
    if set(ours.ids) != set(theirs.ids):
        here, there = len(set(ours.ids) - set(theirs.ids)), len(set(theirs.ids) - set(ours.ids))
        return f"items differ ({here} of the model's only, {there} of the rival's only)"
    if ours.prompts and theirs.prompts and ours.prompts != theirs.prompts:
        return "the prompts, or the most tokens of an answer, differ"
    failed = sum(math.isnan(value) for value in (*ours.values, *theirs.values))
    if failed:
        return f"the harness failed on {failed} items, which have no score"
    return None if ours.ids else "there are no items"


def _row(
    pair: _Pair, means: Floats, resamples: int, rng: np.random.Generator
) -> BenchmarkComparison:
    """Figures of one benchmark; `p_holm` is still to come."""
    differences = pair.differences
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    p_mid = None
    if pair.is_binary:
        p_value, p_mid = mcnemar(gained, lost)
    else:
        p_value = sign_flip_p(differences, resamples, rng)
    low, high = interval(100 * means)
    return BenchmarkComparison(
        task=pair.task,
        version=pair.version,
        num_items=len(differences),
        score_percent=100 * float(pair.model.mean()),
        rival_percent=100 * float(pair.rival.mean()),
        delta_points=100 * float(differences.mean()),
        ci_points=(low, high),
        gained=gained,
        lost=lost,
        test="permutation" if p_mid is None else "mcnemar",
        p_value=p_value,
        p_mid=p_mid,
        p_holm=p_value,
        mde_points=100 * detectable(standard_error([differences])),
    )


def _overall(
    pairs: Sequence[_Pair], means: Sequence[Floats], resamples: int, rng: np.random.Generator
) -> Overall:
    """Figures of the mean of the benchmarks' means."""
    differences = [pair.differences for pair in pairs]
    weighted = np.concatenate([d / len(d) for d in differences])
    return Overall(
        score_percent=100 * float(np.mean([pair.model.mean() for pair in pairs])),
        rival_percent=100 * float(np.mean([pair.rival.mean() for pair in pairs])),
        delta_points=100 * float(np.mean([d.mean() for d in differences])),
        ci_points=interval(100 * np.mean(means, axis=0)),
        p_value=sign_flip_p(weighted, resamples, rng),
        mde_points=100 * detectable(standard_error(differences)),
    )
