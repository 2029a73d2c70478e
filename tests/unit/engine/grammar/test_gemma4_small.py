"""The small trained Gemma-4: calls that it must write are the ones that it was taught."""

import json
import tarfile
from pathlib import Path

import pytest

import optiq

SMALL = Path(__file__).parents[3] / "assets" / "gemma4-small"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The model and its drafter."""
    out = tmp_path_factory.mktemp("small")
    with tarfile.open(SMALL / "weights.tar.xz", "r|xz") as archive:
        archive.extractall(out, filter="data")
    (model,) = out.rglob("it-qat-q4_0-unquantized")
    return optiq.load(model, model.parent / "assistant")


@pytest.fixture(scope="module")
def items():
    file = SMALL / "eval" / "tools.jsonl"
    found = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [item for item in found if item.get("tool_calls") and "messages" in item][:4]


def test_calls_that_must_come_are_those_that_come_by_themselves(small, items):
    for item in items:
        wanted = item["tool_calls"]

        def calls(item=item, **asked):
            given = {"tools": item["tools"], "temperature": 0, "max_tokens": 80}
            result = small.generate(item["messages"], **given, **asked).result()
            return [{"name": call.name, "arguments": call.data()} for call in result.tool_calls]

        assert calls() == wanted
        assert calls(tool_choice="required") == wanted
        assert calls(function=wanted[0]["name"]) == wanted[:1]
        assert calls(parallel_tool_calls=False) == wanted[:1]
        assert calls(tool_choice="none") == []
        for tool in item["tools"]:
            schema, name = tool["function"]["parameters"], tool["function"]["name"]
            for call in calls(function=name):  # none where it goes on to the last token
                assert call["name"] == name
                keys = set(call["arguments"])
                assert set(schema["required"]) <= keys <= set(schema["properties"])
