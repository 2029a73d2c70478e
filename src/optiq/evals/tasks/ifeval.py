"""IFEval: prompts with instructions that a program can check.

The checks are those of lm-eval, called as its own task calls them; nothing is written again here.

Reference: Zhou et al. 2023, Instruction-Following Evaluation for Large Language Models.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from optiq import extras
from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import UsageError
from optiq.evals.draw import evenly
from optiq.evals.task import Chat, Item, Response, Score, Task

_MAX_TOKENS = 1280
_SENTENCES = "tokenizers/punkt_tab/english/"


def _ready(_config: EvalConfig) -> None:
    _checks()


def _dataset(data: BenchmarkData, config: EvalConfig) -> Sequence[Item]:
    items = []
    for row in data.load("ifeval/input").rows:
        if len(row["kwargs"]) != len(row["instruction_id_list"]):
            raise UsageError(
                f"ifeval/input_data.jsonl, key {row['key']}: 'kwargs' must have one object for "
                f"each of its {len(row['instruction_id_list'])} instructions"
            )
        items.append(Item(id=str(row["key"]), fields=row))
    return evenly(items, config.limit)


def _solver(item: Item, config: EvalConfig) -> Chat:
    message = {"role": "user", "content": item.fields["prompt"]}
    return Chat((message,), config.max_tokens or _MAX_TOKENS)


def _scorer(item: Item, response: Response, _config: EvalConfig) -> Score:
    checks = _checks()
    fields = item.fields
    pairs = zip(fields["instruction_id_list"], fields["kwargs"], strict=True)
    strict, loose = [], []
    for name, arguments in pairs:
        if name not in checks:
            raise UsageError(f"ifeval: no check for instruction '{name}'; see {sorted(checks)}")
        with _fixed_random():
            follows = _instruction(checks[name](name), arguments, fields["prompt"])
            strict.append(follows(response.text))
            loose.append(strict[-1] or any(map(follows, _variants(response.text))))
    return Score(float(all(strict)), detail={"instructions": strict, "loose": loose})


def _instruction(
    check: Any,  # noqa: ANN401  a class of a package without types
    arguments: Mapping[str, Any],
    prompt: str,
) -> Callable[[str], bool]:
    """Whether a text follows an instruction; a blank one follows none."""
    check.build_description(**{name: value for name, value in arguments.items() if value})
    if "prompt" in (check.get_instruction_args() or {}):
        check.build_description(prompt=prompt)
    return lambda text: bool(text.strip() and check.check_following(text))


def _variants(text: str) -> list[str]:
    """The text without its first line, its last, both, and all of these without stars."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut[1:] + [one.replace("*", "") for one in cut]


@contextmanager
def _fixed_random() -> Generator[None]:
    """A check with an argument it cannot use draws one of its own: let it be the same each time."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


@functools.cache
def _checks() -> Mapping[str, Callable[[str], Any]]:
    """Instruction name -> class of the check.

    Cost: seconds, the first time: the package imports much that is not used here.
    """
    _provide_sentence_data()
    langdetect = extras.load("langdetect", extra="eval", purpose="scoring IFEval")
    langdetect.DetectorFactory.seed = 0  # else its answers are random
    registry = extras.load(
        "lm_eval.tasks.ifeval.instructions_registry", extra="eval", purpose="scoring IFEval"
    )
    checks: Mapping[str, Callable[[str], Any]] = registry.INSTRUCTION_DICT
    return checks


def _provide_sentence_data() -> None:
    """Make sure that nltk has its sentence data; where it has not, let it download them."""
    nltk = extras.load("nltk", extra="eval", purpose="scoring IFEval")
    try:
        nltk.data.find(_SENTENCES)
    except LookupError:
        if not nltk.download("punkt_tab", quiet=True):
            raise UsageError(
                "scoring IFEval needs the sentence data 'punkt_tab' of nltk, which are in none of "
                f"{nltk.data.path} and could not be downloaded; run 'python -m nltk.downloader "
                "punkt_tab' where there is a network, or set NLTK_DATA to a folder that has "
                "tokenizers/punkt_tab"
            ) from None


TASK = Task(
    name="ifeval",
    title="IFEval",
    version="1",
    files=("ifeval/input",),
    dataset=_dataset,
    solver=_solver,
    scorer=_scorer,
    ready=_ready,
)
