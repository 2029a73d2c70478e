"""Exact-match items from files."""

import hashlib
import json
import shutil

import pytest

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import UsageError
from optiq.evals.exact import from_file
from optiq.evals.log import prompt_hash
from optiq.evals.task import Chat, Continuation, Response, ToolCall
from tests.benchmarks import write

CONFIG, NO_DATA = EvalConfig(), BenchmarkData(None)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "2 + 3?"}
PICTURE = {"role": "user", "content": [{"type": "image", "image": "x.png"}]}
ITEMS = [
    {"id": "a", "skill": "sums", "messages": [USER], "answer": "5"},
    {"id": "b", "messages": [USER], "enable_thinking": True, "answer": "five"},
    {
        "id": "c",
        "skill": "tools",
        "messages": [USER],
        "tools": [TOOL],
        "answer": "<call>add{a:2,b:3}</call>",
        "tool_calls": [{"name": "add", "arguments": {"a": 2, "b": 3}}],
    },
    {"id": "d", "prompt": "Once upon", "answer": " a time", "stop": "."},
    {"id": "e", "messages": [PICTURE], "answer": "a cat"},
]


@pytest.fixture
def made(tmp_path):
    (tmp_path / "x.png").write_bytes(b"a cat")
    write(tmp_path / "my items.jsonl", ITEMS)
    return from_file(tmp_path / "my items.jsonl")


@pytest.fixture
def items(made):
    return {item.id: item for item in made.dataset(NO_DATA, CONFIG)}


def value(made, item, text, *calls):
    parsed = tuple(calls) if calls else None
    return made.score(item, Response(text, tool_calls=parsed), CONFIG).value


def test_pictures_are_asked_by_file_and_known_by_what_they_show(made, items, tmp_path):
    prompt = made.solver(items["e"], CONFIG)
    assert prompt.images == (tmp_path / "x.png",)
    shows = hashlib.sha256(b"a cat").hexdigest()
    assert prompt.messages[0]["content"] == [{"type": "image", "sha256": shows}]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.png").write_bytes(b"a cat")
    write(elsewhere / "my items.jsonl", ITEMS)
    same = from_file(elsewhere / "my items.jsonl")
    assert same.version == made.version
    (again,) = [item for item in same.dataset(NO_DATA, CONFIG) if item.id == "e"]
    assert prompt_hash(same.solver(again, CONFIG)) == prompt_hash(prompt)
    (elsewhere / "x.png").write_bytes(b"a dog")
    assert from_file(elsewhere / "my items.jsonl").version != made.version


def test_name_version_and_groups(made, items, tmp_path):
    assert made.name == "file-my-items"
    assert made.title == "my items.jsonl"
    assert [made.groups(item)["skill"] for item in items.values()] == [
        "sums",
        "all",
        "tools",
        "all",
        "all",
    ]
    write(tmp_path / "my items.jsonl", ITEMS[:2])
    other = from_file(tmp_path / "my items.jsonl")
    assert other.version != made.version


def test_prompts(made, items):
    asked = {name: made.solver(item, CONFIG) for name, item in items.items()}
    assert asked["a"] == Chat((USER,), 512)
    assert asked["b"].thinking is True
    assert asked["c"].tools == (TOOL,)
    assert asked["d"] == Continuation("Once upon", 512, (".",))


def test_the_whole_answer_must_be_the_expected_one(made, items):
    assert value(made, items["a"], " 5\n") == 1.0
    assert value(made, items["a"], "It is 5") == 0.0
    assert value(made, items["a"], "") == 0.0
    assert value(made, items["b"], "Five") == 0.0


