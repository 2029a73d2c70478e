"""What does the shared KV cache of the five shots bring on MMLU? Same answers, how much faster.

    python bench/mmlu_prefix.py MODEL --data-dir DIR [--subjects 3] [--questions 20]

Prints JSON: seconds of the clock and of the processors, with and without, their ratios, and how
many choices agree. Where others use the machine, look at the processors' time. The exit status is
1 unless all choices agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.evals.subjects.base import Ask
from optiq.evals.subjects.local import LocalModel
from optiq.evals.task import Choice
from optiq.evals.tasks import TASKS


def chosen(data_dir: Path, subjects: int, questions: int) -> list[Choice]:
    """`questions` prompts of each of some subjects, evenly drawn over the subjects."""
    config = EvalConfig(full=True)
    task = TASKS.get("mmlu")
    groups: dict[str, list[Choice]] = {}
    for item in task.dataset(BenchmarkData(data_dir), config):
        prompt = task.solver(item, config)
        assert isinstance(prompt, Choice)
        groups.setdefault(prompt.shared, []).append(prompt)
    names = list(groups)
    step = len(names) // subjects
    return [p for name in names[:: max(1, step)][:subjects] for p in groups[name][:questions]]


def timed(subject: LocalModel, prompts: Sequence[Choice]) -> tuple[float, float, list[int]]:
    """Seconds of clock and processors, and every choice; the weights are loaded before."""
    list(subject.answer([Ask(Choice("", "2 + 2 =", (" 4", " 5")))]))
    start, cpu = time.perf_counter(), time.process_time()
    found = dict(subject.answer([Ask(prompt) for prompt in prompts]))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    values = [found[i].response for i in range(len(prompts))]
    logprobs = [v.logprobs for v in values if v is not None and v.logprobs is not None]
    return seconds, cpu, [max(range(len(v)), key=v.__getitem__) for v in logprobs]


def main() -> int:
    parser = argparse.ArgumentParser(description="the shared prefix on MMLU")
    parser.add_argument("model", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    prompts = chosen(args.data_dir, args.subjects, args.questions)
    config = EvalConfig(batch_size=args.batch_size)
    shared_s, shared_cpu_s, shared = timed(LocalModel(args.model, config), prompts)
    plain_s, plain_cpu_s, plain = timed(LocalModel(args.model, config, share_prefix=False), prompts)
    agree = sum(a == b for a, b in zip(shared, plain, strict=True))
    report = {
        "questions": len(prompts),
        "shared_s": round(shared_s, 2),
        "plain_s": round(plain_s, 2),
        "times_faster": round(plain_s / shared_s, 2),
        "shared_cpu_s": round(shared_cpu_s, 2),
        "plain_cpu_s": round(plain_cpu_s, 2),
        "times_less_cpu": round(plain_cpu_s / shared_cpu_s, 2),
        "same_choice": agree,
    }
    print(json.dumps(report))
    return 0 if agree == len(prompts) else 1


if __name__ == "__main__":
    sys.exit(main())
