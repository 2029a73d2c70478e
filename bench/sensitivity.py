"""Is the sketch right, and what does it cost? Sketch against brute force on the same tokens.

usage: python bench/sensitivity.py SOURCE [--windows 16] [--draws 4] [--modules 60] [--jobs 1]
           [-o OUT.json]

Takes random modules and, for each, one option of every width; prints and writes, for every width,
Spearman's rank correlation, the correlation of logarithms and the ratio of sums, and the cost of
the sketch for the full menu over that of brute force, extrapolated from the mean of its pairs. With
several jobs that mean is of a few pairs, spread over the model and scored while nothing else ran;
the other pairs are shared out to processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
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
TIMED_ALONE = 16
"""Pairs scored before other jobs begin."""

Pair = tuple[ModuleScores, QuantOption]


def pick_pairs(
    rows: list[ModuleScores], num_modules: int, random: np.random.Generator
) -> list[Pair]:
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


@contextlib.contextmanager
def exact_scores(source: Source, tokens: np.ndarray) -> Generator[ExactScores]:
    """Brute force with GPTQ, and a directory for it."""
    with tempfile.TemporaryDirectory() as folder:
        yield ExactScores(source, tokens, Path(folder) / "exact", "gptq")


def scored_apart(name: str, tokens: np.ndarray, pairs: Sequence[Pair]) -> list[float]:
    """True KL of pairs, in a process of its own."""
    with exact_scores(open_source(name), tokens) as exact:
        return [exact.score(row.module, option)[0] for row, option in pairs]


def brute_force(
    args: argparse.Namespace, source: Source, tokens: np.ndarray, pairs: list[Pair], emit: Emit
) -> tuple[list[float], float]:
    """True KL of pairs, and the seconds that one of those scored alone took."""
    first = len(pairs) if args.jobs == 1 else min(TIMED_ALONE, len(pairs))
    # every so many, so that the pairs timed are of all depths
    alone = [round(n * len(pairs) / first) for n in range(first)]
    others = sorted(set(range(len(pairs))) - set(alone))
    true: dict[int, float] = {}
    with exact_scores(source, tokens) as exact:
        start = time.perf_counter()
        for n in track(alone, emit, "exact", len(alone), "pairs"):
            row, option = pairs[n]
            true[n] = exact.score(row.module, option)[0]
        pair_s = (time.perf_counter() - start) / first
    if others:
        shares = [others[job :: args.jobs] for job in range(args.jobs)]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, spawn) as pool:
            work = [
                pool.submit(scored_apart, args.source, tokens, [pairs[n] for n in share])
                for share in shares
            ]
            for share, found in zip(shares, work, strict=True):
                true |= zip(share, found.result(), strict=True)
    return [true[n] for n in range(len(pairs))], pair_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--modules", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=1, help="processes for brute force")
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
        rows, sketch_s = sketch(source, text.tokens, args.draws, Path(folder), emit)
        pairs = pick_pairs(rows, args.modules, np.random.default_rng(0))
        true, pair_s = brute_force(args, source, text.tokens, pairs, emit)
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
