"""What a drafter is good for on one model: its acceptance, and the time with it against without.

usage: python bench/drafter.py MODEL DRAFTER [--pairs 10] [--new 96] [--text FILE.jsonl] [-o OUT]

Each pair writes the same answers without the drafter and with it, greedily. Every answer is written
by the one and at once by the other, in alternating order, so a machine whose speed drifts slows
both; the drafter decides for itself how many drafts pay. A further run has 4 drafts fixed, for the
acceptance. Prints the ratio of the times with its 95% confidence interval over the pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from scipy import stats

import optiq
from optiq.backend import device_name
from optiq.data.calibration import builtin_records
from optiq.engine.engine import Engine, EngineOptions

FIXED = 4


def beginnings(path: Path | None, count: int) -> list[str]:
    """The first words of texts, to go on with."""
    if path:
        lines = path.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line).get("text") for line in lines]
    else:
        texts = [record.text for record in builtin_records("heldout")]
    return [" ".join(text.split()[:40]) for text in texts if text][:count]


def written(engine: Engine, text: str, new: int) -> tuple[float, Any]:
    """Seconds for one answer, and the answer."""
    start = time.perf_counter()
    answer = engine.generate(text, temperature=0, max_tokens=new).result()
    return time.perf_counter() - start, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("drafter")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--text", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    texts = beginnings(args.text, args.prompts)
    engines = {
        "plain": optiq.load(args.model),
        "adaptive": optiq.load(args.model, drafter=args.drafter),
    }
    fixed = optiq.load(args.model, args.drafter, EngineOptions(num_drafts=FIXED))
    for engine in engines.values():
        written(engine, texts[0], args.new)  # warms up
    ratios, tps, reports = [], {name: [] for name in engines}, []
    for number in range(args.pairs):
        seconds, count = dict.fromkeys(engines, 0.0), 0
        for index, text in enumerate(texts):
            answers = {}
            for name in list(engines)[:: 1 if (number + index) % 2 else -1]:
                spent, answers[name] = written(engines[name], text, args.new)
                seconds[name] += spent
            if answers["plain"].token_ids != answers["adaptive"].token_ids:
                raise SystemExit("the drafter changed an answer")
            count += len(answers["plain"].token_ids)
            reports.append(answers["adaptive"].acceptance)
        for name in engines:
            tps[name].append(count / seconds[name])
        ratios.append(seconds["plain"] / seconds["adaptive"])
    logs = [math.log(ratio) for ratio in ratios]
    half = stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    found = [written(fixed, text, args.new)[1].acceptance for text in texts]
    rounds = sum(report.rounds for report in found)
    result = {
        "model": Path(args.model).name,
        "drafter": Path(args.drafter).name,
        "device": device_name(),
        "pairs": args.pairs,
        "answers": len(texts),
        "new_tokens": args.new,
        "decode_tps": {name: round(statistics.median(values), 1) for name, values in tps.items()},
        "speed_ratio": round(math.exp(statistics.mean(logs)), 3),
        "speed_ratio_ci95": [round(math.exp(statistics.mean(logs) + s * half), 3) for s in (-1, 1)],
        "accepted_a_round_of_4": round(sum(r.accepted for r in found) / rounds, 2),
        "acceptance_of_4": round(sum(r.accepted for r in found) / sum(r.drafted for r in found), 3),
        "drafted_adaptively": sum(report.drafted for report in reports),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
