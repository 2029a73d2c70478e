"""Whether a conversion that is killed again and again ends in the bytes of an undisturbed one.

usage: python bench/kills.py SOURCE [--kills 10] [--effort quick] [--target-bpw 5.0] [-o OUT]

Converts SOURCE once in peace, then again with SIGKILL at random moments and the same command after
each, all in directories that are deleted at the end. Exit status 1 if a file differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIQ = str(Path(sys.executable).parent / "optiq")


def digests(folder: Path) -> dict[str, str]:
    """Hash of every file but the one that holds dates."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--effort", default="quick")
    parser.add_argument("--target-bpw", type=float, default=5.0)
    parser.add_argument("--max-windows", type=int, default=12, help="windows of the last judgement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()

    def command(root: Path) -> list[str]:
        where = ["-o", str(root / "out" / "model"), "--work", str(root / "work")]
        options = ["--effort", args.effort, "--target-bpw", str(args.target_bpw)]
        judge = ["--max-windows", str(args.max_windows)]
        return [OPTIQ, "convert", args.source, *where, *options, *judge]

    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        start = time.perf_counter()
        subprocess.run(command(calm), check=True)
        whole_s = time.perf_counter() - start
        moments: list[float] = []
        while len(moments) < args.kills:
            process = subprocess.Popen(command(killed))
            # moments all over the run: what is left of it gets shorter with every one that counted
            moment = chance.uniform(0.02, 1.5 / args.kills) * whole_s
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                moments.append(round(moment, 1))
                continue
            break
        if not (killed / "out" / "model").exists():
            subprocess.run(command(killed), check=True)
        one, other = (digests(root / "out" / "model") for root in (calm, killed))
        differ = sorted(name for name in one | other if one.get(name) != other.get(name))
        left = [path.name for path in (killed / "out").iterdir() if path.name != "model"]
        result = {
            "undisturbed_s": round(whole_s, 1),
            "killed_after_s": moments,
            "differ": differ,
            "left_behind": left,
        }
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if not differ and not left and len(moments) == args.kills else 1)


if __name__ == "__main__":
    main()
