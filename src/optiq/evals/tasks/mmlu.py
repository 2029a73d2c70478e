"""MMLU: 57 subjects, four choices, five worked examples of the subject.

The text is the classic one, so that log-likelihoods can be compared with other harnesses.

Reference: Hendrycks et al. 2021, Measuring Massive Multitask Language Understanding.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData, Row
from optiq.errors import UsageError
from optiq.evals.draw import apportion, evenly, sample
from optiq.evals.task import Choice, Item, Response, Score, Task

_LETTERS = "ABCD"
_SHOTS = 5
_SHARE = 1000

# the last claim of the form "answer is (B)", "Answer: B", "**Answer**: \boxed{B}"
_CLAIM = re.compile(
    r"\banswer\b(?:\s+is|\s*:)?[\s:*_($\\]*(?:boxed\s*\{|text\s*\{)*[\s(*]*([A-D])(?![\w'])",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\text\s*\{)?\s*\(?([A-D])\)?\s*\}")
_LEADING = re.compile(r"[\s*_(\[\"'`]*([A-D])(?:[\s*_)\]\"'`.]*$|[*_\]\"'`]*[).:,](?!\w))")
_LAST_LINE = re.compile(r"[\s*_(\[\"'`]*([A-D])[\s*_)\]\"'`.]*")


def _dataset(data: BenchmarkData, config: EvalConfig) -> Sequence[Item]:
    by_subject: dict[str, list[Item]] = defaultdict(list)
    beginnings = _beginnings(data.load("mmlu/dev").rows)
    for number, row in enumerate(data.load("mmlu/test").rows):
        subject = row["subject"]
        if subject not in beginnings:
            raise UsageError(
                f"mmlu/dev.jsonl has fewer than {_SHOTS} examples of '{subject}'; MMLU asks with "
                f"{_SHOTS}"
            )
        fields = {**row, "shared": beginnings[subject]}
        by_subject[subject].append(Item(id=str(number), fields=fields))
    if not config.full:
        shares = apportion({name: len(items) for name, items in by_subject.items()}, _SHARE)
        by_subject = defaultdict(
            list,
            {n: sample(items, shares[n], config.seed, n) for n, items in by_subject.items()},
        )
    return evenly([item for items in by_subject.values() for item in items], config.limit)


def _beginnings(rows: Sequence[Row]) -> dict[str, str]:
    """Header and worked examples of every subject that has enough of them."""
    examples: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        examples[row["subject"]].append(row)
    return {
        subject: _header(subject)
        + "".join(f"{_ask(row)} {_LETTERS[row['answer']]}\n\n" for row in shots[:_SHOTS])
        for subject, shots in examples.items()
        if len(shots) >= _SHOTS
    }


def _header(subject: str) -> str:
    topic = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {topic}.\n\n"


def _ask(row: Mapping[str, Any]) -> str:
    options = "\n".join(f"{x}. {c}" for x, c in zip(_LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}\n{options}\nAnswer:"


def _solver(item: Item, config: EvalConfig) -> Choice:
    chat = config.mmlu_form == "chat"
    options = tuple(letter if chat else f" {letter}" for letter in _LETTERS)
    return Choice(str(item.fields["shared"]), _ask(item.fields), options, chat=chat)


def _scorer(item: Item, response: Response, _config: EvalConfig) -> Score:
    if response.logprobs is None:
        letter = read_letter(response.text)
        return Score(float(letter == _LETTERS[item.fields["answer"]]), parsed=letter)
    values = response.logprobs
    if len(values) != len(_LETTERS) or not all(math.isfinite(value) for value in values):
        reason = f"expected 4 finite log-likelihoods, got {list(map(str, values))}"
        return Score(None, detail={"failure": reason})
    choice = max(range(len(values)), key=values.__getitem__)
    return Score(float(choice == item.fields["answer"]), parsed=_LETTERS[choice])


def read_letter(text: str) -> str | None:
    """The choice that a written answer makes, or None where it makes none.

    A boxed letter counts first, then the last "answer is X", then a letter that opens the text and
    stands alone or before a mark, then one that is alone on the last line.
    """
    text = text.strip()
    for pattern in (_BOXED, _CLAIM):
        if found := pattern.findall(text):
            return str(found[-1]).upper()
    if match := _LEADING.match(text):
        return match[1]
    if match := _LAST_LINE.fullmatch(text.rpartition("\n")[2]):
        return match[1]
    return None


TASK = Task(
    name="mmlu",
    title="MMLU",
    version="1",
    variant=lambda config: "chat" if config.mmlu_form == "chat" else "",
    files=("mmlu/test", "mmlu/dev"),
    groups=lambda item: {"subject": str(item.fields["subject"])},
    dataset=_dataset,
    solver=_solver,
    scorer=_scorer,
)
