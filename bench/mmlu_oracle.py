"""lm-eval's log-likelihoods of the questions that bench/mmlu_loglikelihoods.py wrote.

Runs in an environment of its own, with torch, transformers and lm-eval; nothing of optiq is used.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lm_eval.api.instance import Instance  # type: ignore[import-not-found]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]


def main() -> None:
    parser = argparse.ArgumentParser(description="log-likelihoods of lm-eval")
    parser.add_argument("model", type=Path)
    parser.add_argument("ours", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.ours.open()]
    flags = {row["bos"] is not None for row in rows}
    assert len(flags) == 1
    model = HFLM(
        pretrained=str(args.model),
        dtype="float32",
        device="cpu",
        batch_size=4,
        add_bos_token=flags.pop(),
    )
    requests = [
        Instance("loglikelihood", {}, (row["context"], option), index)
        for index, row in enumerate(rows)
        for option in row["options"]
    ]
    found = iter(model.loglikelihood(requests))
    with args.out.open("w") as file:
        for row in rows:
            values = [next(found)[0] for _ in row["options"]]
            file.write(json.dumps({"id": row["id"], "logprobs": values}) + "\n")


if __name__ == "__main__":
    main()
