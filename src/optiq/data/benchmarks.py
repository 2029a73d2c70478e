"""Files of the benchmarks: from a directory that the user gives, or from the hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class BenchmarkData:
    """Where benchmark files come from.

    Attributes:
        directory: `--data-dir`, laid out as `mmlu/test.jsonl`, `gsm8k/test.jsonl`,
            `ifeval/input_data.jsonl`, `bfcl/BFCL_v3_simple.json`, `humaneval/HumanEval.jsonl.gz`;
            None for the hub.
        offline: use the hub's cache alone.
    """

    directory: Path | None
    offline: bool = False
