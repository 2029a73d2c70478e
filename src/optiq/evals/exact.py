"""Exact-match items of the user's own, from a file of JSON lines.

An item has `id`, `answer`, and either `messages` (with `tools` and `enable_thinking` if it likes)
or `prompt`, a raw text to continue. `skill` names the part that figures are given by. Where it has
`tool_calls`, these are what the answer must call.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optiq.configs import EvalConfig
from optiq.data.benchmarks import Row, digest, read_rows
from optiq.errors import UsageError
from optiq.evals.call_syntax import as_json, read_calls
from optiq.evals.draw import evenly
from optiq.evals.task import Chat, Continuation, Item, Prompt, Response, Score, Task

_MAX_TOKENS = 512
_ROLES = ("system", "user", "assistant", "tool")
_IMAGE_PARTS = ("image", "image_url")
_OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "skill": str,
    "tools": list,
    "enable_thinking": bool,
    "stop": str,
    "tool_calls": list,
}


@dataclasses.dataclass(frozen=True)
class FileTask:
    """A task from a file.

    Attributes:
        task: asks and scores the items that are not skipped.
        skipped: reason -> how many items were left out for it.
    """

    task: Task
    skipped: Mapping[str, int]


def from_file(path: Path) -> FileTask:
    """A task of the items in a file of JSON lines.

    Its name is the file's, its version has a digest of the items. Items with images are skipped:
    the models under test are asked in text.

    Raises:
        UsageError: if the file cannot be read, holds no items, or an item is not of the form; names
            the item.
    """
    items: dict[str, Item] = {}
    skipped: Counter[str] = Counter()
    rows = list(read_rows(path))
    for number, row in enumerate(rows, start=1):
        where = f"{path}, item {number}"
        _check(row, where)
        if row["id"] in items:
            raise UsageError(f"{where}: the id '{row['id']}' is there twice; make it unique")
        if _has_image(row):
            skipped["has images"] += 1
        else:
            items[row["id"]] = Item(id=row["id"], fields=row)
    if not items:
        reasons = f" ({skipped['has images']} with images)" if skipped else ""
        raise UsageError(
            f"{path} holds no items to ask{reasons}; give lines such as "
            '{"id": "1", "messages": [{"role": "user", "content": ...}], "answer": ...}'
        )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "items"
    return FileTask(_task(f"file-{name}", path.name, digest(rows), list(items.values())), skipped)


def _task(name: str, title: str, content: str, items: Sequence[Item]) -> Task:
    return Task(
        name=name,
        title=title,
        version=f"1+{content[:8]}",
        groups=lambda item: {"skill": str(item.fields.get("skill", "all"))},
        dataset=lambda _data, config: evenly(items, config.limit),
        solver=_solver,
        scorer=_scorer,
    )


def _check(row: Row, where: str) -> None:
    for name in ("id", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise UsageError(f"{where}: '{name}' must be a text that is not empty")
    if ("messages" in row) == ("prompt" in row):
        raise UsageError(f"{where}: give one of 'messages' and 'prompt'")
    for name, kind in _OPTIONAL.items():
        if row.get(name) is not None and not isinstance(row[name], kind):
            raise UsageError(f"{where}: '{name}' is {str(row[name])[:60]!r}, of the wrong type")
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise UsageError(f"{where}: 'prompt' must be a text")
    if "messages" in row and not _are_turns(row["messages"]):
        raise UsageError(
            f"{where}: 'messages' must be a list of objects with a role of {list(_ROLES)} that "
            f"ends with a user or tool turn"
        )
    for name, call in (("tools", _is_tool), ("tool_calls", _is_call)):
        if not all(map(call, row.get(name) or [])):
            raise UsageError(
                f"{where}: '{name}' must hold objects with a 'name'; see OpenAI's form"
            )


def _are_turns(messages: object) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(turn, dict) and turn.get("role") in _ROLES for turn in messages)
        and messages[-1]["role"] in {"user", "tool"}
    )


def _is_tool(tool: object) -> bool:
    function = tool.get("function") if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _is_call(call: object) -> bool:
    return (
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and isinstance(call.get("arguments"), dict)
    )


def _has_image(row: Row) -> bool:
    contents = [turn.get("content") for turn in row.get("messages", [])]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return bool(row.get("images")) or any(
        isinstance(part, dict) and part.get("type") in _IMAGE_PARTS for part in parts
    )


def _solver(item: Item, config: EvalConfig) -> Prompt:
    fields = item.fields
    max_tokens = config.max_tokens or _MAX_TOKENS
    if "prompt" in fields:
        stop = (fields["stop"],) if fields.get("stop") else ()
        return Continuation(fields["prompt"], max_tokens, stop)
    return Chat(
        tuple(fields["messages"]),
        max_tokens,
        tools=tuple(fields.get("tools") or ()),
        thinking=fields.get("enable_thinking"),
    )


def _scorer(item: Item, response: Response, _config: EvalConfig) -> Score:
    """Whether the whole answer is the expected one, blanks around it aside."""
    wanted: list[dict[str, Any]] | None = item.fields.get("tool_calls")
    text = response.text.strip()
    if text == item.fields["answer"].strip():
        return Score(1.0, parsed=text)
    if not wanted:
        return Score(0.0, parsed=text)
    calls = read_calls(text) if response.tool_calls is None else response.tool_calls
    found = [as_json(call) for call in calls or ()]
    expected = [{"name": call["name"], "arguments": call["arguments"]} for call in wanted]
    same = json.dumps(found, sort_keys=True) == json.dumps(
        expected, sort_keys=True
    )  # 1 is not True
    return Score(float(same), parsed=found)
