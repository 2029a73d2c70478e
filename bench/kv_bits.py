"""What keys and values in few bits cost on a text: KL against the model's own type, and bytes.

usage: python bench/kv_bits.py MODEL TEXT [--tokens 1024] [-o OUT]

TEXT is a plain file, or JSON lines with a field `text`. Token by token, the distributions after the
same text are compared; KL is in nats a token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import optiq
from optiq.backend import device_name, mx
from optiq.configs import KV_BITS
from optiq.engine.engine import EngineOptions
from optiq.events import Event, Notice


def text_of(path: Path) -> str:
    raw = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return raw
    return "\n\n".join(json.loads(line)["text"] for line in raw.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    notes: list[str] = []

    def emit(event: Event) -> None:
        if isinstance(event, Notice):
            notes.append(event.text)

    def measured(bits: int | None) -> tuple[list[int], mx.array]:
        """The tokens, and log-probabilities after each: (N, vocabulary) float32."""
        engine = optiq.load(args.model, options=EngineOptions(kv_bits=bits), emit=emit)
        text = text_of(args.text)[: 16 * args.tokens]
        tokens = list(engine.prompts.raw(text).tokens)[: args.tokens]
        logits = engine.logits(tokens).astype(mx.float32)
        out = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(out)
        return tokens, out

    tokens, right = measured(None)
    result: dict[str, Any] = {"model": Path(args.model).name, "text": args.text.name}
    result |= {"tokens": len(tokens), "device": device_name()}
    following = mx.array(tokens[1:])[:, None]
    for bits in KV_BITS:
        _, other = measured(bits)
        kl = (mx.exp(right) * (right - other)).sum(-1)
        loss = [-float(mx.take_along_axis(x[:-1], following, 1).mean()) for x in (right, other)]
        result[f"bits_{bits}"] = {
            "kl": float(kl.mean()),
            "kl_max": float(kl.max()),
            "same_top": float((right.argmax(-1) == other.argmax(-1)).mean()),
            "loss_plain": loss[0],
            "loss": loss[1],
            "note": notes[-1],
        }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
