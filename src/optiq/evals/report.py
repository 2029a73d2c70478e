"""From records to scores: of a benchmark, and the Capability Score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import special, stats

from optiq.artifacts import BenchmarkResult, EvalLog, EvalReport, SubjectInfo
from optiq.eval_artifacts import CAPABILITY
from optiq.evals.log import ItemRecord

_PASS_AT = (1, 5, 10, 50, 100)


def finished(header: EvalLog, records: Sequence[ItemRecord]) -> EvalLog:
    """The header with what its records say.

    The score of an item is the mean over its answers, that of the benchmark the mean over items;
    there is none where the harness failed on an answer.
    """
    nulls = sum(record.score.value is None for record in records)
    means = _item_means(records)
    known = bool(means) and not nulls
    return dataclasses.replace(
        header,
        complete=True,
        score_percent=100 * float(np.mean(means)) if known else None,
        se_percent=100 * _standard_error(means) if known and len(means) > 1 else None,
        num_answers=len(records),
        num_truncated=sum(r.response is not None and r.response.truncated for r in records),
        num_looped=sum(record.looped for record in records),
        num_null=nulls,
        pass_at=_pass_at(records) if known else {},
    )


def _by_item(records: Iterable[ItemRecord]) -> list[list[float]]:
    """Values of every item, of those that were scored."""
    values: dict[str, list[float]] = {}
    for record in records:
        if record.score.value is not None:
            values.setdefault(record.id, []).append(record.score.value)
    return list(values.values())


def _item_means(records: Iterable[ItemRecord]) -> list[float]:
    return [sum(values) / len(values) for values in _by_item(records)]


def _standard_error(means: Sequence[float]) -> float:
    return float(np.std(means, ddof=1) / math.sqrt(len(means)))


def _pass_at(records: Sequence[ItemRecord]) -> dict[str, float]:
    """Unbiased pass@k of right-or-wrong answers, for every k that all items have answers for.

    Reference: Chen et al. 2021, Evaluating Large Language Models Trained on Code, section 2.1: of n
        answers with c right, 1 - C(n - c, k) / C(n, k).
    """
    groups = _by_item(records)
    fewest = min(map(len, groups))
    if fewest < 2 or any(value not in {0.0, 1.0} for group in groups for value in group):
        return {}
    sizes = np.array([len(group) for group in groups], np.float64)
    wrong = sizes - np.array([sum(group) for group in groups])
    return {
        str(k): float(np.mean(1 - special.binom(wrong, k) / special.binom(sizes, k)))
        for k in _PASS_AT
        if k <= fewest
    }


def interval(means: Sequence[float]) -> tuple[float, float] | None:
    """95% confidence interval of a mean of values 0..1.

    Returns:
        Wilson's where every value is 0 or 1, else from the t distribution, cut at 0 and 1; None for
        fewer than two values.
    """
    if len(means) < 2:
        return None
    if all(value in {0.0, 1.0} for value in means):
        test = stats.binomtest(int(sum(means)), len(means))
        found = test.proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)
    half = float(stats.t.ppf(0.975, len(means) - 1)) * _standard_error(means)
    middle = float(np.mean(means))
    return max(0.0, middle - half), min(1.0, middle + half)


def report(
    subject: SubjectInfo, logs: Mapping[str, tuple[EvalLog, Sequence[ItemRecord]]]
) -> EvalReport:
    """The report over complete logs of one model.

    Args:
        subject: the model.
        logs: header and records by task.

    Returns:
        Benchmarks in the order of cards, others after them. `mean` is there if all six are.
    """
    order = [name for name in CAPABILITY if name in logs] + [
        n for n in sorted(logs) if n not in CAPABILITY
    ]
    benchmarks = {name: _result(*logs[name]) for name in order}
    scores = [benchmarks[name].score for name in CAPABILITY if name in benchmarks]
    partial = any(
        "partial" in benchmarks[n].version.split("+") for n in CAPABILITY if n in benchmarks
    )
    known = [score for score in scores if score is not None]
    whole = len(known) == len(CAPABILITY) and not partial
    return EvalReport(
        model=subject.name,
        source=subject.source,
        size_bytes=subject.size_bytes,
        bpw=subject.bpw,
        benchmarks=benchmarks,
        mean=sum(known) / len(CAPABILITY) if whole else None,
    )


def _result(header: EvalLog, records: Sequence[ItemRecord]) -> BenchmarkResult:
    score, se = header.score_percent, header.se_percent
    return BenchmarkResult(
        title=header.title,
        version=header.version,
        score=None if score is None else score / 100,
        n=header.num_items,
        se=None if se is None else se / 100,
        ci95=None if score is None else interval(_item_means(records)),
        truncated=header.num_truncated / max(1, header.num_answers),
        looped=header.num_looped / max(1, header.num_answers),
        num_null=header.num_null,
        pass_at=header.pass_at,
    )
