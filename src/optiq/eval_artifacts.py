"""Frozen dataclasses of scores and their comparison; see `artifacts` for the JSON form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

from optiq.artifacts import Artifact

Verdict = Literal["better", "worse", "no_difference", "not_comparable"]

CAPABILITY = {
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "ifeval": "IFEval",
    "bfcl": "BFCL-V3 simple",
    "humaneval": "HumanEval",
    "hashhop": "HashHop",
}
"""The six benchmarks of the Capability Score, by name, with their titles."""


@dataclasses.dataclass(frozen=True)
class BenchmarkScore:
    """Score of one benchmark.

    Attributes:
        task: its name.
        version: version and variant of the task.
        num_items: items; several samples of one count once.
        score_percent: mean over the items, 0..100.
        stderr_points: standard error of that over the items, in percentage points.
    """

    task: str
    version: str
    num_items: int
    score_percent: float
    stderr_points: float


@dataclasses.dataclass(frozen=True)
class BenchmarkComparison:
    """Two models on the same items of one benchmark.

    Attributes:
        task: its name.
        version: version and variant of the task.
        num_items: items.
        score_percent: mean score of the model, 0..100.
        rival_percent: that of the rival.
        delta_points: model less rival, in percentage points.
        ci_points: 95% bootstrap interval of that.
        gained: items that the model does better.
        lost: items that the rival does better.
        test: `mcnemar` for scores of 0 and 1, `permutation` for fractions.
        p_value: of that test, two-sided; of McNemar's the exact one.
        p_mid: McNemar's mid-p; None for the other test.
        p_holm: `p_value` adjusted for the number of benchmarks.
        mde_points: true difference that as many items show in 80% of the cases.
    """

    task: str
    version: str
    num_items: int
    score_percent: float
    rival_percent: float
    delta_points: float
    ci_points: tuple[float, float]
    gained: int
    lost: int
    test: Literal["mcnemar", "permutation"]
    p_value: float
    p_mid: float | None
    p_holm: float
    mde_points: float


def is_capability(rows: Sequence[BenchmarkScore] | Sequence[BenchmarkComparison]) -> bool:
    """Whether the mean of some benchmarks is the Capability Score: of the six, and of no part."""
    whole = all("partial" not in row.version.split("+") for row in rows)
    return whole and {row.task for row in rows} == set(CAPABILITY)


@dataclasses.dataclass(frozen=True)
class Overall:
    """Two models over all benchmarks: the mean of the benchmarks' means.

    Attributes:
        score_percent: of the model, 0..100.
        rival_percent: of the rival.
        delta_points: model less rival, in percentage points.
        ci_points: 95% interval of that; stratified paired bootstrap.
        p_value: sign flips of the paired differences within the benchmarks, two-sided.
        mde_points: true difference that as many items show in 80% of the cases.
    """

    score_percent: float
    rival_percent: float
    delta_points: float
    ci_points: tuple[float, float]
    p_value: float
    mde_points: float


@dataclasses.dataclass(frozen=True)
class Comparison(Artifact):
    """A model against a rival on the same items.

    Attributes:
        model: the model.
        rival: what it is compared with.
        size_bytes: bytes of the model's `model*.safetensors`; None where they are not known.
        rival_size_bytes: the same of the rival.
        benchmarks: those that both did on the same items.
        overall: over these; None if some benchmark is not comparable.
        verdict: on the model.
        reason: why, in one sentence.
        resamples: bootstrap samples and sign flips.
        seed: of both.
    """

    schema: ClassVar[str] = "optiq.comparison"
    model: str
    rival: str
    size_bytes: int | None
    rival_size_bytes: int | None
    benchmarks: tuple[BenchmarkComparison, ...]
    overall: Overall | None
    verdict: Verdict
    reason: str
    resamples: int
    seed: int
    schema_version: int = 1

    @property
    def is_capability(self) -> bool:
        """Whether the mean is the Capability Score."""
        return is_capability(self.benchmarks)

    @property
    def sentence(self) -> str:
        """The verdict and its reason, for people."""
        told = {
            "better": f"{self.model} is better than {self.rival}",
            "worse": f"{self.model} is worse than {self.rival}",
            "no_difference": f"No difference between {self.model} and {self.rival} was found",
            "not_comparable": f"{self.model} and {self.rival} are not comparable",
        }
        return f"{told[self.verdict]}: {self.reason}."
