"""How often are the verdicts of `optiq compare` wrong, and does the printed MDE hold?

Items have difficulties, answers are drawn from them. A model against itself under two seeds gives
the rate of false verdicts; a model that is better by the printed minimum detectable effect gives
the power.

    python bench/verdicts.py --pairs 2000 -o verdicts.json
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit

from optiq.eval_artifacts import Comparison
from optiq.evals.compare import RESAMPLES, compare
from optiq.evals.scores import Evaluated, Scores

FULL = {"mmlu": 1000, "gsm8k": 1000, "ifeval": 541, "bfcl": 200, "humaneval": 164, "hashhop": 1000}
LIMITED = dict.fromkeys(FULL, 50)
# (a, b) of the Beta distribution of an item's chance; most items are nearly sure either way
CHANCES = {
    "mmlu": (0.6, 0.5),
    "gsm8k": (0.8, 0.3),
    "ifeval": (0.7, 0.4),
    "bfcl": (0.6, 0.3),
    "humaneval": (0.5, 0.6),
    "hashhop": (0.4, 0.8),
}
SAMPLES = {"hashhop": 4}  # answers to one item: a score in quarters
POPULATION = 100_000
PILOTS = 200


def chances(sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The chance of a right answer of every item."""
    return {task: rng.beta(*CHANCES[task], size) for task, size in sizes.items()}


def answered(
    name: str, items: Mapping[str, np.ndarray], shift: float, rng: np.random.Generator
) -> Evaluated:
    """One run of a model whose log-odds on every item are higher by `shift`."""
    scores = {}
    for task, chance in items.items():
        samples = SAMPLES.get(task, 1)
        right = rng.binomial(samples, moved(chance, shift)) / samples
        scores[task] = Scores(task, "1", tuple(map(str, range(len(right)))), tuple(right.tolist()))
    return Evaluated(name, 10**9, scores)


def moved(chance: np.ndarray, shift: float) -> np.ndarray:
    """Chances with other log-odds."""
    return np.asarray(expit(logit(np.clip(chance, 1e-9, 1 - 1e-9)) + shift))


def paired(
    sizes: Mapping[str, int], shift: float, resamples: int, rng: np.random.Generator
) -> Comparison:
    """A model, better by `shift`, against itself on fresh items."""
    items = chances(sizes, rng)
    model, rival = answered("a", items, shift, rng), answered("b", items, 0.0, rng)
    return compare(model, rival, resamples=resamples, seed=int(rng.integers(2**31)))


def shift_for(points: float, sizes: Mapping[str, int], rng: np.random.Generator) -> float:
    """The shift that is worth so many points of the mean, over all items that could be drawn."""
    items = chances(dict.fromkeys(sizes, POPULATION), rng)

    def excess(shift: float) -> float:
        gains = [float((moved(c, shift) - c).mean()) for c in items.values()]
        return 100 * float(np.mean(gains)) - points

    return float(brentq(excess, 0.0, 10.0))


def rates(
    sizes: Mapping[str, int], shift: float, pairs: int, resamples: int, seed: int
) -> dict[str, float]:
    """Share of each verdict over simulated pairs, and the mean MDE that was printed."""
    rng = np.random.default_rng(seed)
    found = [paired(sizes, shift, resamples, rng) for _ in range(pairs)]
    verdicts = Counter(comparison.verdict for comparison in found)
    printed = [c.overall.mde_points for c in found if c.overall is not None]
    covered = [
        c.overall.ci_points[0] <= 0 <= c.overall.ci_points[1]
        for c in found
        if c.overall is not None
    ]
    return {
        "better": verdicts["better"] / pairs,
        "worse": verdicts["worse"] / pairs,
        "interval_holds_0": float(np.mean(covered)),
        "mean_mde_points": float(np.mean(printed)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=RESAMPLES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    result: dict[str, object] = {"pairs": args.pairs, "resamples": args.resamples}
    for name, sizes in (("full", FULL), ("limit_50", LIMITED)):
        null = rates(sizes, 0.0, args.pairs, args.resamples, args.seed)
        pilot = rates(sizes, 0.0, PILOTS, 100, args.seed + 1)["mean_mde_points"]
        shift = shift_for(pilot, sizes, np.random.default_rng(args.seed + 2))
        power = rates(sizes, shift, args.pairs, args.resamples, args.seed + 3)
        result[name] = {"a_against_a": null, "mde_points": pilot, "at_the_mde": power}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
