"""Exact-match items of the user's own, from a file of JSON lines.

An item has `id`, `answer`, and either `messages` (with `tools` and `enable_thinking` if it likes)
or `prompt`, a raw text to continue. `skill` names the part that figures are given by. Where it has
`tool_calls`, these are what the answer must call. A part `{"type": "image", "image": FILE}` of a
message is a picture, named from the folder of the items.
"""

from __future__ import annotations

import hashlib
import json
import re
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


def from_file(path: Path) -> Task:
    """A task of the items in a file of JSON lines.

    Its name is the file's, its version has a digest of the items, pictures among them.

    Raises:
        UsageError: if the file cannot be read, holds no items, or an item is not of the form; names
            the item.
    """
    items: dict[str, Item] = {}
    pictures: dict[str, Path] = {}
    for number, row in enumerate(read_rows(path), start=1):
        where = f"{path}, item {number}"
        _check(row, where)
        if row["id"] in items:
            raise UsageError(f"{where}: the id '{row['id']}' is there twice; make it unique")
        items[row["id"]] = Item(id=row["id"], fields=_with_digests(row, where, path, pictures))
    if not items:
        raise UsageError(
            f"{path} holds no items to ask; give lines such as "
            '{"id": "1", "messages": [{"role": "user", "content": ...}], "answer": ...}'
        )
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "items"
    content = digest([dict(item.fields) for item in items.values()])
    return _task((f"file-{name}", path.name, content), list(items.values()), pictures)


def _with_digests(row: Row, where: str, path: Path, pictures: dict[str, Path]) -> Row:
    """The row with the digest of every picture in the place of its name.

    Args:
        row: of the file.
        where: names it.
        path: of the file.
        pictures: digest -> file; takes those of the row.
    """
    if row.get("images"):
        raise UsageError(f"{where}: 'images' beside the messages; put image parts into them")
    turns = []
    for turn in row.get("messages", []):
        content = turn.get("content")
        if isinstance(content, list):
            parts = [_with_digest(part, where, path.parent, pictures) for part in content]
            turn = turn | {"content": parts}
        turns.append(turn)
    return row | {"messages": turns} if turns else row


def _with_digest(part: Any, where: str, folder: Path, pictures: dict[str, Path]) -> Any:  # noqa: ANN401
    """A part with its picture by digest."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _IMAGE_PARTS:
        return part
    name = part.get("image")
    if kind != "image" or not isinstance(name, str):
        raise UsageError(
            f'{where}: a picture must be a file: {{"type": "image", "image": "FILE"}}, from the '
            "folder of the items"
        )
    try:
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{where}: the picture {name} cannot be read ({error.strerror})") from None
    pictures[found] = folder / name
    return {"type": "image", "sha256": found}


def _task(words: tuple[str, str, str], items: Sequence[Item], pictures: Mapping[str, Path]) -> Task:
    """The task of a name, a title and a digest."""
    name, title, content = words
    return Task(
        name=name,
        title=title,
        version=f"1+{content[:8]}",
        groups=lambda item: {"skill": str(item.fields.get("skill", "all"))},
        dataset=lambda _data, config: evenly(items, config.limit),
        solver=lambda item, config: _solver(item, config, pictures),
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


def _solver(item: Item, config: EvalConfig, pictures: Mapping[str, Path]) -> Prompt:
    fields = item.fields
    max_tokens = config.max_tokens or _MAX_TOKENS
    if "prompt" in fields:
        stop = (fields["stop"],) if fields.get("stop") else ()
        return Continuation(fields["prompt"], max_tokens, stop)
    contents = [turn.get("content") for turn in fields["messages"]]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return Chat(
        tuple(fields["messages"]),
        max_tokens,
        tools=tuple(fields.get("tools") or ()),
        thinking=fields.get("enable_thinking"),
        images=tuple(pictures[part["sha256"]] for part in parts if part["type"] == "image"),
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
