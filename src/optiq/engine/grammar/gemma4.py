"""JSON schema -> Lark of Gemma-4's calls: `call:NAME{key:<|"|>text<|"|>,n:3,list:[1,2]}`.

Keys come in the order that chat templates write them in: sorted, upper and lower case alike. What a
schema leaves open is narrowed where that keeps values short and calls readable: numbers have a
bounded number of digits, properties that are not described are left out unless they are asked for,
and a value of any kind nests only a few levels. A keyword that would have to be ignored is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from optiq.engine.grammar.functions import Function
from optiq.engine.grammar.lark import json_rule, quoted
from optiq.engine.grammar.patterns import FORMATS, searched
from optiq.errors import UsageError

_MAX_RULES = 20_000
_MOST_DIGITS = 10**15
_ANY_DEPTH = 4
_INTEGER = r"/-?(0|[1-9][0-9]{0,14})/"
_NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?/"
_KEY = r"/[A-Za-z_][A-Za-z0-9_.\-]{0,63}/"
_TYPES = ("string", "number", "integer", "boolean", "null", "object", "array")

_ANNOTATIONS = frozenset(
    "title description default examples example $comment deprecated readOnly writeOnly $schema "
    "$defs definitions strict".split()
)
_CHOICES = ("$ref", "anyOf", "oneOf", "allOf")
_BY_TYPE = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "number": frozenset(
        {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    ),
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
}
_BY_TYPE["integer"] = _BY_TYPE["number"]
_KNOWN = frozenset().union(*_BY_TYPE.values()) | {"type", "enum", "const", "nullable"}


def gemma_block(functions: Sequence[Function], quote: int) -> str:
    """What stands between the markers of a call.

    Args:
        functions: that may be called.
        quote: id of the token around strings.

    Raises:
        UsageError: if a schema needs what is not supported, which is named.
    """
    rules: list[str] = []
    calls = []
    for function in functions:
        if not function.name or set(function.name) & set('{}[],:<>"') or function.name.isspace():
            raise UsageError(f"{function.name!r} is no name of a function that can be enforced")
        arguments = _Schemas(function, quote, rules)
        calls.append(f"{quoted(f'call:{function.name}')} {arguments.root()}")
    return "\n".join([f"start: {' | '.join(calls)}", *rules, ""])


class _Schemas:
    """Makes rules of the schema of one function.

    Args:
        function: it.
        quote: id of the token around strings.
        rules: of all functions; new ones are added.
    """

    def __init__(self, function: Function, quote: int, rules: list[str]) -> None:
        self._name, self._schema = function.name, function.parameters
        self._quote = f"<[{quote}]>"
        self._rules = rules
        self._known: dict[str, str] = {}  # reference or text -> rule
        self._open: set[str] = set()  # references that have led to nothing but references

    def root(self) -> str:
        """The rule of the arguments."""
        if self._schema is None:
            return self._any_object(0)
        if {"type", *_CHOICES} & set(self._schema):
            return self._node(self._schema)
        return self._node({"type": "object", **self._schema})

    # -- rules -----------------------------------------------------------------------------------

    def _rule(self, body: str, *, is_terminal: bool = False) -> str:
        """The name of a rule with that body."""
        if body in self._known:
            return self._known[body]
        if len(self._rules) >= _MAX_RULES:
            raise self._refused("size of the schema", f"it needs more than {_MAX_RULES} rules")
        name = f"{'T' if is_terminal else 'r'}{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        self._known[body] = name
        return name

    def _refused(self, keyword: str, why: str = "") -> UsageError:
        reason = f" ({why})" if why else ""
        return UsageError(
            f"calls of {self._name} cannot be enforced: its schema has {keyword}, which is not "
            f"supported{reason}; remove it, or let the model choose with tool_choice auto"
        )

    # -- schemas ---------------------------------------------------------------------------------

    def _node(self, schema: Any) -> str:  # noqa: ANN401  any JSON value
        """The rule of a schema."""
        if schema is True or schema == {}:
            return self._any(0)
        if not isinstance(schema, Mapping):
            raise self._refused(f"the schema {json.dumps(schema)}")
        self._check_keywords(schema)
        bodies = self._bodies(schema)
        if schema.get("nullable") is True:
            bodies.append('"null"')
        return self._rule(" | ".join(dict.fromkeys(bodies)))

    def _check_keywords(self, schema: Mapping[str, Any]) -> None:
        for keyword in schema:
            known = keyword in _KNOWN or keyword in _ANNOTATIONS or keyword in _CHOICES
            if not known and not (keyword == "$id" and schema is self._schema):
                raise self._refused(f"the keyword {keyword}")
        present = [keyword for keyword in (*_CHOICES, "enum", "const") if keyword in schema]
        allowed = {"type", "nullable", *_ANNOTATIONS, *present[:1], "$id"}
        if present and (beside := [key for key in schema if key not in allowed]):
            raise self._refused(f"the keyword {beside[0]} beside {present[0]}")

    def _bodies(self, schema: Mapping[str, Any]) -> list[str]:
        """What is valid under a schema, one of these."""
        if "$ref" in schema:
            return [self._reference(schema["$ref"])]
        for keyword in ("anyOf", "oneOf", "allOf"):
            if keyword in schema:
                return [self._node(one) for one in self._members(schema, keyword)]
        types = self._types(schema)
        if "const" in schema:
            return self._values([schema["const"]], types)
        if "enum" in schema:
            if not isinstance(schema["enum"], list):
                raise self._refused("an enum that is no list")
            return self._values(schema["enum"], types)
        if types is None:
            types = [kind for kind in _TYPES if _BY_TYPE.get(kind, frozenset()) & set(schema)]
            if "number" in types:
                types.remove("integer")
            if not types:
                return [self._any(0)]
        return [self._of_type(kind, schema) for kind in types]

    def _types(self, schema: Mapping[str, Any]) -> list[str] | None:
        given = schema.get("type")
        if given is None:
            return None
        types = [given] if isinstance(given, str) else given
        if not isinstance(types, list) or not types:
            raise self._refused(f"the type {json.dumps(given)}")
        found = [str(kind).lower() for kind in types]
        if wrong := [kind for kind in found if kind not in _TYPES]:
            raise self._refused(f"the type {wrong[0]}")
        return found

    def _members(self, schema: Mapping[str, Any], keyword: str) -> list[Any]:
        """Schemas that are alternatives."""
        members = schema[keyword]
        if not isinstance(members, list) or not members:
            raise self._refused(f"an {keyword} that is no list")
        if keyword == "allOf" and len(members) > 1:
            raise self._refused("the keyword allOf", "with more than one schema")
        if "type" in schema:
            typed = {"type": schema["type"]}
            members = [typed | one if _is_untyped(one) else one for one in members]
        if keyword == "oneOf" and not self._are_disjoint(members):
            raise self._refused(
                "the keyword oneOf", "types do not tell its schemas apart; use anyOf"
            )
        return members

    def _are_disjoint(self, members: Sequence[Any]) -> bool:
        """Whether no value is valid under two schemas, as far as types and constants tell."""
        shown = [self._resolved(one) for one in members]
        return all(
            _differ(first, second) for at, first in enumerate(shown) for second in shown[at + 1 :]
        )

    def _resolved(self, schema: Any) -> Any:  # noqa: ANN401  any JSON value
        for _ in range(8):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            schema = self._target(schema["$ref"])
        return schema

    def _reference(self, reference: Any) -> str:  # noqa: ANN401  any JSON value
        """The rule of what a reference points to; the same one each time, so it may recur."""
        key = f"$ref {reference}"
        if key in self._known:
            if key in self._open:
                raise self._refused(f"the reference {reference}", "it refers to itself alone")
            return self._known[key]
        target = self._target(reference)
        name = f"r{len(self._rules)}"
        at = len(self._rules)
        self._rules.append("")
        self._known[key] = name
        only = isinstance(target, Mapping) and bool({"$ref", *_CHOICES} & set(target))
        opened = self._open if only else set()
        held, self._open = self._open, opened | ({key} if only else set())
        body = self._node(target)
        self._open = held
        self._rules[at] = f"{name}: {body}"
        return name

    def _target(self, reference: Any) -> Any:  # noqa: ANN401  any JSON value
        """What a reference points to, within the schema."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise self._refused(f"the reference {reference!r}", "only #/... within the schema")
        node: Any = self._schema
        for part in reference.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(node, Mapping) and key in node:
                node = node[key]
            elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            else:
                raise self._refused(f"the reference {reference}", "it points to nothing")
        return node

    # -- values ----------------------------------------------------------------------------------

    def _of_type(self, kind: str, schema: Mapping[str, Any]) -> str:
        match kind:
            case "string":
                return self._string(schema)
            case "integer" | "number":
                return self._number(kind, schema)
            case "boolean":
                return '("true" | "false")'
            case "null":
                return '"null"'
            case "array":
                return self._array(schema)
            case _:
                return self._object(schema)

    def _string(self, schema: Mapping[str, Any]) -> str:
        low, high = self._bounds(schema, "minLength", "maxLength")
        parts = []
        if low or high is not None:
            parts.append(f"/(?s:.{{{low},{'' if high is None else high}}})/")
        if "pattern" in schema:
            parts.append(self._pattern(schema["pattern"]))
        if "format" in schema:
            if schema["format"] not in FORMATS:
                raise self._refused(f"the format {schema['format']}")
            parts.append(f"/{FORMATS[schema['format']]}/")
        text = self._rule(" & ".join(parts) or "/(?s:.*)/", is_terminal=True)
        return f"{self._quote} {text} {self._quote}"

    def _pattern(self, pattern: Any) -> str:  # noqa: ANN401  any JSON value
        if not isinstance(pattern, str):
            raise self._refused("a pattern that is no text")
        try:
            return searched(pattern)
        except ValueError as error:
            raise self._refused(f"the pattern {pattern}", str(error)) from None

    def _number(self, kind: str, schema: Mapping[str, Any]) -> str:
        limits = {key: schema[key] for key in _BY_TYPE["number"] if key in schema}
        if not limits:
            return self._rule(_INTEGER if kind == "integer" else _NUMBER, is_terminal=True)
        if wrong := [key for key, value in limits.items() if not _is_number(value)]:
            raise self._refused(f"a {wrong[0]} that is no number")
        if not {"minimum", "exclusiveMinimum"} & set(limits):
            tops = [limits[key] for key in ("maximum", "exclusiveMaximum") if key in limits]
            limits["minimum"] = min([-_MOST_DIGITS, *(2 * -abs(top) for top in tops)])
        if not {"maximum", "exclusiveMaximum"} & set(limits):
            bottoms = [limits[key] for key in ("minimum", "exclusiveMinimum") if key in limits]
            limits["maximum"] = max([_MOST_DIGITS, *(2 * abs(bottom) for bottom in bottoms)])
        return self._rule(json_rule({"type": kind, **limits}))

    def _array(self, schema: Mapping[str, Any]) -> str:
        low, high = self._bounds(schema, "minItems", "maxItems")
        if high == 0:
            return '"[]"'
        item = self._node(schema.get("items", True))
        most = "" if high is None else high - 1
        more = "" if high == 1 else f'("," {item}){{{max(low - 1, 0)},{most}}} '
        filled = f'"[" {item} {more}"]"'
        return filled if low else f'("[]" | {filled})'

    def _bounds(self, schema: Mapping[str, Any], low: str, high: str) -> tuple[int, int | None]:
        for key in {low, high} & set(schema):
            value = schema[key]
            if not _is_number(value) or value < 0 or value != int(value):
                raise self._refused(f"the {key} {json.dumps(value)}")
        least, most = int(schema.get(low, 0)), int(schema[high]) if high in schema else None
        if most is not None and most < least:
            raise self._refused(f"a {high} below its {low}")
        return least, most

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise self._refused("properties or required of another type")
        extra = schema.get("additionalProperties", "properties" not in schema)
        nodes = dict(properties)
        for key in required:
            if key not in nodes and schema.get("additionalProperties") is False:
                raise self._refused(f"the required property {key}", "no schema allows it")
            nodes.setdefault(key, schema.get("additionalProperties", True))
        pairs = [
            (f"{self._key(key)} {self._node(nodes[key])}", key in required)
            for key in sorted(nodes, key=str.lower)
            if nodes[key] is not False or key in required
        ]
        more = self._extra(extra, nodes) if extra is not False else None
        return f'"{{" {self._pairs(pairs, more)} "}}"'

    def _key(self, key: str) -> str:
        """A key and its colon."""
        return quoted(f"{key}:") if _is_bare(key) else f'{self._literal(key)} ":"'

    def _pairs(self, pairs: Sequence[tuple[str, bool]], extra: str | None) -> str:
        """Pairs in order, those that are not required perhaps; then others."""
        first = more = '""'
        if extra is not None:
            more = self._rule(f'("," {extra})*')
            first = self._rule(f'"" | {extra} {more}')
        for pair, is_required in reversed(pairs):
            begun = f"{pair} {more}"
            first = self._rule(begun if is_required else f"{begun} | {first}")
            more = self._rule(f'"," {begun}' if is_required else f'("," {pair})? {more}')
        return first

    def _extra(self, schema: Any, nodes: Mapping[str, Any]) -> str:  # noqa: ANN401
        """A pair that the properties do not describe."""
        names = [key for key in nodes if _is_bare(key)]
        key = " & ".join([_KEY, *(f"~{quoted(name)}" for name in names)])
        return f'{self._rule(key, is_terminal=True)} ":" {self._node(schema)}'

    def _values(self, values: Sequence[Any], types: Sequence[str] | None) -> list[str]:
        allowed = [value for value in values if types is None or _is_of(value, types)]
        if not allowed:
            raise self._refused("an enum without values of its type")
        return [self._literal(value) for value in allowed]

    def _literal(self, value: Any) -> str:  # noqa: ANN401  any JSON value
        if isinstance(value, str):
            inner = f"{quoted(value)} " if value else ""
            return f"{self._quote} {inner}{self._quote}"
        if isinstance(value, Mapping):
            pairs = [
                f"{self._key(key)} {self._literal(value[key])}"
                for key in sorted(value, key=str.lower)
            ]
            return " ".join(['"{"', ' "," '.join(pairs), '"}"'])
        if isinstance(value, list):
            return " ".join(['"["', ' "," '.join(map(self._literal, value)), '"]"'])
        try:
            return quoted(json.dumps(value, allow_nan=False))
        except ValueError:
            raise self._refused(f"the value {value}") from None

    def _any(self, depth: int) -> str:
        """A value of any kind."""
        text = self._rule("/(?s:.*)/", is_terminal=True)
        number = self._rule(_NUMBER, is_terminal=True)
        bodies = [f"{self._quote} {text} {self._quote}", number, '"true"', '"false"', '"null"']
        if depth < _ANY_DEPTH:
            inner = self._any(depth + 1)
            bodies += [self._any_object(depth + 1), f'"[" ({inner} ("," {inner})*)? "]"']
        return self._rule(" | ".join(bodies))

    def _any_object(self, depth: int) -> str:
        pair = f'{self._rule(_KEY, is_terminal=True)} ":" {self._any(depth)}'
        return self._rule(f'"{{" ({pair} ("," {pair})*)? "}}"')


