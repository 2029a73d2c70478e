"""What a run takes: seconds of every stage, peak of memory, bytes.

usage: python bench/convert_run.py SOURCE [--measure-only] [--effort E] [--target-bpw B]
           [--target-size S] [--max-windows N] [--work DIR] [--model DIR] [-o OUT]

Runs `optiq.measure`, and `optiq.convert` unless told not to, in an empty work directory; with
`--work` in that one, so that a run that was stopped goes on: its seconds are those of the rest.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import optiq  # before mlx, for its BLAS
from optiq import pipeline
from optiq.backend import mx
from optiq.configs import AllocateConfig, JudgeConfig, MeasureConfig, RunConfig
from optiq.evals.provenance import provenance
from optiq.events import PlainRenderer
from optiq.models.load import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source")
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--effort", default="standard")
    parser.add_argument("--target-bpw", type=float)
    parser.add_argument("--target-size", help="instead of bits, e.g. 8.3GB; default: 5 bpw")
    parser.add_argument("--max-windows", type=int, help="of the last judgement")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--model", type=Path, help="where the result stays")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    measure = MeasureConfig(effort=args.effort)
    bpw = args.target_bpw or (None if args.target_size else 5.0)
    result: dict[str, object] = {
        "optiq": optiq.__version__,
        "device": provenance().device,
        "blas": provenance().blas,
        "effort": args.effort,
        "source_bytes": open_source(args.source).info.size_bytes,
    }
    with tempfile.TemporaryDirectory() as folder, PlainRenderer(sys.stderr, 15.0) as emit:
        run = RunConfig(work=args.work or Path(folder) / "work")
        start = time.perf_counter()
        table = pipeline.measure(args.source, measure, run, emit)
        result["measure_s"] = round(time.perf_counter() - start, 1)
        result["tokens"] = table.num_tokens
        if not args.measure_only:
            start = time.perf_counter()
            release = pipeline.convert(
                args.source,
                args.model or Path(folder) / "model",
                measure=measure,
                allocate=AllocateConfig(target_bpw=bpw, target_size=args.target_size),
                judge=JudgeConfig(max_windows=args.max_windows),
                run=run,
                emit=emit,
            )
            result["convert_and_judge_s"] = round(time.perf_counter() - start, 1)
            result["kl_nats_per_token"] = release.fidelity.kl_nats_per_token
            result["size_bytes"] = release.fidelity.size_bytes
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["peak_rss_bytes"] = rss * (1 if sys.platform == "darwin" else 1024)
    result["peak_device_bytes"] = int(mx.get_peak_memory())
    text = json.dumps(result, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
