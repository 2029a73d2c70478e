"""Prompts and answers of the small trained Gemma-4: what it was taught is what we read."""

import json
import tarfile

import pytest

from optiq.engine.events import collect
from optiq.engine.messages import ChatOptions, Prompter
from optiq.engine.output import OutputFormat
from optiq.engine.text import backend_of
from optiq.models.load import read_config
from optiq.upstream import tokenizer_of

SKILLS = ("tools", "thinking", "chat", "json", "image")
FILES = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    """Its directory without the weights."""
    out = tmp_path_factory.mktemp("small")
    with tarfile.open(shared / "assets" / "gemma4-small" / "weights.tar.xz", "r|xz") as archive:
        for member in archive:
            path = member.name.split("/")
            if path[-2:-1] == ["it-qat-q4_0-unquantized"] and path[-1] in FILES:
                (out / path[-1]).write_bytes(archive.extractfile(member).read())
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokenizer_of(folder, {})


@pytest.fixture(scope="module")
def items(shared):
    found = []
    for skill in SKILLS:
        file = shared / "assets" / "gemma4-small" / "eval" / f"{skill}.jsonl"
        found += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(found) > 250
    return [item for item in found if "messages" in item]


def test_prompts_are_those_of_the_template(folder, tokenizer, items):
    prompter = Prompter(tokenizer, read_config(folder))
    for item in items:
        tools, thinking = item.get("tools", []), item["enable_thinking"]
        prompt = prompter.chat(item["messages"], ChatOptions(tools=tools, thinking=thinking))
        want = tokenizer.apply_chat_template(
            item["messages"],
            tools=tools or None,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        assert list(prompt.ids) == want, item["id"]
        named = [p["image"] for m in item["messages"] for p in m["content"] if "image" in p]
        assert list(prompt.images) == named


def test_answers_are_read_as_they_were_meant(folder, tokenizer, items):
    form = OutputFormat.of(tokenizer)
    prompter = Prompter(tokenizer, read_config(folder))
    calls = thoughts = 0
    for item in items:
        tools, thinking = item.get("tools", []), item["enable_thinking"]
        prompt = prompter.chat(item["messages"], ChatOptions(tools=tools, thinking=thinking))
        thought = f"<|channel>thought\n{item['thought']}\n<channel|>" if "thought" in item else ""
        ids = backend_of(tokenizer).encode(thought + item["answer"], add_special_tokens=False).ids
        parser = form.parser(tools=tools, prompt=prompt.ids)
        answer = collect([*parser.feed(ids), *parser.finish("stop")])
        wanted = item.get("tool_calls", [])
        assert [{"name": c.name, "arguments": c.data()} for c in answer.tool_calls] == wanted
        assert answer.text == ("" if wanted else item["answer"]), item["id"]
        assert answer.reasoning == item.get("thought", "")
        assert answer.finish.failed_calls == 0
        calls += len(wanted)
        thoughts += bool(answer.reasoning)
    assert calls >= 40
    assert thoughts >= 40
