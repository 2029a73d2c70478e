"""Conversations through templates of several abilities: nothing is dropped."""

from pathlib import Path

import pytest

from optiq.data.chat import offers_tools, question, render, tools_as_text
from optiq.errors import UsageError
from optiq.models.load import load_tokenizer
from tests.tiny import TEMPLATE, write_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Say what the sky does",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Łódź"}}}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rain today?"},
    {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "drizzle"},
    {"role": "assistant", "content": "A little."},
]
PIECES = ("Be brief.", "Rain today?", "Let me look.", "weather", "Łódź", "drizzle", "A little.")

NATIVE_TOOLS = (
    "{% if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}[RESULT {{ m.tool_call_id }}]{{ m.content }}"
    "{% else %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[CALL {{ c.id }}]{{ c.function.name }} {{ c.function.arguments | tojson(ensure_ascii=False) }}"
    "{% endfor %}{% endif %}{% endfor %}"
)
ONE_CALL_A_TURN = NATIVE_TOOLS.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length > 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}",
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
THINKING = "{% if enable_thinking is defined %}think={{ enable_thinking }};{% endif %}" + TEMPLATE


@pytest.fixture
def rendered(tmp_path: Path):
    """A function: template, messages and tools -> text."""

    def run(template, messages, tools=()):
        write_tokenizer(tmp_path, template)
        tokenizer = load_tokenizer(tmp_path, {})
        return tokenizer.decode(render(tokenizer, messages, tools))

    return run


def test_template_is_the_models_own(rendered):
    assert rendered(TEMPLATE, CONVERSATION[:2]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRain today?<|im_end|>\n"
    )


@pytest.mark.parametrize("template", [TEMPLATE, NATIVE_TOOLS, ONE_CALL_A_TURN, ALTERNATING, None])
def test_no_piece_is_dropped(rendered, template):
    text = rendered(template, CONVERSATION, [TOOL])
    for piece in (*PIECES, "Say what the sky does"):
        assert piece in text


def test_template_with_tools_gets_them_as_they_are_with_call_ids(rendered):
    text = rendered(NATIVE_TOOLS, CONVERSATION, [TOOL])
    assert "[TOOLS]" in text
    assert "<tool_call>" not in text
    assert "[CALL call00001]" in text
    assert "[RESULT call00001]" in text


def test_given_call_ids_stay(rendered):
    messages = [dict(m) for m in CONVERSATION]
    messages[2]["tool_calls"] = [CALL | {"id": "mine"}]
    assert "[RESULT mine]drizzle" in rendered(NATIVE_TOOLS, messages, [TOOL])


def test_template_that_refuses_two_calls_gets_text(rendered):
    messages = [dict(m) for m in CONVERSATION]
    messages[2]["tool_calls"] = [CALL, CALL]
    text = rendered(ONE_CALL_A_TURN, messages, [TOOL])
    assert text.count("<tool_call>") == 2


def test_system_turn_goes_before_the_first_user_turn(rendered):
    text = rendered(ALTERNATING, CONVERSATION[:2])
    assert text == "<user>Be brief.\n\nRain today?"


def test_plain_paragraphs_without_a_template(rendered):
    assert rendered(None, CONVERSATION[:2]) == "System: Be brief.\n\nUser: Rain today?"


def test_thinking_is_off(rendered):
    assert rendered(THINKING, CONVERSATION[:2]).startswith("think=False;")


def test_refusal_of_the_template_is_a_usage_error(rendered):
    with pytest.raises(UsageError, match=r"refuses .*'assistant', 'assistant'.*must alternate"):
        rendered(ALTERNATING, [{"role": "assistant", "content": "a"}] * 2)


def test_schemas_follow_the_system_message_in_one_turn():
    turns = tools_as_text(CONVERSATION, [TOOL])
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[0]["content"].startswith("Be brief.\n\nYou can call these functions")


def test_a_question_waits_for_the_answer_and_says_whether_to_think(tmp_path):
    template = TEMPLATE + "{{ 'think' if enable_thinking else 'quick' }}"
    write_tokenizer(tmp_path, template)
    tokenizer = load_tokenizer(tmp_path, {})
    turn = {"role": "user", "content": "Hi"}
    wanted = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert question(tokenizer, [turn]) == wanted + "quick"
    assert question(tokenizer, [turn], thinking=True) == wanted + "think"


def test_a_question_keeps_a_system_turn_the_template_does_not_know(tmp_path):
    write_tokenizer(
        tmp_path,
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role + ':' + m.content + ';' }}{% endfor %}",
    )
    tokenizer = load_tokenizer(tmp_path, {})
    turns = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    assert question(tokenizer, turns) == "user:Be brief\n\nHi;"
    with pytest.raises(UsageError, match="refuses a conversation"):
        question(tokenizer, [{"role": "user", "content": "Hi"}, turns[0]])


@pytest.mark.parametrize(
    ("template", "offers"),
    [
        (TEMPLATE, False),
        ("{% if tools %}{{ tools | tojson }}{% endif %}", True),
        ("{% if tools %}{{ tools[0].function.name }}{% endif %}", False),
        ("{{ raise_exception('never') }}", False),
    ],
)
def test_whether_a_template_offers_functions(tmp_path, template, offers):
    write_tokenizer(tmp_path, template)
    assert offers_tools(load_tokenizer(tmp_path, {})) is offers
