"""Is the sketch right, and what does it cost? Sketch against brute force on the same tokens.

usage: python bench/sensitivity.py SOURCE [--windows 16] [--draws 4] [--modules 60] [-o OUT.json]

Takes random modules and, for each, one option of every width; prints and writes, for every width,
Spearman's rank correlation, the correlation of logarithms and the ratio of sums, and the cost of
the sketch for the full menu over that of brute force, extrapolated from the mean of its pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from optiq.artifacts import BITS, ModuleScores, QuantOption, menu
from optiq.configs import MeasureConfig
from optiq.data.calibration import builtin_records, windows
from optiq.evals.provenance import provenance
from optiq.events import Emit, PlainRenderer, track
from optiq.models.load import Source, open_source
from optiq.quant.exact import ExactScores, agreement
from optiq.quant.sensitivity import module_scores
from optiq.quant.sketch import Sketch

WINDOW = 256


def pick_pairs(
    rows: list[ModuleScores], num_modules: int, random: np.random.Generator
) -> list[tuple[ModuleScores, QuantOption]]:
    """Random modules, in model order, with one option of every width each."""
    chosen = sorted(random.permutation(len(rows))[:num_modules])
    pairs = []
    for number in chosen:
        row = rows[number]
        for bits in BITS:
            options = [option for option in menu(row.module.in_dims) if option.bits == bits]
            pairs.append((row, options[random.integers(len(options))]))
    return pairs


def sketch(
    source: Source, tokens: np.ndarray, draws: int, work: Path, emit: Emit
) -> tuple[list[ModuleScores], float]:
    """The table of a sketch with some draws for every window, and the seconds it took."""
    start = time.perf_counter()
    found = Sketch(source, np.repeat(tokens, draws, axis=0), work, MeasureConfig(), emit).run()
    rows = [module_scores(info, found[info.path], WINDOW, source) for info in source.modules]
    return rows, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--modules", type=int, default=60)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    source = open_source(args.source)
    text = windows(
        builtin_records("calibration"),
        source.tokenizer,
        source.config,
        window=WINDOW,
        count=args.windows,
        seed=0,
    )
    with tempfile.TemporaryDirectory() as folder, PlainRenderer(sys.stderr, 30.0) as emit:
        rows, sketch_s = sketch(source, text.tokens, args.draws, Path(folder) / "sketch", emit)
        pairs = pick_pairs(rows, args.modules, np.random.default_rng(0))
        exact = ExactScores(source, text.tokens, Path(folder) / "exact", "gptq")
        start = time.perf_counter()
        true = [
            exact.score(row.module, option)[0]
            for row, option in track(pairs, emit, "exact", len(pairs), "pairs")
        ]
        pair_s = (time.perf_counter() - start) / len(pairs)
    predicted = [row.score(option).kl_nats_per_token for row, option in pairs]
    by_width = {}
    for bits in BITS:
        at = [n for n, (_, option) in enumerate(pairs) if option.bits == bits]
        by_width[bits] = agreement([predicted[n] for n in at], [true[n] for n in at])
    wide = [n for n, (_, option) in enumerate(pairs) if option.bits >= 3]
    num_pairs = sum(len(menu(info.in_dims)) for info in source.modules)
    result = {
        "source": source.info.name,
        "device": provenance().device,
        "blas": provenance().blas,
        "tokens": int(text.tokens.size),
        "draws": args.draws,
        "pairs": len(pairs),
        "by_width": by_width,
        "median_spearman": float(np.median([by_width[bits]["spearman"] for bits in BITS])),
        "sum_ratio_3_bits_and_more": sum(predicted[n] for n in wide) / sum(true[n] for n in wide),
        "sketch_s": sketch_s,
        "exact_s_per_pair": pair_s,
        "exact_s_full_menu": pair_s * num_pairs,
        "cost_ratio": pair_s * num_pairs / sketch_s,
    }
    text_out = json.dumps(result, indent=1)
    print(text_out)
    if args.out is not None:
        args.out.write_text(text_out + "\n")


if __name__ == "__main__":
    main()
