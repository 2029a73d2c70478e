"""Are our MMLU log-likelihoods those of lm-eval? Same questions, prompts, BOS flag, float32.

    python bench/mmlu_loglikelihoods.py MODEL --data-dir DIR -o ours.jsonl
    python bench/mmlu_oracle.py MODEL ours.jsonl -o oracle.jsonl     (where lm-eval and torch are)
    python bench/mmlu_loglikelihoods.py MODEL --compare ours.jsonl oracle.jsonl

Prints JSON: questions, how many choices agree, and the largest difference in nats. The exit status
is 1 unless all agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.evals.subjects.base import Ask
from optiq.evals.subjects.local import LocalModel
from optiq.evals.task import Choice
from optiq.evals.tasks import TASKS


def write(model: Path, data_dir: Path, count: int, out: Path) -> None:
    """Prompts, options and our log-likelihoods, a question a line."""
    config = EvalConfig(limit=count, batch_size=4)
    task = TASKS.get("mmlu")
    items = task.dataset(BenchmarkData(data_dir), config)
    prompts = [task.solver(item, config) for item in items]
    subject = LocalModel(model, config)
    start = time.perf_counter()
    found = dict(subject.answer([Ask(prompt) for prompt in prompts]))
    seconds = time.perf_counter() - start
    with out.open("w") as file:
        for index, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
            assert isinstance(prompt, Choice)
            response = found[index].response
            assert response is not None
            row = {
                "id": item.id,
                "context": prompt.shared + prompt.own,
                "options": list(prompt.options),
                "bos": subject.info.bos,
                "logprobs": response.logprobs,
            }
            file.write(json.dumps(row) + "\n")
    print(json.dumps({"questions": len(items), "seconds": round(seconds, 1), "out": str(out)}))


def compare(ours: Path, oracle: Path) -> bool:
    """Whether all choices agree; prints how far the log-likelihoods are apart."""
    rows = [[json.loads(line) for line in path.open()] for path in (ours, oracle)]
    pairs = list(zip(*rows, strict=True))
    assert all(a["id"] == b["id"] for a, b in pairs)
    choices = [[max(range(4), key=row["logprobs"].__getitem__) for row in pair] for pair in pairs]
    apart = [
        abs(x - y) for a, b in pairs for x, y in zip(a["logprobs"], b["logprobs"], strict=True)
    ]
    agree = sum(a == b for a, b in choices)
    report = {"questions": len(pairs), "same_choice": agree, "max_difference_nats": max(apart)}
    print(json.dumps(report))
    return agree == len(pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("model", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OURS", "ORACLE"))
    args = parser.parse_args()
    if args.compare:
        return 0 if compare(*args.compare) else 1
    if args.data_dir is None or args.out is None:
        parser.error("give --data-dir and -o, or --compare")
    write(args.model, args.data_dir, args.count, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
