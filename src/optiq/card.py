"""Artifacts -> README.md of a model directory."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from optiq import metadata
from optiq.artifacts import KEEP, LATTICE, BitPlan, Fidelity, PlanEntry, SensitivityTable, Speed
from optiq.eval_artifacts import (
    CAPABILITY,
    BenchmarkComparison,
    BenchmarkScore,
    Comparison,
    is_capability,
)
from optiq.numerics.size import bpw, format_size

Row = tuple[str, ...]

PICTURES = {"bits": "optiq/bits.svg", "kl": "optiq/kl.svg"}
"""Picture -> its file in the model directory."""
SIDE_MODELS = {"optiq_vision.safetensors": "Vision", "optiq_drafter.safetensors": "Drafter"}
"""Files beside the language model -> what they are on a card."""

_SMALL_SAMPLE = 100  # items; the six benchmarks have more

_METHODS = {"fisher": "streamed Fisher sketch", "exact": "one matrix at a time"}
_ROUNDINGS = {
    "rtn": "to nearest",
    "search": "range search and weighted least squares",
    "gptq": "range search, weighted least squares, GPTQ with static groups",
}
_REFERENCES = {"source": "the source itself", "uniform4": "its uniform 4-bit quantization"}


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card is written from; every figure on it is one of these.

    Attributes:
        name: of the model, as it is to be loaded: its directory, or its repository.
        plan: bits of every matrix.
        size_bytes: bytes of `model*.safetensors`.
        table: the measurement behind the plan; None where a plan was given instead.
        fidelity: the model on held-out text.
        rivals: other models on the same text, for the same source.
        speed: from `optiq bench`, if it ran.
        scores: of its benchmarks.
        asked: words after `optiq eval NAME` that ask the benchmarks again, a line each.
        cut_off: share of the answers to a benchmark that the limit of tokens cut off.
        comparison: with a baseline on the same items.
        options: words of the command line that made the model; None if not known.
        license: of the source, under the keys of the metadata block.
        side_models: bytes of `SIDE_MODELS` that are there.
        pictures: names of `PICTURES` that are there.
    """

    name: str
    plan: BitPlan
    size_bytes: int
    table: SensitivityTable | None = None
    fidelity: Fidelity | None = None
    rivals: Sequence[Fidelity] = ()
    speed: Speed | None = None
    scores: Sequence[BenchmarkScore] = ()
    asked: Sequence[Sequence[str]] = ()
    cut_off: Mapping[str, float] = dataclasses.field(default_factory=dict)
    comparison: Comparison | None = None
    options: Sequence[str] | None = None
    license: Mapping[str, str] = dataclasses.field(default_factory=dict)
    side_models: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pictures: Sequence[str] = ()


