"""Reasoning and tool calls out of what families write."""

import json

import pytest
from tokenizers import AddedToken

from optiq.evals.subjects.outputs import parts
from optiq.evals.task import ToolCall
from optiq.upstream import TokenizerWrapper, tokenizer_of
from tests.tiny import write_tokenizer

TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
HERMES = "{% if tools %}<tool_call>{{ tool_call.name }}</tool_call>{% endif %}"


def tokenizer(folder, template, *marks) -> TokenizerWrapper:
    write_tokenizer(folder, template)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    for number, mark in enumerate(marks):
        token = AddedToken(mark, special=False, normalized=False)
        data["added_tokens"].append(
            {"id": 260 + number, "content": token.content, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": False}
        )  # fmt: skip
    path.write_text(json.dumps(data))
    return tokenizer_of(folder, {"eos_token_id": 258})


@pytest.fixture
def hermes(tmp_path):
    return tokenizer(tmp_path, HERMES, "<think>", "</think>")


def test_plain_text_stays_as_it_is(hermes):
    response, reasoning = parts(hermes, [1], " a\n b ", ())
    assert (response.text, response.tool_calls, reasoning) == (" a\n b ", None, "")


def test_reasoning_is_taken_out(hermes):
    response, reasoning = parts(hermes, [1], "<think>\nhm\n</think>\n\nyes\n", ())
    assert (response.text, reasoning) == ("yes", "\nhm\n")


def test_reasoning_that_the_prompt_began(hermes):
    opened = hermes.encode("x<think>\n")
    response, reasoning = parts(hermes, opened, "hm</think>yes", ())
    assert (response.text, reasoning) == ("yes", "hm")
    response, reasoning = parts(hermes, opened, "never ends </thi", ())
    assert (response.text, reasoning) == ("", "never ends </thi")
    closed = hermes.encode("x<think>\n\n</think>\n\n")
    response, reasoning = parts(hermes, closed, "yes", ())
    assert (response.text, reasoning) == ("yes", "")


def test_native_calls_are_parsed_where_functions_were_offered(hermes):
    text = (
        'First.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
        '<tool_call>{"name": "f", "arguments": "{\\"x\\": 2}"}</tool_call>'
    )
    response, _ = parts(hermes, [1], text, TOOLS)
    assert response.tool_calls == (ToolCall("f", {"x": 1}), ToolCall("f", {"x": 2}))
    assert response.text == "First."
    response, _ = parts(hermes, [1], text, ())
    assert (response.tool_calls, response.text) == (None, text)


@pytest.mark.parametrize(
    "call", ["{broken", "[1]", '{"arguments": {}}', '{"name": "f", "arguments": 3}']
)
def test_a_call_that_cannot_be_parsed_stays_text(hermes, call):
    text = f"<tool_call>{call}</tool_call>"
    response, _ = parts(hermes, [1], text, TOOLS)
    assert (response.tool_calls, response.text) == ((), text)


def test_no_call_at_all(hermes):
    response, _ = parts(hermes, [1], "I cannot.", TOOLS)
    assert (response.tool_calls, response.text) == ((), "I cannot.")


def test_a_call_that_never_ends_is_parsed_all_the_same(hermes):
    response, _ = parts(hermes, [1], '<tool_call>{"name": "f", "arguments": {}}</to', TOOLS)
    assert response.tool_calls == ()
    response, _ = parts(hermes, [1], '<tool_call>{"name": "f", "arguments": {}}', TOOLS)
    assert response.tool_calls == (ToolCall("f", {}),)


def test_a_family_without_a_parser_leaves_the_text_alone(tiny_tokenizer):
    response, _ = parts(tiny_tokenizer, [1], "[f(x=1)]", TOOLS)
    assert (response.tool_calls, response.text) == (None, "[f(x=1)]")


def test_calls_in_the_format_of_gemma_4(tmp_path):
    template = "{% if tools %}<|tool_call><tool_call|>{% endif %}"
    gemma = tokenizer(tmp_path, template, "<|tool_call>", "<tool_call|>")
    text = '<|tool_call>call:f{x:<|"|>a b<|"|>,n:2}<tool_call|>'
    response, _ = parts(gemma, [1], text, TOOLS)
    assert response.tool_calls == (ToolCall("f", {"x": "a b", "n": 2}),)
