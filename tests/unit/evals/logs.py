"""Folders of logs as `optiq eval` writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_logs(
    folder: Path,
    scores: Mapping[str, Sequence[float | None]],
    *,
    model: str = "model",
    size_bytes: int | None = 10**9,
    version: str = "1+chat",
) -> Path:
    """Logs of a model; items are numbered."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, values in scores.items():
        rows = [{"id": str(n), "score": value} for n, value in enumerate(values)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = {
        "model": model,
        "size_bytes": size_bytes,
        "benchmarks": {task: {"version": version} for task in scores},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder
