"""Items with exact answers through the openai and anthropic packages, against a running server.

usage: python items.py URL EVAL_FOLDER [--model NAME] [--limit N] [--client openai|anthropic|both]
           [--way whole|streamed|both]

EVAL_FOLDER holds `<skill>.jsonl` files in the form of `optiq eval --task-file`. Every item is asked
streamed and not. Scores go to stderr as they come; at the end there is one JSON object: right
answers by client, way and skill, and the drafts that usage reports. Needs both packages; optiq
itself is not imported.
"""

from __future__ import annotations

import argparse
import base64
import collections
import json
import sys
from pathlib import Path
from typing import Any

import anthropic
import openai

MAX_TOKENS = 512
BUDGET = 1024


def data_of(folder: Path, name: str) -> str:
    return base64.b64encode((folder / name).read_bytes()).decode()


class OpenAI:
    """Chat items through `/v1/chat/completions`, raw prompts through `/v1/completions`."""

    def __init__(self, url: str, model: str, folder: Path) -> None:
        self.api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self.model, self.folder = model, folder

    def ask(self, item: dict[str, Any], *, stream: bool) -> dict[str, Any]:
        if "prompt" in item:
            return self.complete(item, stream=stream)
        given = {
            "model": self.model,
            "messages": [self.turn(turn) for turn in item["messages"]],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "extra_body": {
                "chat_template_kwargs": {"enable_thinking": item.get("enable_thinking", False)}
            },
        }
        if item.get("tools"):
            given["tools"] = item["tools"]
        if not stream:
            reply = self.api.chat.completions.create(**given)
            message = reply.choices[0].message
            calls = [(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
            thought = getattr(message, "reasoning_content", None) or ""
            return answer(message.content or "", calls, thought, reply.usage)
        text, thought, usage = "", "", None
        calls: dict[int, list[str]] = {}
        chunks = self.api.chat.completions.create(
            **given, stream=True, stream_options={"include_usage": True}
        )
        for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                thought += getattr(choice.delta, "reasoning_content", None) or ""
                for call in choice.delta.tool_calls or ():
                    held = calls.setdefault(call.index, ["", ""])
                    held[0] += call.function.name or ""
                    held[1] += call.function.arguments or ""
        return answer(text, [(name, args) for name, args in calls.values()], thought, usage)

    def complete(self, item: dict[str, Any], *, stream: bool) -> dict[str, Any]:
        given = {
            "model": self.model,
            "prompt": item["prompt"],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        if not stream:
            reply = self.api.completions.create(**given)
            return answer(reply.choices[0].text, [], "", reply.usage)
        text = ""
        for chunk in self.api.completions.create(**given, stream=True):
            text += "".join(choice.text for choice in chunk.choices)
        return answer(text, [], "", None)

    def turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        turn = dict(turn)
        if isinstance(turn.get("content"), list):
            turn["content"] = [self.part(part) for part in turn["content"]]
        if isinstance(turn.get("content"), dict):
            turn["content"] = json.dumps(turn["content"])
        for call in turn.get("tool_calls") or ():
            if not isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        return turn

    def part(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        url = f"data:image/png;base64,{data_of(self.folder, part['image'])}"
        return {"type": "image_url", "image_url": {"url": url}}


class Anthropic:
    """Chat items through `/v1/messages`; raw prompts have no place there."""

    def __init__(self, url: str, model: str, folder: Path) -> None:
        self.api = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.model, self.folder = model, folder

    def ask(self, item: dict[str, Any], *, stream: bool) -> dict[str, Any] | None:
        if "prompt" in item:
            return None
        turns = item["messages"]
        system = "\n".join(turn["content"] for turn in turns if turn["role"] == "system")
        given: dict[str, Any] = {
            "model": self.model,
            "messages": [self.turn(turn) for turn in turns if turn["role"] != "system"],
            "max_tokens": MAX_TOKENS,
            "extra_body": {"temperature": 0},
        }
        if system:
            given["system"] = system
        if item.get("enable_thinking"):
            given["thinking"] = {"type": "enabled", "budget_tokens": BUDGET}
            given["max_tokens"] = BUDGET + MAX_TOKENS
        if item.get("tools"):
            given["tools"] = [
                {
                    "name": tool["function"]["name"],
                    "description": tool["function"].get("description", ""),
                    "input_schema": tool["function"]["parameters"],
                }
                for tool in item["tools"]
            ]
        if stream:
            usage: Any = None
            with self.api.messages.stream(**given) as events:
                for event in events:
                    if event.type == "message_delta":
                        usage = event.usage  # the package's sum leaves out drafts
                message = events.get_final_message()
        else:
            message = self.api.messages.create(**given)
            usage = message.usage
        text = "".join(block.text for block in message.content if block.type == "text")
        thought = "".join(b.thinking for b in message.content if b.type == "thinking")
        calls = [(b.name, json.dumps(b.input)) for b in message.content if b.type == "tool_use"]
        return answer(text, calls, thought, usage)

    def turn(self, turn: dict[str, Any]) -> dict[str, Any]:
        if turn["role"] == "tool":
            content = turn["content"]
            text = content if isinstance(content, str) else json.dumps(content)
            result = {"type": "tool_result", "tool_use_id": turn["tool_call_id"], "content": text}
            return {"role": "user", "content": [result]}
        content = turn.get("content") or []
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else []
        if isinstance(content, list):
            blocks = [self.part(part) for part in content]
        for call in turn.get("tool_calls") or ():
            given = call["function"]["arguments"]
            values = json.loads(given) if isinstance(given, str) else given
            name = call["function"]["name"]
            blocks.append({"type": "tool_use", "id": call["id"], "name": name, "input": values})
        return {"role": turn["role"], "content": blocks}

    def part(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        data = data_of(self.folder, part["image"])
        source = {"type": "base64", "media_type": "image/png", "data": data}
        return {"type": "image", "source": source}


def answer(text: str, calls: list[tuple[str, str]], thought: str, usage: Any) -> dict[str, Any]:
    draft = (getattr(usage, "draft", None) or {}) if usage is not None else {}
    draft = draft if isinstance(draft, dict) else draft.model_dump()
    return {"text": text, "calls": calls, "thought": thought, "draft": draft}


def is_right(item: dict[str, Any], found: dict[str, Any]) -> bool:
    if item.get("tool_calls"):
        wanted = [(call["name"], call["arguments"]) for call in item["tool_calls"]]
        return [(name, json.loads(args)) for name, args in found["calls"]] == wanted
    same = found["text"].strip() == item["answer"].strip() and not found["calls"]
    return same and (not item.get("thought") or found["thought"].strip() == item["thought"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="default_model")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--client", choices=["openai", "anthropic", "both"], default="both")
    parser.add_argument("--way", choices=["whole", "streamed", "both"], default="both")
    args = parser.parse_args()
    ways = ("whole", "streamed") if args.way == "both" else (args.way,)
    kinds = {"openai": OpenAI, "anthropic": Anthropic}
    names = list(kinds) if args.client == "both" else [args.client]
    scores: dict[str, dict[str, str]] = {}
    drafts: dict[str, int] = collections.Counter()
    wrong: list[str] = []
    for name in names:
        client = kinds[name](args.url, args.model, args.folder)
        for how in ways:
            stream, way = how == "streamed", f"{name}, {how}"
            scores[way] = {}
            for path in sorted(args.folder.glob("*.jsonl")):
                items = [json.loads(line) for line in path.read_text().splitlines()][: args.limit]
                right = asked = 0
                for item in items:
                    found = client.ask(item, stream=stream)
                    if found is None:
                        continue
                    asked += 1
                    good = is_right(item, found)
                    right += good
                    drafts.update(found["draft"])
                    if not good:
                        wrong.append(
                            f"{way}: {item['id']}: {found['text'][:60]!r} {found['calls']}"
                        )
                scores[way][path.stem] = f"{right} of {asked}"
                print(way, path.stem, scores[way][path.stem], file=sys.stderr, flush=True)
    print(json.dumps({"scores": scores, "draft": drafts, "wrong": wrong}, indent=1))


if __name__ == "__main__":
    main()
