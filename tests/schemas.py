"""JSON schemas of function arguments, at random."""

import random
from typing import Any

NAMES = ("a", "B", "city", "max-size", "x.y", "Zeit", "a b", "", "k,1", "\u00fc", 'q"')


def arguments(rng: random.Random) -> dict[str, Any]:
    """A schema of an object, with what schemas of tools have in them."""
    schema = _object(rng, 0)
    schema["$defs"] = {
        "tree": {
            "type": "object",
            "properties": {"value": _scalar(rng), "next": {"$ref": "#/$defs/tree"}},
            "required": ["value"],
        }
    }
    return schema


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    makers = [_scalar, _scalar, _enum, _nullable]
    if depth < 3:
        makers += [
            lambda rng: _object(rng, depth + 1),
            lambda rng: _list(rng, depth + 1),
            lambda rng: _union(rng, depth + 1),
            lambda _: {"$ref": "#/$defs/tree"},
        ]
    return rng.choice(makers)(rng)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 4))
    properties = {name: _any(rng, depth + 1) for name in names}
    required = [name for name in names if rng.random() < 0.5]
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    if (extra := rng.choice([None, False, {"type": "integer"}])) is not None:
        schema["additionalProperties"] = extra
    return schema


def _list(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "items": _any(rng, depth + 1)}
    return schema | rng.choice([{}, {"minItems": low, "maxItems": low + rng.randint(0, 2)}])


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "integer"}]}
    return {"anyOf": [_any(rng, depth + 1) for _ in range(rng.randint(1, 3))]}


def _nullable(rng: random.Random) -> dict[str, Any]:
    return {"type": [rng.choice(["string", "boolean", "integer"]), "null"]}


def _enum(rng: random.Random) -> dict[str, Any]:
    values = ["red", "", "5", 'say "hi"', 5, -1.5, True, None, ["x", {"y": 1}]]
    return rng.choice([{"enum": rng.sample(values, rng.randint(1, 4))}, {"const": "5"}])


def _scalar(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-20, 20)
    return rng.choice(
        [
            {"type": "string"},
            {"type": "string", "minLength": 2, "maxLength": 6},
            {"type": "string", "pattern": "^[a-c]{1,3}$|^x\\d$"},
            {"type": "string", "pattern": "[xy]+", "maxLength": 5},
            {"type": "string", "format": "date"},
            {"type": "integer"},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 300)},
            {"type": "number"},
            {"type": "number", "exclusiveMinimum": low},
            {"type": "integer", "maximum": low},
            {"type": "boolean"},
            {"type": "null"},
        ]
    )
