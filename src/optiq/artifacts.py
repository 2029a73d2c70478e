"""Frozen dataclasses that pass between stages, and their JSON form.

Each artifact is one JSON file. `save` writes it atomically (temporary file, fsync, rename), `load`
validates it and refuses a schema newer than this version of optiq.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from optiq.errors import ArtifactMismatch, UsageError

Role = Literal["linear", "embedding", "head", "expert", "router"]
OptionKind = Literal["affine", "lattice", "keep"]
Method = Literal["fisher", "exact", "static"]
Rounding = Literal["rtn", "search", "gptq"]
Scoring = Literal["exact", "ratio", "none"]
OptionValue = bool | int | str | tuple[str, ...] | None

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
LATTICE_GROUP_SIZE = 32


@dataclasses.dataclass(frozen=True)
class ModuleInfo:
    """One matrix that can be quantized.

    Attributes:
        path: module path in the model tree, without `.weight`.
        role: what the matrix does; `embedding` with `tied` is also the head.
        shape: shape of the weight, `(out, in)` or `(experts, out, in)`; groups run along `in`.
        tied: the embedding is also the output head.
        active: share of the module's weights read for one token (experts: top_k / experts; untied
            embedding: ~0).
    """

    path: str
    role: Role
    shape: tuple[int, ...]
    tied: bool = False
    active: float = 1.0

    @property
    def in_dims(self) -> int:
        """Length of a row, along which groups run."""
        return self.shape[-1]

    @property
    def num_params(self) -> int:
        """Number of weights."""
        return functools.reduce(lambda a, b: a * b, self.shape, 1)


@dataclasses.dataclass(frozen=True, order=True)
class QuantOption:
    """One way to store a matrix.

    Attributes:
        kind: `affine` codes, `lattice` (affine 4/32 with the grid the weights lie on), or `keep`
            (source dtype).
        bits: bits of a code; 16 for `keep`.
        group_size: weights that share a scale and bias; 0 for `keep`.
    """

    kind: OptionKind
    bits: int
    group_size: int

    @property
    def key(self) -> str:
        """Short name: `4/64`, `lattice` or `keep`."""
        return self.kind if self.kind != "affine" else f"{self.bits}/{self.group_size}"

    def size_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Stored bytes of a matrix: codes, scales and biases.

        Args:
            shape: weight shape, groups along the last axis.
            itemsize: bytes of one scale, bias or kept weight (2 for bfloat16 and float16).
        """
        num_params = functools.reduce(lambda a, b: a * b, shape, 1)
        if self.kind == "keep":
            return num_params * itemsize
        return num_params * self.bits // 8 + 2 * itemsize * (num_params // self.group_size)

    @classmethod
    def parse(cls, text: str) -> QuantOption:
        """Read `4/64`, `lattice`, `keep` or `bf16` (keep in the source dtype).

        Raises:
            UsageError: for anything else.
        """
        if text in {"keep", "bf16"}:
            return KEEP
        if text == "lattice":
            return LATTICE
        bits, slash, group = text.partition("/")
        if slash and bits.isdecimal() and group.isdecimal():
            option = cls("affine", int(bits), int(group))
            if option.bits in BITS and option.group_size in GROUP_SIZES:
                return option
        raise UsageError(
            f"'{text}' is no quantization option: give BITS/GROUP with bits {list(BITS)} and group "
            f"{list(GROUP_SIZES)}, or 'bf16' (keep), or 'lattice'"
        )


KEEP = QuantOption("keep", 16, 0)
LATTICE = QuantOption("lattice", 4, LATTICE_GROUP_SIZE)