def template(name: str) -> jinja2.Template:
    """A template of the package; an undefined name in it is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("optiq", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(name)


def render(facts: CardFacts) -> str:
    """The card, as Markdown with the metadata block of the model hub."""
    source = facts.plan.source
    return template("card.md.jinja").render(
        facts=facts,
        plan=facts.plan,
        fidelity=facts.fidelity,
        speed=facts.speed,
        metadata=metadata.block(_metadata(facts)),
        source_name=source_name(facts.plan),
        source_size=format_size(source.size_bytes),
        model_size=format_size(facts.size_bytes),
        bpw=_bpw(facts),
        benchmarks=_benchmarks(facts),
        closeness=_closeness(facts),
        domains=_domains(facts.fidelity) if facts.fidelity else "",
        details=markdown_table(("", ""), _details(facts)),
        widths=widths(facts.plan),
        kinds=_kinds(facts.plan),
        pictures=PICTURES,
        rounding=_ROUNDINGS[facts.plan.rounding],
        command=_command(facts),
        made=(facts.fidelity or facts.table),
        format_size=format_size,
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A table; a bar in a cell is escaped."""
    lines = [tuple(columns), ("---",) * len(columns), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def source_name(plan: BitPlan) -> str:
    """Hub id, or the last part of a path."""
    return plan.source.name if plan.source.revision else Path(plan.source.name).name


def _bpw(facts: CardFacts) -> float:
    return facts.fidelity.bpw if facts.fidelity else facts.plan.bpw


def _metadata(facts: CardFacts) -> dict[str, Any]:
    source = facts.plan.source
    sees = "optiq_vision.safetensors" in facts.side_models
    from_hub = source.revision is not None
    return {
        "base_model": source.name if from_hub else None,
        "base_model_relation": "quantized" if from_hub else None,
        "library_name": "mlx",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        **facts.license,
        "tags": ["mlx", "optiq", "quantized"],
    }


# -- benchmarks ----------------------------------------------------------------------------------


def _benchmarks(facts: CardFacts) -> dict[str, str] | None:
    """Table, verdict and how it was made; beside the baseline if there is one."""
    if not facts.scores:
        return None
    found = facts.comparison
    columns: Row = ("benchmark", "version", "items", "score, %")
    if found is not None:
        columns += (f"{found.rival}, %", "difference", "95% interval", "p")
    beside = {row.task: row for row in found.benchmarks} if found else {}
    rows = [_scored(row, beside.get(row.task), len(columns)) for row in facts.scores]
    if is_capability(facts.scores) or (found is not None and found.overall is not None):
        rows.append(_mean(facts, len(columns)))
    return {
        "table": markdown_table(columns, rows),
        "verdict": _verdict(found) if found else "",
        "note": _sampled(facts) + (_tests(found) if found else ""),
        "asked": "\n".join(
            shlex.join(["optiq", "eval", facts.name, *words]) for words in facts.asked
        ),
    }


def _verdict(found: Comparison) -> str:
    sentence = dataclasses.replace(found, model="this model").sentence
    return sentence[:1].upper() + sentence[1:]


def _sampled(facts: CardFacts) -> str:
    """What ± is, and what is to be known of the sample."""
    sentences = ["± is the standard error over the items."]
    if small := [_title(s.task) for s in facts.scores if s.num_items < _SMALL_SAMPLE]:
        few = f"Of fewer than {_SMALL_SAMPLE} items, so small samples"
        sentences.append(f"{few}: {', '.join(small)}.")
    if alike := [_title(s.task) for s in facts.scores if not s.stderr_points]:
        sentences.append(f"Every item scored the same, so ± 0 says nothing: {', '.join(alike)}.")
    if cut := [f"{_title(t)} {100 * share:.0f}%" for t, share in facts.cut_off.items()]:
        sentences.append(f"Answers cut off at the most tokens allowed: {', '.join(cut)}.")
    return " ".join(sentences)


def _title(task: str) -> str:
    return CAPABILITY.get(task, task)


def _scored(score: BenchmarkScore, beside: BenchmarkComparison | None, width: int) -> Row:
    """A benchmark, with the baseline where it can be compared."""
    cells: Row = (
        _title(score.task),
        score.version,
        f"{score.num_items:,}",
        f"{score.score_percent:.2f} ± {score.stderr_points:.2f}",
    )
    if beside is not None:
        difference = _difference(beside.delta_points, beside.ci_points)
        cells += (f"{beside.rival_percent:.2f}", *difference, f"{beside.p_holm:.2g}")
    return cells + ("",) * (width - len(cells))


def _mean(facts: CardFacts, width: int) -> Row:
    """The Capability Score, or the mean of other benchmarks, with that of the baseline."""
    number = len(facts.scores)
    mean = sum(row.score_percent for row in facts.scores) / number
    stderr = math.hypot(*(row.stderr_points for row in facts.scores)) / number
    name = "Capability Score" if is_capability(facts.scores) else f"mean of {number}"
    items = sum(row.num_items for row in facts.scores)
    cells: Row = (f"**{name}**", "", f"{items:,}", f"**{mean:.2f}** ± {stderr:.2f}")
    found = facts.comparison
    if found is not None and found.overall is not None:
        difference = _difference(found.overall.delta_points, found.overall.ci_points)
        cells += (f"{found.overall.rival_percent:.2f}", *difference, f"{found.overall.p_value:.2g}")
    return cells + ("",) * (width - len(cells))


def _tests(found: Comparison) -> str:
    """What was compared, and how."""
    sizes = [
        f"{name} takes {format_size(size)}"
        for name, size in (("This model", found.size_bytes), (found.rival, found.rival_size_bytes))
        if size is not None
    ]
    return (
        f" {' and '.join(sizes)}{'. ' if sizes else ''}Differences are between answers to the same "
        f"items; their 95% intervals are of the paired bootstrap ({found.resamples:,} samples), p "
        f"of McNemar's test or of sign flips, of the benchmarks adjusted after Holm."
    )


def _difference(delta: float, ci: tuple[float, float]) -> Row:
    return f"{delta:+.2f}", f"{ci[0]:+.2f} to {ci[1]:+.2f}"


# -- fidelity ------------------------------------------------------------------------------------


def _closeness(facts: CardFacts) -> str:
    """KL and agreement of the model and its rivals."""
    if facts.fidelity is None:
        return ""
    columns = (
        *("model", "stored bpw", "MB", "KL, nats/token", "99th percentile", "top-1 agreement"),
        "perplexity ratio",
    )
    rows = [
        (
            "this model" if row is facts.fidelity else row.model,
            f"{row.bpw:.3f}",
            f"{row.size_bytes / 1e6:.1f}",
            f"{row.kl_nats_per_token:.4g} ± {row.kl_se:.1g}",
            f"{row.kl_p99:.3g}",
            f"{100 * row.top1_agreement:.1f}%",
            f"{row.perplexity_ratio:.4f}",
        )
        for row in (facts.fidelity, *facts.rivals)
    ]
    return markdown_table(columns, rows)


def _domains(fidelity: Fidelity) -> str:
    rows = [
        (
            part.domain,
            f"{part.num_tokens:,}",
            f"{part.kl_nats_per_token:.4g} ± {part.kl_se:.1g}",
            f"{100 * part.top1_agreement:.1f}%",
        )
        for part in fidelity.by_domain
    ]
    return markdown_table(("domain", "tokens", "KL, nats/token", "top-1 agreement"), rows)


# -- quantization --------------------------------------------------------------------------------


def _weights(entries: Sequence[PlanEntry]) -> int:
    return sum(math.prod(entry.shape) for entry in entries)


def _by_bits(plan: BitPlan) -> dict[int, list[PlanEntry]]:
    """Matrices by width of their codes, fewest bits first."""
    found: dict[int, list[PlanEntry]] = {}
    for entry in sorted(plan.entries, key=lambda entry: entry.option.bits):
        found.setdefault(entry.option.bits, []).append(entry)
    return found


def _details(facts: CardFacts) -> list[Row]:
    """Facts of the quantization, by name."""
    plan, table = facts.plan, facts.table
    by_bits, total = _by_bits(plan), _weights(plan.entries)
    names = {bits: f"{bits}-bit" for bits in by_bits} | {KEEP.bits: plan.source.dtype}
    most = max(by_bits, key=lambda bits: _weights(by_bits[bits]))
    groups = Counter(e.option.group_size for e in plan.entries if e.option != KEEP)
    rows: list[Row] = [
        (
            "Predominant precision",
            f"{names[most]}, {100 * _weights(by_bits[most]) / total:.1f}% of the weights",
        ),
        ("Matrices", ", ".join(f"{len(rows)} at {names[bits]}" for bits, rows in by_bits.items())),
        ("Matrices in all", f"{len(plan.entries)} with {total:,} weights"),
        ("Stored bits per weight", f"{_bpw(facts):.3f}, scales and biases included"),
        ("Size", f"{facts.size_bytes:,} bytes of `model*.safetensors`"),
    ]
    if groups:
        sizes = ", ".join(f"{size} in {number}" for size, number in sorted(groups.items()))
        rows.append(("Group sizes", f"{sizes} matrices"))
    if table is not None:
        rows += _measured(table, len(plan.entries))
    for file, size_bytes in facts.side_models.items():
        rows.append((SIDE_MODELS[file], f"`{file}`, {format_size(size_bytes)}"))
    return rows


def _measured(table: SensitivityTable, num_matrices: int) -> list[Row]:
    """Facts of the measurement behind a plan."""
    if table.method == "static":
        return [("Sensitivity", "without data")]
    rows: list[Row] = [
        ("Sensitivity", f"{_METHODS[table.method]}, {table.num_tokens:,} calibration tokens"),
        ("Reference", _REFERENCES[table.reference]),
    ]
    total = sum(table.calibration_mix.values())
    if total:
        mix = [f"{name} {100 * n / total:.0f}%" for name, n in table.calibration_mix.items()]
        rows.append(("Calibration mix", ", ".join(mix)))
    if "split_half" in table.checks:
        rows.append(("Split-half reliability", f"{table.checks['split_half']:.3f}"))
    on_grid = [m for m in table.modules if m.lattice.kind != "none"]
    if on_grid:
        exact = sum(m.lattice.exact for m in on_grid)
        text = f"{len(on_grid)} of {num_matrices} matrices, {exact} reproduced exactly"
        rows.append(("On a 4-bit grid in the source", text))
    return rows


def widths(plan: BitPlan) -> str:
    """Matrices and share of the weights of every option, most bits first."""
    total = _weights(plan.entries)
    options = sorted(
        {e.option for e in plan.entries}, key=lambda o: (-o.bits, o.group_size, o.kind)
    )
    names = {KEEP: plan.source.dtype, LATTICE: "4/32 on the source's grid"}
    rows = []
    for option in options:
        entries = [entry for entry in plan.entries if entry.option == option]
        share = f"{100 * _weights(entries) / total:.1f}%"
        rows.append((names.get(option, option.key), str(len(entries)), share))
    return markdown_table(("bits/group", "matrices", "share of weights"), rows)


def _kinds(plan: BitPlan) -> str:
    """Kind of matrix (the last word of its path), how many, and their stored bits per weight."""
    groups: dict[str, list[PlanEntry]] = {}
    for entry in plan.entries:
        groups.setdefault(entry.path.rpartition(".")[2], []).append(entry)
    rows = [
        (kind, str(len(group)), f"{bpw(sum(e.size_bytes for e in group), _weights(group)):.2f}")
        for kind, group in groups.items()
    ]
    return markdown_table(("matrix", "how many", "stored bpw"), rows)


def _command(facts: CardFacts) -> str:
    """The command line that makes the model again; empty where the options are not known."""
    if facts.options is None:
        return ""
    source = facts.plan.source
    words = ["optiq", "convert", source_name(facts.plan), "-o", Path(facts.name).name]
    if source.revision:
        words += ["--revision", source.revision]
    return shlex.join([*words, *facts.options])