def _differ(first: Any, second: Any) -> bool:  # noqa: ANN401  any JSON values
    """Whether no value is valid under both of two schemas."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return False
    kinds = [_kinds(one) for one in (first, second)]
    if all(kinds) and not kinds[0] & kinds[1]:
        return True
    values = [_constants(one) for one in (first, second)]
    if all(values):
        return not set(values[0]) & set(values[1])
    if not all(one.get("type") == "object" for one in (first, second)):
        return False
    for key in set(first.get("required", [])) & set(second.get("required", [])):
        nodes = [one.get("properties", {}).get(key) for one in (first, second)]
        if _differ(*nodes):
            return True
    return False


def _constants(schema: Mapping[str, Any]) -> list[str]:
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return [json.dumps(value, sort_keys=True) for value in values]


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """Types of a schema, integers as numbers; none where it does not say."""
    given = schema.get("type", [])
    kinds = {given} if isinstance(given, str) else set(given)
    if not kinds:
        values = [schema["const"]] if "const" in schema else schema.get("enum", [])
        kinds = {kind for value in values for kind in _TYPES if _is_of(value, [kind])}
    if kinds and schema.get("nullable") is True:
        kinds.add("null")
    return {"number" if kind == "integer" else kind for kind in kinds}


def _is_of(value: Any, types: Sequence[str]) -> bool:  # noqa: ANN401  any JSON value
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int | float):
        return "number" in types or ("integer" in types and value == int(value))
    kinds = {str: "string", type(None): "null", dict: "object", list: "array"}
    return kinds.get(type(value)) in types


def _is_untyped(schema: Any) -> bool:  # noqa: ANN401  any JSON value
    return isinstance(schema, Mapping) and not {"type", *_CHOICES} & set(schema)


def _is_number(value: Any) -> bool:  # noqa: ANN401  any JSON value
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_bare(key: str) -> bool:
    """Whether a key needs no quotes."""
    return bool(key) and key == key.strip() and not set(key) & set('{}[],:"')
