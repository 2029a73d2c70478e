"""Calls in Gemma-4's format: what comes through is valid, and the template's text comes through."""

import json
import random
import re

import pytest

from optiq.engine.events import collect
from optiq.engine.grammar.functions import Function
from optiq.engine.grammar.gemma4 import gemma_block
from optiq.engine.grammar.patterns import searched
from optiq.errors import UsageError
from tests.schemas import arguments
from tests.unit.engine.grammar.conftest import STOP

NAME = "f-1.x"


def tool(schema, name=NAME):
    return {"type": "function", "function": {"name": name, "parameters": schema}}


@pytest.fixture
def block(compiler, gemma_format):
    return lambda schema: compiler.lark(
        gemma_format.calls.block([Function(NAME, schema)]), "the grammar of calls"
    )


def wander(run, ids, rng, most=3000):
    """Tokens that the grammar lets through, at random; what ends things is taken more often."""
    ends = [tokens[0] for tokens in map(ids, ('<|"|>', "}", "]"))]
    out = []
    while not run.may_end:
        if len(out) == most:
            return None
        mask = run.allowed().tolist()
        closing = [token for token in ends if mask[token]]
        if closing and rng.random() < 0.3:
            token = rng.choice(closing)
        else:
            token = rng.choice([token for token, may in enumerate(mask) if may])
        assert token not in STOP
        assert run.accept(token)
        out.append(token)
    return out


def read(form, schema, tokens):
    """The arguments that the reader finds."""
    parser = form.parser(tools=[tool(schema)])
    marked = [*form.calls.start, *tokens, *form.calls.end]
    answer = collect([*parser.feed(marked), *parser.finish("stop")])
    assert answer.finish.failed_calls == 0
    assert answer.text == ""
    (call,) = answer.tool_calls
    assert call.name == NAME
    return call.data()


@pytest.mark.parametrize("seed", range(40))
def test_what_comes_through_is_read_as_valid_arguments(block, gemma_format, ids, seed):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    rng = random.Random(seed)
    schema = arguments(rng)
    tokens = wander(block(schema).start(), ids, rng)
    assert tokens is not None
    found = read(gemma_format, schema, tokens)
    assert not list(validator(schema).iter_errors(found)), (schema, found)


TEXTS = [
    ({"b": 1, "A": "x", "c": None}, {}),
    ({"list": [1, -2.5, "t", True, [], {}], "o": {"k": "v", "j": False}}, {}),
    ({"text": 'with "quotes", {braces}\nand lines'}, {"text": {"type": "string"}}),
    ({}, {}),
]


@pytest.mark.parametrize(("values", "properties"), TEXTS)
def test_the_template_s_own_text_comes_through(gemma, block, ids, values, properties):
    """What a model was taught to write is what the grammar lets it write."""
    nodes = {key: properties.get(key, {}) for key in values}
    call = {"id": "c", "type": "function", "function": {"name": NAME, "arguments": values}}
    text = gemma.apply_chat_template(
        [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}],
        tokenize=False,
    )
    inner = re.search(r"<\|tool_call>(.*)<tool_call\|>", text, re.DOTALL)[1]
    run = block({"type": "object", "properties": nodes, "required": list(values)}).start()
    for token in ids(inner):
        assert run.accept(token), inner
    assert run.may_end


REFUSED = [
    ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
    ({"properties": {"a": {"not": {"type": "null"}}}}, "keyword not"),
    ({"patternProperties": {"^a": {}}}, "patternProperties"),
    ({"properties": {"a": {"type": "string", "format": "hostname"}}}, "hostname"),
    ({"properties": {"a": {"oneOf": [{"type": "string"}, {"type": "string"}]}}}, "oneOf"),
    ({"properties": {"a": {"allOf": [{}, {}]}}}, "allOf"),
    ({"properties": {"a": {"$ref": "#/nowhere"}}}, "nowhere"),
    ({"properties": {"a": {"$ref": "http://x"}}}, "http://x"),
    ({"properties": {"a": {"$ref": "#/properties/a"}}}, "itself"),
    ({"properties": {"a": {"enum": []}}}, "enum"),
    ({"properties": {"a": {"type": "string", "enum": [1]}}}, "enum"),
    ({"properties": {"a": {"enum": ["x"], "minLength": 3}}}, "minLength beside enum"),
    ({"properties": {"a": {"type": "str"}}}, "type str"),
    ({"properties": {"a": {"type": "string", "pattern": "a(^b)"}}}, "anchor"),
    ({"properties": {"a": {"type": "string", "minLength": 3, "maxLength": 1}}}, "maxLength"),
    ({"properties": {"a": {"type": "string", "minLength": "3"}}}, "minLength"),
    ({"properties": {}, "required": ["z"], "additionalProperties": False}, "property z"),
    ({"properties": {"a": {"items": False, "type": "array"}}}, "false"),
    ({"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}}}, "minimum"),
    ({"properties": {"a": {"type": "integer", "minimum": "5"}}}, "minimum"),
]


@pytest.mark.parametrize(("schema", "said"), REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name(block, schema, said):
    with pytest.raises(UsageError, match=said):
        block({"type": "object", **schema})


def test_names_that_the_format_cannot_hold_are_refused():
    with pytest.raises(UsageError, match="no name"):
        gemma_block([Function("a{b", None)], 16)


def test_without_parameters_any_object_comes_through(block, ids):
    run = block(None).start()
    for token in ids(f'call:{NAME}{{k:[1,{{x:<|"|>t<|"|>}}],z:null}}'):
        assert run.accept(token)
    assert run.may_end


PATTERNS = [
    ("^a|b$", ["a", "axe", "xb", "b"], ["xa", "bx"]),
    ("a/b", ["xa/by"], ["ab"]),
    (r"^\$\d+$", ["$12"], ["12", "$x", "$\u0661"]),
    (r"[\w.]+\\$", ["a.\\"], ["a."]),
    ("[|^$]", ["x|y", "^"], ["x"]),
]


@pytest.mark.parametrize(("pattern", "right", "wrong"), PATTERNS)
def test_patterns_of_schemas_are_searched_for(compiler, ids, pattern, right, wrong):
    grammar = compiler.lark(f"start: T\nT: {searched(pattern)}\n", "a pattern")
    for text in (*right, *wrong):
        run = grammar.start()
        comes = all(run.accept(token) for token in ids(text)) and run.may_end
        assert comes == (text in right), text


def test_equal_parts_of_schemas_are_one_rule():
    part = {"type": "array", "items": {"type": "string"}}
    one = Function("f", {"type": "object", "properties": {"a": part}})
    many = Function("f", {"type": "object", "properties": {f"a{i}": part for i in range(50)}})
    difference = gemma_block([many], 16).count("\n") - gemma_block([one], 16).count("\n")
    assert difference <= 49 * 3, json.dumps(difference)
