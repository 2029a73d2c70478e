"""Scores of a model by item, as logs of `optiq eval` hold them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from optiq.errors import UsageError
from optiq.eval_artifacts import BenchmarkScore

LOGS = Path("optiq") / "evals"
"""Where a model directory keeps its logs."""
REPORT = "report.json"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one benchmark, one of each item.

    Attributes:
        task: name of the benchmark.
        version: version and variant; scores of two versions are not compared.
        ids: of the items, none twice.
        values: 0 to 1; NaN where the harness failed.
        prompts: hashes of what the items were asked with, the most tokens of an answer included;
            empty where they are not known, as of responses from elsewhere.
    """

    task: str
    version: str
    ids: tuple[str, ...]
    values: tuple[float, ...]
    prompts: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        task: str,
        version: str,
        samples: Iterable[tuple[str, float | None]],
        prompts: Iterable[str] = (),
    ) -> Scores:
        """Scores of samples: several of one item, as of several seeds, are averaged first.

        Args:
            task: name of the benchmark.
            version: version and variant.
            samples: id and score of every response; None where the harness failed.
            prompts: hashes of the prompts; none if they are not known.

        Raises:
            UsageError: for a score outside 0..1.
        """
        by_id: dict[str, list[float]] = {}
        for name, score in samples:
            if score is not None and not 0 <= score <= 1:
                raise UsageError(
                    f"item {name} of {task} has the score {score}; scores are 0 to 1: score the "
                    f"responses again"
                )
            by_id.setdefault(name, []).append(math.nan if score is None else float(score))
        means = tuple(math.fsum(scores) / len(scores) for scores in by_id.values())
        return cls(task, version, tuple(by_id), means, frozenset(prompts))


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What is known of a model that was evaluated.

    Attributes:
        name: for tables.
        size_bytes: of `model*.safetensors`; None where it is not known, as behind an URL.
        scores: by name of the benchmark.
    """

    name: str
    size_bytes: int | None
    scores: Mapping[str, Scores]


def summary(scores: Scores) -> BenchmarkScore | None:
    """Mean and standard error over the items; None if some have no score, or there are none."""
    values = np.array(scores.values)
    if not len(values) or np.isnan(values).any():
        return None
    # of a single item nothing is known: 0.5 is the most that scores of 0 to 1 can spread
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.5
    return BenchmarkScore(
        task=scores.task,
        version=scores.version,
        num_items=len(values),
        score_percent=100 * float(values.mean()),
        stderr_points=100 * spread / math.sqrt(len(values)),
    )


def logs_of(path: Path) -> Path:
    """The folder with the logs that a user names by itself or by its model directory.

    Raises:
        UsageError: if there is none.
    """
    for folder in (path, path / LOGS):
        if (folder / REPORT).is_file():
            return folder
    raise UsageError(
        f"{path} holds no finished logs ({REPORT}); give a folder that `optiq eval -o` wrote, or a "
        f"model directory with logs in {LOGS}"
    )


def read_evaluated(path: Path, tasks: Iterable[str] = ()) -> Evaluated:
    """Scores from logs.

    Args:
        path: a folder of logs, or a model directory that has one.
        tasks: benchmarks that are wanted; none: all.

    Raises:
        UsageError: if there are no logs, they cannot be read, or lack a benchmark that is wanted.
    """
    folder = logs_of(path)
    report = _object(folder / REPORT)
    found = report.get("benchmarks")
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{folder / REPORT} lists no benchmarks; evaluate again")
    chosen = tuple(tasks) or tuple(found)
    for task in chosen:
        if task not in found:
            raise UsageError(f"{folder} has no results of '{task}'; it has {', '.join(found)}")
    size_bytes = report.get("size_bytes")
    return Evaluated(
        name=str(report.get("model") or folder.name),
        size_bytes=size_bytes if type(size_bytes) is int else None,
        scores={task: _scores(found[task], task, folder) for task in chosen},
    )


def _version(entry: object, task: str, folder: Path) -> str:
    version = entry.get("version") if isinstance(entry, dict) else None
    if not isinstance(version, str):
        raise UsageError(f"{folder / REPORT} names no version of {task}; evaluate again")
    return version


def _scores(entry: object, task: str, folder: Path) -> Scores:
    """Scores of a benchmark, from its entry in the report and its log."""
    rows = list(_responses(folder, task))
    prompts = {row.prompt for row in rows}
    return Scores.of(
        task,
        _version(entry, task, folder),
        [(row.id, row.score) for row in rows],
        () if "" in prompts else prompts,
    )


class _Response(NamedTuple):
    """What a line of a log says of an item."""

    id: str
    score: float | None
    prompt: str


def _responses(folder: Path, task: str) -> Iterator[_Response]:
    """The lines of a log."""
    path = folder / f"{task}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); evaluate again") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, score, prompt = row["id"], row["score"], row.get("prompt")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f"{path}, line {number} is no response with 'id' and 'score'; evaluate again"
            ) from None
        if score is not None and not isinstance(score, int | float):
            raise UsageError(f"{path}, line {number} has the score {score!r}; it must be a number")
        yield _Response(str(name), None if score is None else float(score), str(prompt or ""))


def _object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({error}); evaluate again") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} is not a JSON object; evaluate again")
    return data
