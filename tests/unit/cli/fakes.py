"""Stand-ins for the pipeline: they record what the command line asks for."""

import dataclasses
import types
from pathlib import Path
from typing import Any

from optiq.artifacts import (
    Acceptance,
    BenchmarkResult,
    BitPlan,
    DomainFidelity,
    EvalReport,
    Fidelity,
    QuantOption,
    SensitivityTable,
    Speed,
)
from optiq.configs import AllocateConfig
from optiq.engine.events import ReasoningDelta, TextDelta
from optiq.engine.pace import DraftReport
from optiq.eval_artifacts import Comparison
from optiq.evals.compare import compare
from optiq.evals.scores import Evaluated, Scores
from optiq.quant.allocate import allocate
from tests.unit.quant.tables import PROVENANCE, llama_modules, random_table


def make_sensitivity() -> SensitivityTable:
    return random_table(llama_modules(2), seed=0)


def make_plan() -> BitPlan:
    return allocate(make_sensitivity(), AllocateConfig(target_bpw=5.0))


def make_fidelity(model: str = "model") -> Fidelity:
    return Fidelity(
        model=model,
        against="source",
        text="builtin",
        window=256,
        num_sequences=8,
        num_tokens=2048,
        kl_nats_per_token=0.0123,
        kl_se=0.0009,
        kl_p99=0.2,
        top1_agreement=0.95,
        perplexity_ratio=1.01,
        noise_floor=1e-9,
        bpw=4.99,
        size_bytes=90_000_000,
        by_domain=(DomainFidelity("prose", 0.01, 0.001, 0.96, 1024),),
        provenance=PROVENANCE,
    )


def make_speed(model: str = "model") -> Speed:
    return Speed(model, 512, 64, 3, 100.0, 20.0, 10**9, PROVENANCE)


def make_report(model: str = "model", *, whole: bool = True) -> EvalReport:
    row = BenchmarkResult("MMLU", "1", 0.5, 1000, 0.0158, (0.4691, 0.5309), 0.0, 0.002, 0)
    code = dataclasses.replace(row, title="HumanEval", n=164, pass_at={"1": 0.5, "5": 0.75})
    broken = dataclasses.replace(row, score=None, se=None, ci95=None, num_null=3)
    rows = {"mmlu": row, "humaneval": code} if whole else {"mmlu": row, "bfcl": broken}
    return EvalReport(model, None, 90_000_000, 4.99, rows, 0.5 if whole else None)


@dataclasses.dataclass
class FakePipeline(types.ModuleType):
    """`optiq.pipeline` with canned answers; `calls` holds name, arguments and keywords."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = dataclasses.field(
        default_factory=list
    )
    refusal: str | None = None
    whole: bool = True
    error: BaseException | None = None
    acceptance: Acceptance | None = None  # of a drafter, which has no fidelity

    def __post_init__(self) -> None:
        super().__init__("optiq.pipeline")

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((name, args, kwargs))
        if self.error is not None:
            raise self.error

    def preflight(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(("preflight", args, kwargs))
        return types.SimpleNamespace(
            rows=(("time", "2 min"), ("memory", "1 GB")), refusal=self.refusal
        )

    def measure(self, *args: Any) -> SensitivityTable:
        self._note("measure", args, {})
        return make_sensitivity()

    def convert(self, source: str, out: Path, **kwargs: Any) -> Any:
        self._note("convert", (source, out), kwargs)
        return types.SimpleNamespace(
            path=out,
            plan=make_plan(),
            fidelity=None if self.acceptance else make_fidelity(str(out)),
            rivals=(make_fidelity("uniform 4/64"),) if kwargs["convert"].rival else (),
            acceptance=self.acceptance,
            card=out / "README.md",
        )

    def judge(self, model: Path, *, baselines: tuple[Path, ...], **kwargs: Any) -> list[Fidelity]:
        self._note("judge", (model,), {"baselines": baselines, **kwargs})
        return [make_fidelity(str(path)) for path in (model, *baselines)]

    def baseline(self, source: str, like: Path, out: Path, **kwargs: Any) -> Any:
        self._note("baseline", (source, like, out), kwargs)
        return types.SimpleNamespace(
            path=out,
            option=QuantOption("affine", 5, 64),
            size_bytes=95 * 10**6,
            like_bytes=9 * 10**7,
        )

    def evaluate(self, model: Path | None, logs: Path | None, **kwargs: Any) -> Any:
        self._note("evaluate", (model, logs), kwargs)
        report = make_report(str(model), whole=self.whole)
        return types.SimpleNamespace(report=report, logs=logs or Path("cache/eval"))

    def compare(self, *args: Any) -> Comparison:
        self._note("compare", args, {})
        scores = {"mmlu": Scores("mmlu", "1", ("a", "b", "c"), (1.0, 0.0, 1.0))}
        return compare(Evaluated("mine", 10, scores), Evaluated("rival", 10, scores))

    def estimate(self, *args: Any) -> Any:
        self._note("estimate", args, {})
        return [("mmlu", "1,000 answers, up to about 5 min")]

    def rival_of(self, *args: Any) -> Path:
        self._note("rival_of", args, {})
        return Path("work/rival")

    def response_file(self, *args: Any, **kwargs: Any) -> Any:
        self._note("response_file", args, kwargs)
        return "file"

    def score_responses(self, file: Any, logs: Path | None, **kwargs: Any) -> Any:
        self._note("score_responses", (file, logs), kwargs)
        return types.SimpleNamespace(report=make_report(), logs=Path("logs"))

    def rescore(self, *args: Any) -> Any:
        self._note("rescore", args, {})
        return types.SimpleNamespace(report=make_report(), logs=args[0])

    def bench(self, *args: Any) -> Speed:
        self._note("bench", args, {})
        return make_speed(str(args[0]))

    def generate(self, *args: Any) -> Any:
        self._note("generate", args, {})
        return Written()


class Written(list[Any]):
    """A generation that is over."""

    acceptance = DraftReport("ngram", 2, 1, 8, 5, 8, 1.5)

    def __init__(self) -> None:
        super().__init__([ReasoningDelta("Hm."), TextDelta("Blue "), TextDelta("light.")])
