"""Token ids -> events, whole tables of them."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from optiq.engine.events import (
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallDone,
    ToolCallFailed,
    ToolCallStarted,
    Usage,
    collect,
    joined,
)
from optiq.engine.output import OutputFormat
from optiq.engine.text import backend_of
from optiq.engine.tools.schema import Schema, bare_json
from optiq.upstream import tokenizer_of
from tests.tiny import write_tokenizer

TABLE = json.loads((Path(__file__).parent / "gemma4_calls.json").read_text(encoding="utf-8"))
WEATHER = {
    "city": {"type": "string"},
    "when": {"$ref": "#/$defs/when"},
    "zip": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "days": {"type": ["integer", "null"]},
    "metric": {"type": "boolean"},
    "limit": {"type": "number"},
    "tags": {"type": "array", "items": {"type": "string"}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": WEATHER,
                "$defs": {"when": {"type": "STRING"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def tokens(tokenizer, text):
    return backend_of(tokenizer).encode(text, add_special_tokens=False).ids


def without_ids(events):
    """Calls get new names every time."""
    return [dataclasses.replace(e, id="") if hasattr(e, "id") else e for e in events]


def read(form, ids, sizes=(1,), reason="stop", **options):
    parser = form.parser(**{"tools": TOOLS} | options)
    events, rest, size = [], list(ids), itertools.cycle(sizes)
    while rest and parser.stopped is None:
        count = next(size)
        events += parser.feed(rest[:count])
        rest = rest[count:]
    return [*events, *parser.finish(reason)]


def check_row(tokenizer, form, row):
    events = read(form, tokens(tokenizer, row["text"]))
    answer = collect(events)
    assert [[call.name, call.data()] for call in answer.tool_calls] == row["calls"]
    assert answer.text == row.get("content", "")
    assert not answer.reasoning
    is_failed = "<|tool_call>" in row.get("content", "")
    assert answer.finish.failed_calls == is_failed
    assert answer.finish.reason == ("tool_calls" if row["calls"] else "stop")
    check_story(events)


def check_story(events):
    """Calls begin, go on and end in order, and the deltas are the arguments."""
    texts, names, done = {}, {}, set()
    for event in events:
        match event:
            case ToolCallStarted(index, name_of, name):
                assert index == len(texts)
                texts[index], names[index] = "", (name_of, name)
            case ToolCallDelta(index, arguments):
                assert index == max(texts)
                assert index not in done
                texts[index] += arguments
            case ToolCallDone(index, name_of, name, arguments):
                assert (name_of, name) == names[index]
                assert arguments == texts[index]
                done.add(index)
            case ToolCallFailed(started, reason):
                assert set(started) == set(texts) - done
                assert reason
                done.update(started)
            case TextDelta(text) | ReasoningDelta(text):
                assert text
    assert done == set(texts)
    assert isinstance(events[-1], Finished)


@pytest.mark.parametrize("row", TABLE, ids=[row["row"] for row in TABLE])
def test_every_row_of_the_table(gemma, gemma_format, row):
    check_row(gemma, gemma_format, row)


@pytest.mark.assets
def test_every_row_of_the_table_with_published_tokens(gemma_real):
    form = OutputFormat.of(gemma_real)
    for row in TABLE:
        check_row(gemma_real, form, row)


ODD = [
    "<|channel>thought\nHm, 日本…\nso\n<channel|>Yes <b>",
    "<|channel>thought\n<channel|>No thought",
    "<|channel>half a thought",
    "<|channel>thought\nI call<|tool_call>call:now{}<tool_call|>",
    'a<|image|>b<|"|>c<channel|>d',
    *[row["text"] for row in TABLE],
]


@settings(max_examples=60)
@given(
    text=st.lists(st.sampled_from(ODD), min_size=1, max_size=3).map("".join),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    stop=st.sampled_from([(), ("Yes",), (" <b>", "call:"), ("\n", "Hm")]),
)
def test_events_do_not_depend_on_how_many_tokens_come(gemma, gemma_format, text, sizes, stop):
    ids = tokens(gemma, text)
    alone = read(gemma_format, ids, stop=stop)
    together = read(gemma_format, ids, sizes, stop=stop)
    assert without_ids(joined(together)) == without_ids(joined(alone))
    check_story(together)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 511), max_size=60), st.integers(1, 5))
def test_any_tokens_can_be_read(gemma_format, ids, size):
    events = read(gemma_format, ids, (size,))
    check_story(events)
    assert collect(events).finish.usage.completion_tokens == len(ids)


def test_string_arguments_come_as_they_are_written(gemma, gemma_format):
    parser = gemma_format.parser(tools=TOOLS)
    seen = []
    for token in tokens(gemma, '<|tool_call>call:weather{city:<|"|>Par"is<|"|>'):
        seen += [e.arguments for e in parser.feed([token]) if isinstance(e, ToolCallDelta)]
    assert "".join(seen) == '{"city": "Par\\"is"'
    assert "P" in "".join(seen[:4])


def test_the_same_characters_made_of_other_tokens_are_text(gemma, gemma_format):
    text = "<|tool_call>call:now{}<tool_call|><|channel>thought\n<channel|>"
    backend = backend_of(gemma)
    ids = [token for c in text for token in backend.encode(c, add_special_tokens=False).ids]
    answer = collect(read(gemma_format, ids))
    assert (answer.text, answer.tool_calls, answer.reasoning) == (text, [], "")
    assert answer.finish.failed_calls == 0


def test_without_tools_no_call_is_read(gemma, gemma_format):
    ids = tokens(gemma, "<|tool_call>call:now{}<tool_call|>")
    answer = collect(read(gemma_format, ids, tools=()))
    assert (answer.tool_calls, answer.finish.reason) == ([], "stop")


def test_thinking_is_told_from_the_answer(gemma, gemma_format):
    ids = tokens(gemma, "<|channel>thought\nTwo\nlines\n<channel|>\n\nThe answer\n")
    events = joined(read(gemma_format, ids))
    assert events[:2] == [ReasoningDelta("Two\nlines"), TextDelta("The answer\n")]
    thought = tokens(gemma, "<|channel>thought\nTwo\nlines\n<channel|>")
    assert events[2].usage == Usage(completion_tokens=len(ids), reasoning_tokens=len(thought))


def test_a_thinking_that_the_prompt_opened(gemma, gemma_format):
    opened = tokens(gemma, "<|turn>model\n<|channel>thought\n")
    ids = tokens(gemma, "Hm<channel|>Yes")
    answer = collect(read(gemma_format, ids, prompt=opened))
    assert (answer.reasoning, answer.text) == ("Hm", "Yes")
    assert gemma_format.parser(prompt=opened).in_reasoning
    closed = tokens(gemma, "<|turn>model\n<|channel>thought\n<channel|>")
    answer = collect(read(gemma_format, tokens(gemma, "Hm"), prompt=closed))
    assert (answer.reasoning, answer.text) == ("", "Hm")


@pytest.mark.parametrize(
    ("text", "stop", "want", "found"),
    [
        ("one two three", ("two",), "one ", "two"),
        ("one two three", ("three", "o t"), "one tw", "o t"),
        ("one two three", ("wo", "two"), "one ", "two"),
        ("one tw", ("two",), "one tw", None),
        ("aab", ("ab",), "a", "ab"),
        ("one", ("one",), "", "one"),
        ("déjà vu", ("à v",), "déj", "à v"),
    ],
)
def test_stop_strings_cross_tokens(gemma, gemma_format, text, stop, want, found):
    events = read(
        gemma_format, tokens(gemma, text) * (2 if found else 1), stop=stop, reason="length"
    )
    answer = collect(events)
    assert (answer.text, answer.finish.stop) == (want, found)
    assert answer.finish.reason == ("stop" if found else "length")


def test_text_that_may_begin_a_stop_string_waits(gemma, gemma_format):
    parser = gemma_format.parser(stop=("xyz",))
    shown = [collect(parser.feed([t])).text for c in "axyaxyz" for t in tokens(gemma, c)]
    assert shown == ["a", "", "", "xya", "", "", ""]
    assert (parser.stopped, parser.num_tokens) == ("xyz", 7)
    assert parser.feed(tokens(gemma, "more")) == []
    assert parser.num_tokens == 7


def test_stop_strings_do_not_match_in_thinking_or_across_its_end(gemma, gemma_format):
    ids = tokens(gemma, "<|channel>thought\nSTOP it ST<channel|>OP and STOP now")
    answer = collect(read(gemma_format, ids, stop=("STOP",)))
    assert (answer.reasoning, answer.text) == ("STOP it ST", "OP and ")
    assert answer.finish.stop == "STOP"


def test_the_engines_counts_are_kept(gemma_format):
    parser = gemma_format.parser()
    usage = Usage(prompt_tokens=3, completion_tokens=9, drafted_tokens=2, accepted_tokens=1)
    assert parser.finish("cancelled", usage) == [Finished("cancelled", usage)]


CALLING = "{% for m in messages %}<tool_call>{{ m.tool_call.name }}</tool_call>{% endfor %}"


@pytest.fixture(scope="module")
def other_family(tmp_path_factory):
    """A byte tokenizer whose template writes calls as JSON and whose thinking has `<think>`."""
    folder = tmp_path_factory.mktemp("other")
    write_tokenizer(folder, CALLING)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    marks = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    backend.add_tokens([AddedToken(mark, normalized=False) for mark in marks])
    backend.save(str(folder / "tokenizer.json"))
    return tokenizer_of(folder, {})


def test_other_families_through_the_parsers_of_mlx_lm(other_family):
    form = OutputFormat.of(other_family)
    call = '{"name": "weather", "arguments": {"city": "Köln", "days": 2}}'
    text = f"<think>\nLook.\n</think>\n\nYes\n<tool_call>\n{call}\n</tool_call>\n"
    text += f'<tool_call>[{call}, {{"name": "now", "arguments": "{{}}"}}]</tool_call>'
    events = read(form, tokens(other_family, text))
    check_story(events)
    answer = collect(events)
    assert (answer.reasoning, answer.text) == ("Look.", "Yes\n")
    weather = ("weather", {"city": "Köln", "days": 2})
    assert [(one.name, one.data()) for one in answer.tool_calls] == [weather, weather, ("now", {})]
    assert answer.finish.reason == "tool_calls"


@pytest.mark.parametrize(
    "block",
    ["", "{", "[]", "3", '{"name": 3, "arguments": {}}', '{"name": "f", "arguments": [1]}'],
)
def test_blocks_that_the_parsers_refuse_are_text(other_family, block):
    text = f"a<tool_call>{block}</tool_call>b<tool_call>{block}"
    answer = collect(read(OutputFormat.of(other_family), tokens(other_family, text)))
    assert (answer.text, answer.tool_calls) == (text, [])
    assert answer.finish.failed_calls == 2


def test_a_model_without_marks(tiny_tokenizer):
    form = OutputFormat.of(tiny_tokenizer)
    assert (form.reasoning, form.calls) == (None, None)
    ids = tokens(tiny_tokenizer, "<think>a<|im_end|>b")
    assert collect(read(form, ids)).text == "<think>ab"


@pytest.mark.parametrize(
    ("text", "schema", "want"),
    [
        ("1", {"enum": ["1", "2"]}, '"1"'),
        ("1", {"enum": [1, 2]}, "1"),
        ("a", {"const": "a"}, '"a"'),
        ("true", {"type": "string"}, '"true"'),
        ("None", {"type": ["integer", "null"]}, "null"),
        ("None", {"type": "integer", "nullable": True}, "null"),
        ("7", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, "7"),
        ("7.5", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, '"7.5"'),
        ("9" * 301, {}, '"' + "9" * 301 + '"'),
        ("01", {}, '"01"'),
        ("NaN", {"type": "number"}, '"NaN"'),
        ("x", {"$ref": "#"}, '"x"'),
        ("x", {"$ref": "#/loop"}, '"x"'),
        ("5", {"$ref": "#/$defs/none"}, "5"),
    ],
)
def test_bare_values_by_their_schema(text, schema, want):
    root = {"loop": {"$ref": "#/loop"}}
    assert bare_json(text, Schema(schema, root).types()) == want


def test_schemas_of_nested_values(gemma, gemma_format):
    inner = {"type": "object", "additionalProperties": {"type": "string"}}
    places = {"type": "array", "items": {"type": "object", "properties": {"zip": inner}}}
    tool = {"function": {"name": "go", "parameters": {"properties": {"places": places}}}}
    ids = tokens(gemma, "<|tool_call>call:go{places:[{zip:{a:1,b:true},n:1}]}<tool_call|>")
    (call,) = collect(read(gemma_format, ids, tools=[tool])).tool_calls
    assert call.data() == {"places": [{"zip": {"a": "1", "b": "true"}, "n": 1}]}


def test_calls_too_deep_are_text(gemma, gemma_format):
    for depth, calls in ((60, 1), (70, 0)):
        text = f"<|tool_call>call:now{{a:{'[' * depth}{']' * depth}}}<tool_call|>"
        assert len(collect(read(gemma_format, tokens(gemma, text))).tool_calls) == calls
