"""Artifacts -> README.md of a model directory."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2

from optiq.artifacts import Acceptance, BitPlan, Fidelity, SensitivityTable, Speed
from optiq.numerics.size import bpw, format_size


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card is written from; every figure on it is one of these.

    Attributes:
        name: name of the directory.
        plan: bits of every matrix.
        table: the measurement behind the plan; None where a plan was given instead.
        fidelity: the model on held-out text.
        rivals: other models on the same text, for the same source.
        speed: from `optiq bench`, if it ran.
    """

    name: str
    plan: BitPlan
    table: SensitivityTable | None
    fidelity: Fidelity
    rivals: Sequence[Fidelity] = ()
    speed: Speed | None = None


@dataclasses.dataclass(frozen=True)
class DrafterFacts:
    """What the card of a drafter is written from.

    Attributes:
        name: name of the directory.
        plan: bits of every matrix.
        acceptance: how often it is right, if its target was there.
        size_bytes: bytes of its weight files.
    """

    name: str
    plan: BitPlan
    acceptance: Acceptance | None
    size_bytes: int


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("optiq", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(name)


def render_drafter(facts: DrafterFacts) -> str:
    """The card of a drafter, as Markdown with the metadata block of the model hub."""
    found = facts.acceptance
    rows = [] if found is None else list(_acceptance_rows(found))
    return _template("drafter.md.jinja").render(
        facts=facts,
        plan=facts.plan,
        source_name=_source_name(facts.plan),
        source_size=format_size(facts.plan.source.size_bytes),
        model_size=format_size(facts.size_bytes),
        options=_by_option(facts.plan),
        acceptance=found,
        rows=rows,
    )


def _acceptance_rows(found: Acceptance) -> Iterator[tuple[int, int, str, str]]:
    """Number of the draft, drafts that counted, its share of right ones, and the source's."""
    columns = (found.tried, found.accepted, found.source_tried, found.source_accepted)
    for number, (tried, right, theirs, theirs_right) in enumerate(zip(*columns, strict=True), 1):
        yield number, tried, _share(right, tried), _share(theirs_right, theirs)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "none tried"


def _source_name(plan: BitPlan) -> str:
    return plan.source.name if plan.source.revision else Path(plan.source.name).name


def render(facts: CardFacts) -> str:
    """The card, as Markdown with the metadata block of the model hub."""
    plan = facts.plan
    matrices = len(plan.entries)
    on_grid = [m for m in facts.table.modules if m.lattice.kind != "none"] if facts.table else []
    return _template("card.md.jinja").render(
        facts=facts,
        plan=plan,
        fidelity=facts.fidelity,
        speed=facts.speed,
        source_name=_source_name(plan),
        source_size=format_size(plan.source.size_bytes),
        model_size=format_size(facts.fidelity.size_bytes),
        options=_by_option(plan),
        roles=_by_role(plan),
        judged=[facts.fidelity, *facts.rivals],
        format_size=format_size,
        grid=f"{len(on_grid)} of {matrices}" if on_grid else "",
        num_exact=sum(m.lattice.exact for m in on_grid),
    )


def _by_option(plan: BitPlan) -> list[tuple[str, int, str]]:
    """Option, matrices and share of the weights, most bits first."""
    total = sum(math.prod(entry.shape) for entry in plan.entries)
    count: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    order = {}
    for entry in plan.entries:
        key = entry.option.key
        order[key] = (-entry.option.bits, entry.option.group_size)
        count[key] += 1
        weights[key] += math.prod(entry.shape)
    return [
        (key, count[key], f"{100 * weights[key] / total:.1f}%")
        for key in sorted(order, key=lambda key: order[key])
    ]


def _by_role(plan: BitPlan) -> list[tuple[str, int, str]]:
    """Kind of matrix (the last word of its path), how many, and their stored bits per weight."""
    groups: dict[str, list[tuple[int, int]]] = {}
    for entry in plan.entries:
        kind = entry.path.rpartition(".")[2]
        groups.setdefault(kind, []).append((entry.size_bytes, math.prod(entry.shape)))
    return [
        (kind, len(rows), f"{bpw(sum(r[0] for r in rows), sum(r[1] for r in rows)):.2f}")
        for kind, rows in groups.items()
    ]