def test_calls_count_as_data(made, items):
    assert value(made, items["c"], "", ToolCall("add", {"b": 3, "a": 2})) == 1.0
    assert value(made, items["c"], "<call>add{a:2,b:3}</call>") == 1.0
    assert value(made, items["c"], "add(a=2, b=3)") == 1.0
    assert value(made, items["c"], "", ToolCall("add", {"a": 2, "b": 4})) == 0.0
    assert value(made, items["c"], "", ToolCall("add", {"a": 2})) == 0.0
    call = ToolCall("add", {"a": 2, "b": 3})
    assert value(made, items["c"], "", call, call) == 0.0
    assert value(made, items["c"], "") == 0.0
    assert value(made, items["a"], "", call) == 0.0


def test_true_is_not_one(tmp_path):
    wanted = [{"name": "f", "arguments": {"x": 1}}]
    write(
        tmp_path / "x.jsonl", [{"id": "1", "messages": [USER], "answer": "-", "tool_calls": wanted}]
    )
    made = from_file(tmp_path / "x.jsonl")
    (item,) = made.dataset(NO_DATA, CONFIG)
    assert value(made, item, "", ToolCall("f", {"x": 1})) == 1.0
    assert value(made, item, "", ToolCall("f", {"x": True})) == 0.0


def test_a_limit(made):
    assert [i.id for i in made.dataset(NO_DATA, EvalConfig(limit=2))] == ["a", "c"]


GOOD = ITEMS[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER], "answer": "5"}, "item 1: 'id' must be a text"),
        (GOOD | {"id": 5}, "'id' must be a text"),
        (GOOD | {"answer": " "}, "'answer' must be a text that is not empty"),
        (GOOD | {"prompt": "x"}, "give one of 'messages' and 'prompt'"),
        ({"id": "a", "answer": "5"}, "give one of 'messages' and 'prompt'"),
        ({"id": "a", "answer": "5", "prompt": 3}, "'prompt' must be a text"),
        (GOOD | {"messages": []}, "'messages' must be a list"),
        (GOOD | {"messages": [{"role": "robot", "content": ""}]}, "with a role of"),
        (GOOD | {"messages": [USER, {"role": "assistant", "content": "5"}]}, "ends with a user"),
        (GOOD | {"skill": 3}, "'skill' is '3', of the wrong type"),
        (GOOD | {"enable_thinking": "yes"}, "'enable_thinking' is 'yes'"),
        (GOOD | {"tools": [{"name": "f"}]}, "'tools' must hold objects with a 'name'"),
        (GOOD | {"tool_calls": [{"name": "f"}]}, "'tool_calls' must hold objects"),
    ],
)
def test_items_of_another_form(tmp_path, row, message):
    write(tmp_path / "x.jsonl", [row])
    with pytest.raises(UsageError, match=message):
        from_file(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("", "holds no items"),
        ("[]", "line 1 is not a JSON object"),
        (json.dumps(ITEMS[4]), r"the picture x\.png cannot be read"),
        (json.dumps(ITEMS[0] | {"images": ["x.png"]}), "put image parts into them"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD), "item 2: the id 'a' is there twice"),
    ],
)
def test_files_of_another_form(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message):
        from_file(path)


@pytest.mark.assets
def test_the_skills_of_the_small_model(shared, tmp_path):
    folder = shared / "assets" / "gemma4-small" / "eval"
    shutil.copytree(folder / "images", tmp_path / "images")
    text = "".join(file.read_text() for file in sorted(folder.glob("*.jsonl")))
    (tmp_path / "all.jsonl").write_text(text)
    made = from_file(tmp_path / "all.jsonl")
    items = made.dataset(NO_DATA, CONFIG)
    assert sum(bool(getattr(made.solver(i, CONFIG), "images", ())) for i in items) == 50
    assert len({made.groups(item)["skill"] for item in items}) == 12
    for item in items:
        assert value(made, item, item.fields["answer"]) == 1.0
        if item.fields.get("tool_calls"):
            calls = [ToolCall(c["name"], c["arguments"]) for c in item.fields["tool_calls"]]
            assert value(made, item, "", *calls) == 1.0
        assert made.solver(item, CONFIG).max_tokens > 0
