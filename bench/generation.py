"""Speed of the engine against stock mlx-lm on one model: prefill, decode alone, decode in batches.

usage: python bench/generation.py MODEL [--prompt 32] [--new 16] [--batch 4] [--repeat 3] [-o OUT]

Each side runs in a process of its own, in turn, `--repeat` times. The stock one never imports
optiq: it has the BLAS and the dtypes that mlx-lm has by itself. Greedy; answers never end early.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIDES = ("optiq", "stock")


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    chance = random.Random(0)
    return [[chance.randrange(10, vocab - 10) for _ in range(length)] for _ in range(count)]


def optiq_side(args: argparse.Namespace) -> dict[str, Any]:
    import optiq  # noqa: PLC0415  only this side has it
    from optiq.backend import device_name  # noqa: PLC0415
    from optiq.engine.events import Tokens  # noqa: PLC0415

    engine = optiq.load(args.model)
    vocab = len(engine.tokenizer.get_vocab())
    eos = sorted(engine.tokenizer.eos_token_ids)
    never = dict.fromkeys(eos, -100.0)

    def run(texts: list[list[int]], new: int) -> tuple[float, float]:
        """Seconds to the first token of the last answer, and from there to the end."""
        start = time.perf_counter()
        answers = [
            engine.generate(text, temperature=0, max_tokens=new, logit_bias=never) for text in texts
        ]
        waiting = set(range(len(answers)))
        first = start
        while not engine.idle:
            engine.step()
            for index, answer in enumerate(answers):
                events = answer.pending()
                if index in waiting and any(isinstance(event, Tokens) for event in events):
                    waiting.discard(index)
                    first = time.perf_counter()
        return first - start, time.perf_counter() - first

    return measured(run, args, vocab) | {"version": optiq.__version__, "device": device_name()}


def stock_side(args: argparse.Namespace) -> dict[str, Any]:
    import mlx_lm  # noqa: PLC0415  only this side imports it by itself
    from mlx_lm.generate import BatchGenerator, generate_step  # noqa: PLC0415

    model, tokenizer = mlx_lm.load(args.model)

    def run(texts: list[list[int]], new: int) -> tuple[float, float]:
        start = time.perf_counter()
        if len(texts) == 1:
            import mlx.core as mx  # noqa: PLC0415

            steps = generate_step(mx.array(texts[0]), model, max_tokens=new)
            next(steps)
            first = time.perf_counter()
            for _ in steps:
                pass
            return first - start, time.perf_counter() - first
        generator = BatchGenerator(model, max_tokens=new, stop_tokens=[])
        generator.insert(texts, [new] * len(texts))
        waiting, first, done = len(texts), start, 0
        seen: set[int] = set()
        while done < len(texts):
            for reply in generator.next_generated():
                if reply.uid not in seen:
                    seen.add(reply.uid)
                    waiting -= 1
                    first = time.perf_counter() if not waiting else first
                done += reply.finish_reason is not None
        generator.close()
        return first - start, time.perf_counter() - first

    return measured(run, args, len(tokenizer.get_vocab())) | {"version": mlx_lm.__version__}


def measured(run: Any, args: argparse.Namespace, vocab: int) -> dict[str, Any]:  # noqa: ANN401
    run(prompts(1, args.prompt, vocab), 2)
    out: dict[str, Any] = {}
    for batch in (1, *args.batch):
        prefill, decode = run(prompts(batch, args.prompt, vocab), args.new)
        out[f"batch_{batch}"] = {
            "prefill_tps": batch * args.prompt / prefill,
            "decode_tps": batch * (args.new - 1) / decode,
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--batch", type=int, nargs="*", default=[4])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="one side, once, in this process")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    if args.side:
        side = optiq_side if args.side == "optiq" else stock_side
        print(json.dumps(side(args)))
        return
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    sizes = ["--prompt", str(args.prompt), "--new", str(args.new)]
    batches = ["--batch", *map(str, args.batch)]
    for number in range(args.repeat):
        for side in SIDES[:: 1 if number % 2 else -1]:
            command = [sys.executable, __file__, args.model, *sizes, *batches, "--side", side]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(side, runs[side][-1], file=sys.stderr)
    result: dict[str, Any] = {"model": Path(args.model).name, "prompt": args.prompt}
    result |= {"new": args.new, "device": runs["optiq"][0]["device"], "repeats": args.repeat}
    for batch in (1, *args.batch):
        for what in ("prefill_tps", "decode_tps"):
            medians = {
                side: statistics.median(run[f"batch_{batch}"][what] for run in runs[side])
                for side in SIDES
            }
            ratio = medians["optiq"] / medians["stock"]
            named = {side: round(value, 1) for side, value in medians.items()}
            result[f"batch_{batch}_{what}"] = named | {"ratio": round(ratio, 2)}
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
