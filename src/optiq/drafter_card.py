"""README.md of a drafter's model directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from optiq.artifacts import Acceptance, BitPlan
from optiq.card import source_name, template, widths
from optiq.numerics.size import format_size


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


def render_drafter(facts: DrafterFacts) -> str:
    """The card of a drafter, as Markdown with the metadata block of the model hub."""
    found = facts.acceptance
    rows = [] if found is None else list(_rows(found))
    return template("drafter.md.jinja").render(
        facts=facts,
        plan=facts.plan,
        source_name=source_name(facts.plan),
        source_size=format_size(facts.plan.source.size_bytes),
        model_size=format_size(facts.size_bytes),
        widths=widths(facts.plan),
        acceptance=found,
        rows=rows,
    )


def _rows(found: Acceptance) -> Iterator[tuple[int, int, str, str]]:
    """Number of the draft, drafts that counted, its share of right ones, and the source's."""
    columns = (found.tried, found.accepted, found.source_tried, found.source_accepted)
    for number, (tried, right, theirs, theirs_right) in enumerate(zip(*columns, strict=True), 1):
        yield number, tried, _share(right, tried), _share(theirs_right, theirs)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "none tried"
