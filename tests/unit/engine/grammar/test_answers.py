"""Whole answers of models with random weights under grammars."""

import json
import random

import pytest

import optiq
from optiq.engine.engine import EngineOptions
from optiq.engine.grammar import Grammar
from optiq.engine.messages import ChatOptions
from optiq.errors import UsageError
from tests.drafters import Forced
from tests.gemma4 import ASSISTANT, TARGET
from tests.schemas import arguments

MESSAGES = [{"role": "user", "content": "hi"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "born": {"type": "integer", "minimum": 1900, "maximum": 2030},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "born", "tags"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "add_person", "parameters": PERSON}}
ASKED = [
    {"grammar": Grammar("json_schema", PERSON)},
    {"grammar": Grammar("regex", "([a-f]{3}-){4}[0-9]+z"), "thinking": True, "thinking_budget": 6},
    {"tools": [TOOL], "tool_choice": "required"},
]


@pytest.fixture(scope="module")
def engine():
    return optiq.load(TARGET)


def is_person(data):
    return (
        isinstance(data["name"], str)
        and len(data["name"]) <= 8
        and 1900 <= data["born"] <= 2030
        and set(data["tags"]) <= {"red", "green"}
        and len(data) == 3
    )


@pytest.mark.parametrize("drafter", [ASSISTANT, "ngram", TARGET], ids=lambda each: str(each)[-9:])
def test_drafters_change_no_answer_under_a_grammar(engine, drafter):
    drafting = optiq.load(TARGET, drafter, EngineOptions(num_drafts=3))
    given = {"seed": 1, "temperature": 1.0, "max_tokens": 24, **ASKED[0]}
    plain = engine.generate(MESSAGES, **given).result()
    assert drafting.generate(MESSAGES, **given).result().token_ids == plain.token_ids


@pytest.mark.parametrize("asked", ASKED[:3:2])
@pytest.mark.parametrize("chance", [0.5, 1.0])
def test_drafts_are_masked_and_taken_back(engine, asked, chance):
    """With drafts that are often right, unlike those of random weights."""
    given = {"seed": 2, "temperature": 1.0, "max_tokens": 24, **asked}
    plain = engine.generate(MESSAGES, **given).result()
    prompt = engine.prompts.chat(MESSAGES, ChatOptions(asked.get("tools", ()))).tokens
    known = Forced({prompt: list(plain.token_ids)}, chance, 576)
    drafting = optiq.load(TARGET, options=EngineOptions(num_drafts=5))
    drafting._loop.drafter = known
    drafted = drafting.generate(MESSAGES, **given).result()
    assert drafted.token_ids == plain.token_ids
    assert drafted.acceptance.accepted > 0
    if chance == 1.0:
        assert drafted.acceptance.accepted == drafted.acceptance.drafted


def test_answers_side_by_side_obey_their_own_grammars(engine):
    begun = [
        engine.generate(MESSAGES, seed=seed, max_tokens=90, **asked)
        for asked in ASKED
        for seed in range(2)
    ]
    begun = [generation.result() for generation in begun]
    for result in begun[:2]:
        assert is_person(json.loads(result.text))
        assert result.finish_reason == "stop"
    for result in begun[2:4]:
        assert len(result.text.split("-")) == 5
        assert result.usage.reasoning_tokens <= 6 + 2 + 8  # its markers and its name
    for result in begun[4:]:
        assert result.finish_reason in {"tool_calls", "length"}
        assert all(is_person(call.data()) for call in result.tool_calls)
        assert result.text == "" or result.finish_reason == "length"


def test_a_grammar_that_fails_ends_its_own_answer_only(engine):
    many = " | ".join(f"a{i}" for i in range(2500))
    rules = "\n".join(f'a{i}: "x" "{i}"' for i in range(2500))
    costly = Grammar("lark", f'start: "yy" ({many})\n{rules}')
    bad = engine.generate(MESSAGES, grammar=costly, max_tokens=9)
    good = engine.generate(MESSAGES, grammar=Grammar("choice", ("abcdefgh",)))
    assert good.result().text == "abcdefgh"
    with pytest.raises(UsageError, match="asks too much"):
        bad.result()


def test_without_calls_there_are_none(engine):
    given = {"tools": [TOOL], "max_tokens": 40, "logit_bias": {12: 100}}
    assert engine.tokenizer.convert_tokens_to_ids("<|tool_call>") == 12
    loose = engine.generate(MESSAGES, **given).result()
    assert 12 in loose.token_ids
    strict = engine.generate(MESSAGES, tool_choice="none", **given).result()
    assert 12 not in strict.token_ids


def test_text_can_obey_a_grammar_too(engine):
    assert engine.generate("x", grammar=Grammar("choice", ("only",))).result().text == "only"


def test_grammars_can_be_prepared(engine):
    engine.prepare_grammars()
    assert "compiler" in vars(engine._planner)


# of the JSON-Schema-Test-Suite's kinds; bench/json_schema_suite.py runs the whole
SCHEMAS = [
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"const": 1}}},
    {"type": "object", "properties": {"n": {"type": "object", "required": ["x"]}}},
    {"enum": [{"a": False}, [0], "\u00e9\n", None, 1.5]},
    {"anyOf": [{"type": "integer", "multipleOf": 7}, {"type": "string", "pattern": "^[a-z]{2}$"}]},
    {"type": "array", "prefixItems": [{"type": "null"}, {"const": "x"}], "items": False},
    {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.5},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 50}]},
    {"type": ["boolean", "null"]},
    {"type": "string", "format": "date-time"},
    {
        "type": "object",
        "patternProperties": {"^a": {"type": "null"}},
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
]


def test_every_answer_under_a_schema_is_valid(engine):
    jsonschema = pytest.importorskip("jsonschema")
    begun = [
        (
            schema,
            engine.generate("x", grammar=Grammar("json_schema", schema), max_tokens=64, seed=s),
        )
        for schema in SCHEMAS
        for s in range(1)
    ]
    ended = 0
    for schema, generation in begun:
        result = generation.result()
        if result.finish_reason == "stop":
            jsonschema.Draft202012Validator(schema).validate(json.loads(result.text))
            ended += 1
    assert ended > len(begun) // 2


def test_required_calls_of_any_schema_are_valid(engine):
    jsonschema = pytest.importorskip("jsonschema")
    schemas = [arguments(random.Random(seed)) for seed in range(8)]
    tools = [[{"type": "function", "function": {"name": "f", "parameters": s}}] for s in schemas]
    begun = [
        engine.generate(MESSAGES, tools=one, function="f", max_tokens=100, seed=1) for one in tools
    ]
    ended = 0
    for schema, generation in zip(schemas, begun, strict=True):
        result = generation.result()
        if result.finish_reason == "tool_calls":
            (call,) = result.tool_calls
            jsonschema.Draft202012Validator(schema).validate(call.data())
            ended += 1
    assert ended > len(begun) // 3
