"""Whether answers under a JSON schema are valid: the JSON-Schema-Test-Suite and a random model.

usage: python bench/json_schema_suite.py MODEL FOLDER [--schemas N] [--max-tokens N] [--seed S]

MODEL is any model directory, best one with random weights, which writes whatever it may. FOLDER
holds files of the suite (`tests/draft2020-12`, in the source distribution of the PyPI package
`jsonschema`, which must be installed too). Every answer that ends is validated; every schema that
is refused must have a reason that names something of it.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from jsonschema import Draft202012Validator

import optiq  # before mlx, for its BLAS
from optiq.engine.engine import Engine, Generation, load
from optiq.engine.grammar import Grammar
from optiq.errors import UsageError
from optiq.evals.provenance import provenance

_TOGETHER = 32  # answers at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    schemas = list(_schemas(args.folder))
    schemas = random.Random(args.seed).sample(schemas, min(args.schemas, len(schemas)))
    engine = load(args.model)
    start = time.perf_counter()
    outcomes = [
        outcome
        for at in range(0, len(schemas), _TOGETHER)
        for outcome in _run(engine, schemas[at : at + _TOGETHER], args.max_tokens, args.seed)
    ]
    counts = collections.Counter(kind for kind, _, _ in outcomes)
    result = {
        "optiq": optiq.__version__,
        "device": provenance().device,
        "schemas": len(schemas),
        "counts": dict(counts),
        "tokens": args.max_tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "reasons": collections.Counter(
            said.split(":", 1)[-1].strip()[:80] for kind, _, said in outcomes if kind == "refused"
        ),
        "bad": [one for one in outcomes if one[0] in {"invalid", "unnamed"}],
        "length": [one for one in outcomes if one[0] == "length"],
    }
    json.dump(result, sys.stdout, indent=1)
    sys.exit(bool(result["bad"]))


def _schemas(folder: Path) -> Iterator[object]:
    """Every schema of the suite."""
    for file in sorted(folder.glob("*.json")):
        for group in json.loads(file.read_text(encoding="utf-8")):
            yield group["schema"]


def _run(
    engine: Engine, schemas: list[object], max_tokens: int, seed: int
) -> list[tuple[str, object, str]]:
    """Outcome, schema, and answer or reason."""
    begun: list[tuple[object, Generation | str]] = []
    for schema in schemas:
        grammar = Grammar("json_schema", schema)
        try:
            begun.append(
                (schema, engine.generate("x", grammar=grammar, max_tokens=max_tokens, seed=seed))
            )
        except UsageError as error:
            begun.append((schema, str(error)))
    return [_judged(schema, found) for schema, found in begun]


def _judged(schema: object, found: Generation | str) -> tuple[str, object, str]:
    if isinstance(found, str):
        return ("refused" if _is_named(schema, found) else "unnamed"), schema, found
    try:
        result = found.result()
    except UsageError as error:
        return "stopped", schema, str(error)
    if result.finish_reason == "length":
        return "length", schema, result.text[:200]
    try:
        errors = [
            error.message
            for error in Draft202012Validator(schema).iter_errors(json.loads(result.text))
        ]
    except ValueError as error:
        errors = [str(error)]
    return ("invalid" if errors else "valid"), schema, f"{result.text[:200]} {errors[:2]}"


def _is_named(schema: object, message: str) -> bool:
    """Whether a message names a keyword or a reference of a schema."""
    if isinstance(schema, dict):
        if "Unimplemented keys" in message:
            return True
        own = any(
            key in message or (key == "$ref" and str(value) in message)
            for key, value in schema.items()
        )
        return own or any(_is_named(value, message) for value in schema.values())
    if isinstance(schema, list):
        return any(_is_named(value, message) for value in schema)
    return schema is False and "false" in message


if __name__ == "__main__":
    main()