def menu(in_dims: int) -> tuple[QuantOption, ...]:
    """Affine options that a row of `in_dims` weights can take, smallest bits first."""
    return tuple(
        QuantOption("affine", bits, group)
        for bits in BITS
        for group in sorted(GROUP_SIZES, reverse=True)
        if in_dims % group == 0
    )


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """What a stage needs to know of the source without opening it.

    Attributes:
        name: directory, hub id or GGUF file as the user gave it.
        revision: commit of a hub source, else None.
        fingerprint: hash over shard names, sizes and headers, config and tokenizer.
        model_type: `model_type` of config.json.
        dtype: dtype of the weights, which scales and biases take: bfloat16, float16 or float32.
        size_bytes: bytes of the source's weight files.
        fixed_bytes: bytes of tensors that are never quantized (norms, biases, buffers).
    """

    name: str
    revision: str | None
    fingerprint: str
    model_type: str
    dtype: str
    size_bytes: int
    fixed_bytes: int

    @property
    def itemsize(self) -> int:
        """Bytes of one value of `dtype`."""
        return 4 if self.dtype == "float32" else 2


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Versions and machine that made an artifact.

    Holds no time, so that equal runs give equal files.
    """

    optiq: str
    mlx: str
    mlx_lm: str
    device: str
    blas: str


@dataclasses.dataclass(frozen=True)
class LatticeReport:
    """What the grid search found in one matrix.

    Attributes:
        kind: `q4_0` (bias = -8 scale), `affine` (scale and bias per block) or `none`.
        exact: every value is reproduced after rounding to the source dtype.
        blocks: share of blocks on the grid, 0..1.
        residual: largest distance from the grid in units of the block's scale.
    """

    kind: Literal["q4_0", "affine", "none"]
    exact: bool
    blocks: float
    residual: float


@dataclasses.dataclass(frozen=True)
class OptionScore:
    """Cost in quality and bytes of one option for one module.

    Attributes:
        option: the option.
        kl_nats_per_token: KL(source || source with only this module quantized so).
        stderr: standard error of that, clustered by sequence.
        size_bytes: stored bytes.
        scoring: `exact` (scored with the rounded weights themselves), `ratio` (min/max score times
            the ratio of weighted errors on sampled rows) or `none` (static method).
    """

    option: QuantOption
    kl_nats_per_token: float
    stderr: float
    size_bytes: int
    scoring: Scoring


@dataclasses.dataclass(frozen=True)
class ModuleScores:
    """All options of one module."""

    module: ModuleInfo
    scores: tuple[OptionScore, ...]
    lattice: LatticeReport

    def score(self, option: QuantOption) -> OptionScore:
        """The score of an option.

        Raises:
            ArtifactMismatch: if the table has no such option.
        """
        for score in self.scores:
            if score.option == option:
                return score
        raise ArtifactMismatch(
            f"{self.module.path} was not measured at '{option.key}'; it has "
            f"{[s.option.key for s in self.scores]}"
        )


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is whole or absent: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _adapter(cls: Any) -> Any:  # noqa: ANN401
    from pydantic import TypeAdapter  # noqa: PLC0415  0.1 s, only when JSON is read

    return TypeAdapter(cls)


class Artifact:
    """Mixin: JSON form of a frozen dataclass with a schema version."""

    # JSON has no NaN and no infinity: they are written as strings, which validation reads back.
    __pydantic_config__: ClassVar[dict[str, str]] = {"ser_json_inf_nan": "strings"}

    schema: ClassVar[str]
    schema_version: int

    def to_json(self) -> str:
        """JSON text, keys in field order, ending in a newline."""
        text: str = _adapter(type(self)).dump_json(self, indent=1).decode()
        return (
            json.dumps({"schema": self.schema} | json.loads(text), indent=1, ensure_ascii=False)
            + "\n"
        )

    def save(self, path: Path) -> None:
        """Write atomically."""
        write_atomic(path, self.to_json().encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and validate.

        Raises:
            UsageError: if the file is missing or no JSON.
            ArtifactMismatch: if it is another artifact, of a newer schema, or does not validate.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(
                f"{path} does not exist; give the path of a {cls.schema} file"
            ) from None
        except (ValueError, OSError, RecursionError) as error:
            raise UsageError(f"{path} cannot be read as JSON ({error}); make it again") from None
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: object, where: str) -> Self:
        """Validate parsed JSON; `where` names it in errors."""
        if not isinstance(data, dict) or data.get("schema") != cls.schema:
            raise ArtifactMismatch(f"{where} is no {cls.schema} artifact of optiq")
        version = data.get("schema_version")
        if type(version) is not int or version < 1:
            raise ArtifactMismatch(f"{where} has no schema version but {version!r}; make it again")
        if version > cls.schema_version:
            raise ArtifactMismatch(
                f"{where} has schema version {version}, this optiq reads up to "
                f"{cls.schema_version}; update optiq"
            )
        try:
            result: Self = _adapter(cls).validate_python(
                {k: v for k, v in data.items() if k != "schema"}
            )
        except ValueError as error:
            summary = " ".join(line.strip() for line in str(error).splitlines()[:3])
            raise ArtifactMismatch(f"{where} does not validate: {summary}") from None
        return result


@dataclasses.dataclass(frozen=True)
class SensitivityTable(Artifact):
    """KL of every option of every module; serves every later target.

    Attributes:
        source: the source that was measured.
        method: how; `fisher` (streamed sketch), `exact` (one at a time) or `static` (no data).
        reference: `source`, or `uniform4` for comparison with published quants.
        rounding: the rounding that the scores assume; convert must use the same.
        modules: scores by module, in model order.
        num_tokens: calibration tokens.
        num_probes: sequences x draws of the sketch, 0 for other methods.
        calibration: name and hash of the calibration text.
        checks: reliability figures, such as `split_half`, `verify_spearman`, `verify_ratio`.
        provenance: versions and machine.
        calibration_mix: calibration windows by domain.
    """

    schema: ClassVar[str] = "optiq.sensitivity"
    source: SourceInfo
    method: Method
    reference: Literal["source", "uniform4"]
    rounding: Rounding
    modules: tuple[ModuleScores, ...]
    num_tokens: int
    num_probes: int
    calibration: str
    checks: dict[str, float]
    provenance: Provenance
    calibration_mix: dict[str, int] = dataclasses.field(default_factory=dict)
    schema_version: int = 1

    @property
    def num_params(self) -> int:
        """Weights of all modules that can be quantized."""
        return sum(m.module.num_params for m in self.modules)


@dataclasses.dataclass(frozen=True)
class PlanEntry:
    """The option chosen for one module."""

    path: str
    role: Role
    shape: tuple[int, ...]
    option: QuantOption
    size_bytes: int
    kl_nats_per_token: float


@dataclasses.dataclass(frozen=True)
class BitPlan(Artifact):
    """Bits per module under a budget.

    Attributes:
        source: the source the plan is for.
        entries: one per module, in model order.
        target: what was asked, for instance `4.5 bpw`.
        rounding: the rounding that convert must use.
        bpw: stored bits per weight over the entries.
        size_bytes: stored bytes of the entries.
        model_bytes: predicted bytes of `model*.safetensors`, headers included.
        predicted_kl: sum of the entries' KL, in nats per token.
        gap: certified bound on (predicted_kl - optimum) / optimum.
    """

    schema: ClassVar[str] = "optiq.plan"
    source: SourceInfo
    entries: tuple[PlanEntry, ...]
    target: str
    rounding: Rounding
    bpw: float
    size_bytes: int
    model_bytes: int
    predicted_kl: float
    gap: float
    schema_version: int = 1


@dataclasses.dataclass(frozen=True)
class DomainFidelity:
    """Fidelity on one domain of the held-out text."""

    domain: str
    kl_nats_per_token: float
    kl_se: float
    top1_agreement: float
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class PartFidelity:
    """KL on a part of the positions.

    Attributes:
        part: what they have in common: `0-63` of their windows, or a language.
        kl_nats_per_token: mean KL.
        kl_se: its standard error, clustered by window; None for a single position.
        num_tokens: positions.
    """

    part: str
    kl_nats_per_token: float
    kl_se: float | None
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class WorstToken:
    """A position where the model is far from its source.

    Attributes:
        domain: of its window.
        position: in its window, from 0.
        context: the text before, cut to its end.
        following: the token that follows in the text; None at the end of a window.
        kl_nats: KL at the position.
        source_token: what the source holds most likely.
        source_probability: how likely, 0..1.
        model_token: what the model holds most likely.
        model_probability: how likely, 0..1.
    """

    domain: str
    position: int
    context: str
    following: str | None
    kl_nats: float
    source_token: str
    source_probability: float
    model_token: str
    model_probability: float


@dataclasses.dataclass(frozen=True)
class Depth:
    """Where a model is far from its source (`optiq judge --deep`).

    Attributes:
        by_position: by position in the window, in doubling steps.
        by_language: by language of the record, where records have one; else empty.
        worst_share: share of all KL on the worst hundredth of the positions, 0..1.
        tail_source: mean probability that the source gives to the tokens to which it gives less
            than 1e-4 each.
        tail_model: mean probability that the model gives to the same tokens.
        worst: the positions with the largest KL, worst first.
    """

    by_position: tuple[PartFidelity, ...]
    by_language: tuple[PartFidelity, ...]
    worst_share: float
    tail_source: float
    tail_model: float
    worst: tuple[WorstToken, ...]


@dataclasses.dataclass(frozen=True)
class Fidelity(Artifact):
    """Agreement of a quantized model with its source on held-out text.

    Attributes:
        model: directory that was judged.
        against: the source.
        text: name and hash of the held-out text.
        window: tokens of a window.
        num_sequences: windows, the clusters of the standard errors.
        num_tokens: scored positions.
        kl_nats_per_token: mean KL(source || model).
        kl_se: its standard error, clustered by sequence.
        kl_p99: 99th percentile over positions.
        top1_agreement: share of positions with the same most likely token, 0..1.
        perplexity_ratio: perplexity of the model over that of the source.
        noise_floor: mean KL of the source against itself in its stored precision.
        bpw: stored bits per weight.
        size_bytes: bytes of `model*.safetensors`.
        by_domain: the same by domain.
        depth: where the divergence is, if it was asked for.
    """

    schema: ClassVar[str] = "optiq.fidelity"
    model: str
    against: str
    text: str
    window: int
    num_sequences: int
    num_tokens: int
    kl_nats_per_token: float
    kl_se: float
    kl_p99: float
    top1_agreement: float
    perplexity_ratio: float
    noise_floor: float
    bpw: float
    size_bytes: int
    by_domain: tuple[DomainFidelity, ...]
    provenance: Provenance
    depth: Depth | None = None
    schema_version: int = 1


@dataclasses.dataclass(frozen=True)
class SubjectInfo:
    """What a log tells of the model that answered.

    Attributes:
        kind: `local` (a directory, in process), `served` (a URL) or `responses` (a file).
        name: the directory, the model name at the URL, or the file.
        fingerprint: hash over the files of the model, or over where the answers came from.
        size_bytes: bytes of `model*.safetensors`; None where they are not known.
        bpw: stored bits per weight; None where it is not known.
        source: what a directory of ours was made from, else None.
        bos: token put in front of raw text; None for none.
        template: hash of the chat template; None for none.
        stop: tokens that end an answer.
        thinking: `off`, `on`, or `server` where only the server knows.
        sampling: `greedy`, or the settings of the checkpoint's own sampling.
        batch_size: sequences computed together, which answers depend on at rounding level; None
            where it is not known.
    """

    kind: Literal["local", "served", "responses"]
    name: str
    fingerprint: str
    size_bytes: int | None = None
    bpw: float | None = None
    source: str | None = None
    bos: str | None = None
    template: str | None = None
    stop: tuple[str, ...] = ()
    thinking: Literal["off", "on", "server"] = "off"
    sampling: str = "greedy"
    batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class EvalLog(Artifact):
    """The header of one benchmark's log; the records are in `<task>.jsonl` beside it.

    Attributes:
        task: name of the benchmark.
        title: its name on a card.
        version: version and variant of the task; logs of two versions are not compared.
        fingerprint: hash of all that the records depend on; a run goes on where it is the same.
        options: the options of the run, by field of `EvalConfig`.
        subject: the model.
        items: hash of the items.
        prompts: hash of the prompts, in order; None where answers came from elsewhere.
        num_items: items that were asked.
        num_samples: answers wanted for each of them; 0 where that differs.
        complete: every answer is there and scored, if perhaps with null.
        score_percent: mean over items of the mean over an item's answers; None before the end, and
            where the harness failed on an item.
        se_percent: its standard error, clustered by item.
        num_answers: records.
        num_truncated: answers cut by the limit of tokens.
        num_looped: answers that end in a cycle.
        num_null: answers that the harness failed to get or to score.
        pass_at: `k` -> estimate of pass@k as a fraction, where an item has several answers.
        provenance: versions and machine.
    """

    schema: ClassVar[str] = "optiq.eval_log"
    task: str
    title: str
    version: str
    fingerprint: str
    options: dict[str, OptionValue]
    subject: SubjectInfo
    items: str
    prompts: str | None
    num_items: int
    num_samples: int
    provenance: Provenance
    complete: bool = False
    score_percent: float | None = None
    se_percent: float | None = None
    num_answers: int = 0
    num_truncated: int = 0
    num_looped: int = 0
    num_null: int = 0
    pass_at: dict[str, float] = dataclasses.field(default_factory=dict)
    schema_version: int = 1


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """One row of a report; fractions, 0..1.

    Attributes:
        title: the benchmark's name on a card.
        version: version and variant of the task.
        score: None where the harness failed on an item.
        n: items.
        se: standard error of `score`, clustered by item.
        ci95: Wilson interval where every item is right or wrong, else from the t distribution.
        truncated: share of answers cut by the limit of tokens.
        looped: share of answers that end in a cycle.
        num_null: answers that the harness failed to get or to score.
        pass_at: `k` -> pass@k, where an item has several answers.
    """

    title: str
    version: str
    score: float | None
    n: int
    se: float | None
    ci95: tuple[float, float] | None
    truncated: float
    looped: float
    num_null: int
    pass_at: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EvalReport(Artifact):
    """What the logs of one model say.

    Attributes:
        model: its name.
        source: what it was made from, if that is known.
        size_bytes: bytes of `model*.safetensors`; None where they are not known.
        bpw: stored bits per weight; None where it is not known.
        benchmarks: results by name of the benchmark.
        mean: mean score of the six as a fraction, the Capability Score; None unless all are there,
            whole and without failures of the harness.
    """

    schema: ClassVar[str] = "optiq.eval_report"
    model: str
    source: str | None
    size_bytes: int | None
    bpw: float | None
    benchmarks: dict[str, BenchmarkResult]
    mean: float | None
    schema_version: int = 1


@dataclasses.dataclass(frozen=True)
class Acceptance(Artifact):
    """How often a drafter is right, on text that its target would have written itself.

    Tuples have an entry for each draft of a round, the first draft first: those that counted (the
    target agrees with the text up to there, and all drafts before were right) and those of them
    that were right.

    Attributes:
        drafter: directory that was judged.
        target: model it drafts for.
        text: name and hash of the text.
        num_tokens: tokens of the text.
        tried: of the drafter.
        accepted: of the drafter.
        source_tried: of what it was made from.
        source_accepted: of what it was made from.
    """

    schema: ClassVar[str] = "optiq.acceptance"
    drafter: str
    target: str
    text: str
    num_tokens: int
    tried: tuple[int, ...]
    accepted: tuple[int, ...]
    source_tried: tuple[int, ...]
    source_accepted: tuple[int, ...]
    provenance: Provenance
    schema_version: int = 1


@dataclasses.dataclass(frozen=True)
class Speed(Artifact):
    """Speed of a model directory on one machine (`optiq bench`)."""

    schema: ClassVar[str] = "optiq.speed"
    model: str
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill_tps: float
    decode_tps: float
    peak_memory_bytes: int
    provenance: Provenance
    schema_version: int = 1


@dataclasses.dataclass(frozen=True)
class RunRecord(Artifact):
    """What tells one run from another that gives the same model; kept apart from the rest.

    Attributes:
        date: UTC, ISO 8601.
        source_path: absolute path of a local source, else None.
        tokenizer: absolute path of the tokenizer directory that was given, else None.
        options: words of the command line that ask for the same; of paths, the last part. None in
            records of older versions.
        license: of the source, as its card says: `license`, `license_name`, `license_link`.
    """

    schema: ClassVar[str] = "optiq.run"
    date: str
    source_path: str | None
    tokenizer: str | None
    options: tuple[str, ...] | None = None
    license: dict[str, str] = dataclasses.field(default_factory=dict)
    schema_version: int = 1

    @classmethod
    def now(cls, source: str, tokenizer: Path | None) -> Self:
        """The record of a run that ends now."""
        path = Path(source).expanduser()
        return cls(
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            source_path=str(path.resolve()) if path.exists() else None,
            tokenizer=str(tokenizer.resolve()) if tokenizer else None,
        )
