"""Thought, answer and calls of one answer: what may come where."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from optiq.engine.events import collect
from optiq.engine.grammar import Grammar
from optiq.engine.grammar.planner import Demand, Planner
from optiq.engine.output import OutputFormat
from optiq.engine.text import backend_of
from optiq.errors import EngineFailure, UsageError
from optiq.upstream import tokenizer_of
from tests.tiny import write_tokenizer
from tests.unit.engine.grammar.conftest import STOP, VOCAB

OPEN, CLOSE, CALL, END = 8, 9, 12, 13
EVERYTHING = frozenset(range(VOCAB))
NOTHING_TOLD = {"type": "object", "properties": {}}
YES = Grammar("choice", ("yes", "no"))


def function(name, **more):
    return {"type": "function", "function": {"name": name, "parameters": NOTHING_TOLD, **more}}


TOOLS = (function("f"), function("g"))


@pytest.fixture(scope="session")
def planner(gemma, gemma_format) -> Planner:
    return Planner(gemma, VOCAB, STOP, gemma_format)


@pytest.fixture
def start(planner):
    """A guide at the beginning of an answer."""
    return lambda prompt=(), **asked: planner.guide(Demand(**asked), prompt)


def allowed(guide):
    mask = guide.allowed()
    return EVERYTHING if mask is None else {i for i, may in enumerate(mask.tolist()) if may}


def say(guide, *tokens):
    """Go on by tokens that the masks allow."""
    for token in tokens:
        assert token in allowed(guide), token
        assert guide.accept(token)


def refuse(guide, *tokens):
    before = allowed(guide)
    for token in tokens:
        assert token not in before
        assert not guide.accept(token)
    assert allowed(guide) == before


# -- grammars and thoughts ---------------------------------------------------------------------


def test_a_request_that_asks_for_nothing_has_no_guide(start):
    assert start() is None
    assert start(tools=TOOLS) is None
    assert start(thinking=True) is None


def test_an_answer_obeys_its_grammar_and_then_ends(start, ids):
    guide = start(grammar=YES)
    refuse(guide, OPEN, CALL, *STOP)
    say(guide, *ids("yes"))
    assert allowed(guide) == STOP
    say(guide, 6)
    assert allowed(guide) == STOP


def test_the_grammar_begins_after_the_thought(start, ids):
    guide = start(grammar=YES, thinking=True)
    assert OPEN in allowed(guide)
    say(guide, OPEN)
    assert allowed(guide) == EVERYTHING - STOP  # what was asked for is still to come
    say(guide, *ids("thought\nperhaps yes"), CLOSE)
    refuse(guide, OPEN, *STOP)  # one thought is enough
    say(guide, *ids("no"))
    assert allowed(guide) == STOP


def test_the_model_need_not_think(start, ids):
    guide = start(grammar=YES, thinking=True)
    say(guide, *ids("yes"))
    assert allowed(guide) == STOP


def test_a_thought_that_the_prompt_leaves_open_is_free(start, ids):
    guide = start(prompt=(5, OPEN), grammar=YES, thinking=True)
    assert allowed(guide) == EVERYTHING - STOP
    say(guide, *ids("hm"), CLOSE, *ids("yes"))
    assert allowed(guide) == STOP


@pytest.mark.parametrize("grammar", [None, YES])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_ends_the_thought(start, ids, grammar, budget):
    guide = start(grammar=grammar, thinking=True, thinking_budget=budget)
    say(guide, OPEN, *ids("thought\n"))
    for token in ids("abcdefgh")[:budget]:
        assert len(allowed(guide)) > 1
        say(guide, token)
    assert allowed(guide) == {CLOSE}
    say(guide, CLOSE)
    refuse(guide, OPEN)
    say(guide, *ids("yes"), 6)


def test_a_thought_that_never_names_itself_is_bounded_too(start, ids):
    guide = start(thinking=True, thinking_budget=1)
    say(guide, OPEN)
    written = 0
    while allowed(guide) != {CLOSE}:
        say(guide, ids("x")[0])
        written += 1
    assert written < 12


def test_without_anything_pending_a_thought_may_end_the_answer(start):
    guide = start(thinking=True, thinking_budget=5)
    say(guide, OPEN, 6)


def test_the_budget_of_one_thought_is_that_of_all(start, ids):
    guide = start(thinking=True, thinking_budget=3)
    say(guide, OPEN, *ids("thought\n"), *ids("ab")[:2], CLOSE, *ids("x"), OPEN, *ids("t\n"))
    say(guide, ids("c")[0])
    assert allowed(guide) == {CLOSE}


def test_calls_end_a_thought_and_its_budget(start, ids):
    guide = start(thinking=True, thinking_budget=4, tools=TOOLS)
    say(guide, OPEN, *ids("thought\n"), CALL, *ids("call:f{}, and more than the budget"), END)
    assert allowed(guide) == EVERYTHING


# -- calls -------------------------------------------------------------------------------------


def test_a_call_that_is_required_comes_and_more_may_follow(start, ids):
    guide = start(tools=TOOLS, tool_choice="required")
    assert allowed(guide) == {CALL}
    say(guide, CALL, *ids("call:f{}"))
    assert allowed(guide) == {END}
    say(guide, END)
    assert allowed(guide) == STOP | {CALL}
    say(guide, CALL, *ids("call:g{}"), END, 14)


@pytest.mark.parametrize(
    "asked", [{"function": "g"}, {"tool_choice": "required", "parallel_tool_calls": False}]
)
def test_one_call_and_no_more(start, ids, asked):
    guide = start(tools=TOOLS, **asked)
    say(guide, CALL, *ids("call:g{}"), END)
    assert allowed(guide) == STOP


def test_a_function_that_is_named_is_the_one(start, ids):
    guide = start(tools=TOOLS, function="g")
    say(guide, CALL, *ids("call:"))
    refuse(guide, ids("f")[0])


def test_a_required_call_may_be_thought_about(start, ids):
    guide = start(tools=TOOLS, tool_choice="required", thinking=True, thinking_budget=2)
    assert allowed(guide) == {OPEN, CALL}
    say(guide, OPEN, *ids("thought\nab"), CLOSE)
    assert allowed(guide) == {CALL}


def test_no_call_begins_where_none_is_wanted(start, ids):
    guide = start(tools=TOOLS, tool_choice="none")
    assert allowed(guide) == EVERYTHING - {CALL}
    say(guide, *ids("call:f{}"), OPEN)
    refuse(guide, CALL)


def test_at_most_one_call_where_the_model_chooses(start, ids):
    guide = start(tools=TOOLS, parallel_tool_calls=False)
    say(guide, *ids("I call: "), CALL, *ids("call:f{}"), END)
    assert allowed(guide) == STOP


def test_strict_functions_are_enforced_once_they_are_called(start, ids):
    guide = start(tools=(function("f", strict=True), function("g")))
    assert allowed(guide) == EVERYTHING
    say(guide, *ids("text"), CALL, *ids("call:f{"))
    refuse(guide, ids("k")[0])
    say(guide, *ids("}"), END)
    assert allowed(guide) == EVERYTHING
    say(guide, CALL, *ids("call:g{k:1}"), END, *ids("text"), 6)


def test_calls_or_an_answer_under_a_grammar(start, ids):
    guide = start(tools=TOOLS, grammar=YES)
    assert CALL in allowed(guide)
    other = guide.fork()
    say(guide, CALL, *ids("call:f{}"), END)
    assert allowed(guide) == STOP | {CALL}
    say(other, *ids("yes"))
    assert allowed(other) == STOP


# -- going back --------------------------------------------------------------------------------

ASKED = [
    {"grammar": Grammar("json_object"), "thinking": True, "thinking_budget": 3, "tools": TOOLS},
    {"tools": TOOLS, "tool_choice": "required", "thinking": True},
    {"tools": TOOLS, "tool_choice": "none", "thinking": True, "thinking_budget": 2},
    {"tools": TOOLS, "parallel_tool_calls": False},
]


@given(st.sampled_from(ASKED), st.data())
@settings(max_examples=40)
def test_going_back_is_as_if_one_had_not_gone(planner, asked, data):
    guide = planner.guide(Demand(**asked), ())
    seen = [allowed(guide)]
    for _ in range(data.draw(st.integers(1, 15))):
        markers = sorted(seen[-1] & {OPEN, CLOSE, CALL, END})
        choices = markers if markers and data.draw(st.booleans()) else sorted(seen[-1])
        assert guide.accept(data.draw(st.sampled_from(choices)))
        seen.append(allowed(guide))
    back = data.draw(st.integers(0, len(seen) - 1))
    fork = guide.fork()
    guide.rollback(back)
    assert allowed(guide) == seen[-1 - back]
    assert allowed(fork) == seen[-1]


def test_no_further_back_than_the_beginning(start):
    guide = start(grammar=YES)
    with pytest.raises(EngineFailure, match="1 token"):
        guide.rollback(1)


# -- what is refused ---------------------------------------------------------------------------

CONTRADICTIONS = [
    ({"tool_choice": "sometimes"}, "sometimes"),
    ({"tool_choice": "required"}, "no tools"),
    ({"function": "f"}, "no tools"),
    ({"function": "h", "tools": TOOLS}, "'h' is not among the tools: f, g"),
    ({"function": "f", "tools": TOOLS, "tool_choice": "none"}, "tool_choice is none"),
    ({"tools": TOOLS, "tool_choice": "required", "grammar": YES}, "give one of them"),
    ({"thinking_budget": 5}, "needs thinking"),
    ({"thinking_budget": -1, "thinking": True}, "thinking_budget is -1"),
]


@pytest.mark.parametrize(("asked", "said"), CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(asked, said):
    with pytest.raises(UsageError, match=said):
        Demand(**asked)


def test_parameters_that_are_no_object_are_refused(start):
    tools = ({"function": {"name": "f", "parameters": {"type": "array"}}},)
    with pytest.raises(UsageError, match="parameters of f"):
        start(tools=tools, tool_choice="required")


# -- other families ----------------------------------------------------------------------------

MARKS = ("<tool_call>", "</tool_call>")
TEMPLATES = {
    "json": "{% for m in messages %}<tool_call>\n{{ m.tool_call.name }}</tool_call>{% endfor %}",
    "xml": "{% for m in messages %}<tool_call>\n<function={{ m }}></tool_call>{% endfor %}",
}


@pytest.fixture(params=[True, False], ids=["single tokens", "several tokens"])
def family(request, tmp_path):
    """A tokenizer of bytes with a template, whose marks are tokens, or text of several tokens."""

    def make(template):
        write_tokenizer(tmp_path, TEMPLATES[template])
        if request.param:
            file = tmp_path / "tokenizer.json"
            backend = Tokenizer.from_file(str(file))
            backend.add_tokens([AddedToken(mark, special=False) for mark in MARKS])
            backend.save(str(file))
        return tokenizer_of(tmp_path, {"eos_token_id": 258})

    return make


SAID = '\n{"name": "f", "arguments": {"n": 5, "s": "a\\n"}}\n'
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}


@pytest.mark.parametrize("asked", [{"tool_choice": "required"}, {"parallel_tool_calls": False}])
def test_calls_that_are_json_between_marks(family, asked):
    tokenizer = family("json")
    form = OutputFormat.of(tokenizer)
    tools = [{"function": {"name": "f", "parameters": SCHEMA, "strict": True}}]
    demand = Demand(tools=tools, **asked)
    guide = Planner(tokenizer, 320, {258}, form).guide(demand, ())
    backend = backend_of(tokenizer)
    block = [*form.calls.start, *backend.encode(SAID, add_special_tokens=False).ids]
    is_required = "tool_choice" in asked
    parser = form.parser(tools=tools)
    for _ in range(2 if is_required else 1):
        for at, token in enumerate((*block, *form.calls.end)):
            if at < len(form.calls.start) and is_required:
                assert at == 0 or allowed(guide) == {token}
            say(guide, token)
    ends = {258} | ({form.calls.start[0], *backend.encode("\n").ids} if is_required else set())
    assert allowed(guide) == ends
    answer = collect([*parser.feed([*block, *form.calls.end]), *parser.finish("stop")])
    assert [call.data() for call in answer.tool_calls] == [{"n": 5, "s": "a\n"}]


def test_no_call_of_several_tokens_begins_either(family):
    tokenizer = family("xml")
    form = OutputFormat.of(tokenizer)
    guide = Planner(tokenizer, 320, {258}, form).guide(Demand(tools=TOOLS, tool_choice="none"), ())
    say(guide, *form.calls.start[:-1])
    refuse(guide, form.calls.start[-1])


@pytest.mark.parametrize(
    "asked",
    [
        {"tool_choice": "required"},
        {"function": "f"},
        {"parallel_tool_calls": False},
        {"tools": (function("f", strict=True),)},
    ],
)
def test_formats_that_cannot_be_enforced_are_refused(family, asked):
    tokenizer = family("xml")
    planner = Planner(tokenizer, 320, {258}, OutputFormat.of(tokenizer))
    with pytest.raises(UsageError, match="call format of this model cannot be enforced"):
        planner.guide(Demand(**({"tools": TOOLS} | asked)), ())


def test_models_without_calls_or_thoughts(tiny_tokenizer):
    planner = Planner(tiny_tokenizer, 320, {258}, OutputFormat.of(tiny_tokenizer))
    with pytest.raises(UsageError, match="no format of calls"):
        planner.guide(Demand(tools=TOOLS, tool_choice="required"), ())
    with pytest.raises(UsageError, match="marks no thinking"):
        planner.guide(Demand(thinking=True, thinking_budget=3), ())
    assert planner.guide(Demand(tools=TOOLS, tool_choice="none"), ()) is None
