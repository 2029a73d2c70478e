"""Calibration and held-out text: records, and the token windows made of them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from optiq.data.chat import Message, Tool, render
from optiq.errors import UsageError
from optiq.upstream import TokenizerWrapper

DOMAINS = ("prose", "reasoning", "code", "agent", "toolcall", "constraint")
_ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Record:
    """One text or conversation.

    Attributes:
        id: name of the record, unique in its file.
        domain: kind of text; figures are given by domain.
        language: ISO 639-1 code of the natural language, or None where it is not known.
        text: the text, or None for a conversation.
        messages: turns of a conversation.
        tools: function schemas that the conversation may call.
    """

    id: str
    domain: str
    language: str | None = None
    text: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()


@dataclasses.dataclass(frozen=True)
class Windows:
    """Token windows of equal length.

    Attributes:
        tokens: (N, T) int32.
        domains: domain of each window, N of them; windows of a domain are neighbours.
        records: (N, T) int32, number of the record that each token is of.
        digest: sha256 over the tokens, hex.
    """

    tokens: npt.NDArray[np.int32]
    domains: tuple[str, ...]
    records: npt.NDArray[np.int32]
    digest: str


def builtin_records(split: Literal["calibration", "heldout"]) -> tuple[Record, ...]:
    """The records of the package, of one split, in order of `DOMAINS`."""
    folder = resources.files("optiq") / "data" / "corpus"
    records = []
    for domain in DOMAINS:
        text = (folder / f"{domain}.jsonl").read_text(encoding="utf-8")
        for number, row in _rows(text, f"{domain}.jsonl"):
            if row["split"] == split:
                records.append(_record(row, domain, f"{domain}.jsonl, line {number}"))
    return tuple(records)


def read_records(path: Path) -> tuple[Record, ...]:
    """Records of a JSON lines file.

    Each line is an object with `text` (a string) or `messages` (OpenAI-style turns) and, if it
    likes, `tools`, `domain` (default `text` or `chat`) and `language`.

    Raises:
        UsageError: if the file cannot be read or is empty, or a line is not of that form; names the
            line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give a file of JSON lines") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}") from None
    records = []
    for number, row in _rows(text, str(path)):
        where = f"{path}, line {number}"
        domain = row.get("domain", "text" if "text" in row else "chat")
        if not isinstance(domain, str) or not domain:
            raise UsageError(f"{where}: 'domain' must be a word, not {domain!r}")
        records.append(_record({"id": str(number)} | row, domain, where))
    if not records:
        raise UsageError(
            f'{path} holds no records; give lines such as {{"text": ...}} or {{"messages": [...]}}'
        )
    return tuple(records)


def _rows(text: str, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # not splitlines: U+2028 and its like may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # refuses halves of surrogate pairs
        except ValueError as error:
            raise UsageError(f"{where}, line {number} is not JSON text: {error}") from None
        if not isinstance(row, dict):
            raise UsageError(f"{where}, line {number} is not a JSON object")
        yield number, row


def _record(row: dict[str, Any], domain: str, where: str) -> Record:
    language = row.get("language")
    if language is not None and (not isinstance(language, str) or not language):
        raise UsageError(f"{where}: 'language' must be a word such as 'en', not {language!r}")
    if ("text" in row) == ("messages" in row):
        both = "both 'text' and" if "text" in row else "neither 'text' nor"
        raise UsageError(f"{where} has {both} 'messages'; give one of them")
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise UsageError(f"{where}: 'text' must be a string that is not empty")
        return Record(str(row["id"]), domain, language, text=row["text"])
    messages, tools = row["messages"], row.get("tools") or []
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: 'messages' must be a list of turns that is not empty")
    if not isinstance(tools, list) or not all(_is_tool(tool) for tool in tools):
        raise UsageError(
            f"{where}: 'tools' must be a list of function schemas such as "
            '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        )
    turns = tuple(_message(message, where) for message in messages)
    return Record(str(row["id"]), domain, language, messages=turns, tools=tuple(tools))


def _is_tool(tool: object) -> bool:
    if not isinstance(tool, dict):
        return False
    function = tool.get("function")
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise UsageError(f"{where}: every message must be an object with a role of {list(_ROLES)}")
    turn = dict(message)
    turn["content"] = _content(message.get("content"), where)
    calls = turn.pop("tool_calls", None)
    if calls is not None:
        if not isinstance(calls, list):
            raise UsageError(f"{where}: 'tool_calls' must be a list")
        if calls:
            turn["tool_calls"] = [_tool_call(call, where) for call in calls]
    return turn


def _content(content: object, where: str) -> str:
    """The text of a message; lists of text parts are joined, None is empty."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [
        part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        for part in (content if isinstance(content, list) else [None])
    ]
    if any(not isinstance(text, str) for text in texts):
        raise UsageError(f"{where}: 'content' must be text; optiq calibrates on text alone")
    return "".join(str(text) for text in texts)


def _tool_call(call: object, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not _is_tool(call) or not isinstance(function, dict):
        raise UsageError(f"{where}: a tool call must have a 'function' with a 'name'")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise UsageError(
                f"{where}: the arguments of a tool call are no JSON: {error}"
            ) from None
    if not isinstance(arguments, dict):
        raise UsageError(f"{where}: the arguments of a tool call must be an object")
    return {**call, "function": {**function, "arguments": arguments}}


def needs_bos(tokenizer: TokenizerWrapper, config: dict[str, Any]) -> bool:
    """Whether every sequence must begin with BOS.

    So it is where the tokenizer puts it in front of raw text, and in Gemma models, which are lost
    without it even where their tokenizer does not.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    if str(config.get("model_type", "")).startswith("gemma"):
        return True
    return bool(tokenizer.encode("a")[:1] == [bos])


def windows(
    records: Sequence[Record],
    tokenizer: TokenizerWrapper,
    config: dict[str, Any],
    *,
    window: int,
    count: int | None,
    seed: int,
) -> Windows:
    """Windows of `window` tokens, each of one domain.

    The records of a domain are shuffled, strung together and cut into full windows; what is left at
    the end is not used. Where the model needs BOS, every window begins with it.

    Args:
        records: texts and conversations.
        tokenizer: the model's.
        config: the model's config.json.
        window: tokens of a window, BOS included.
        count: windows wanted, spread evenly over the domains; None, or more than there are: all.
        seed: of the shuffle.

    Raises:
        UsageError: if the text is too short for a window, or the chat template refuses a record.
    """
    bos = tokenizer.bos_token_id if needs_bos(tokenizer, config) else None
    by_domain: dict[str, list[tuple[int, Record]]] = {}
    for number, record in enumerate(records):
        by_domain.setdefault(record.domain, []).append((number, record))
    body = window if bos is None else window - 1
    pieces: list[npt.NDArray[np.int32]] = []
    total = 0
    for domain, members in by_domain.items():
        stream = _stream(domain, members, tokenizer, bos, seed)
        total += stream.shape[1]
        num_windows = stream.shape[1] // body
        piece = stream[:, : num_windows * body].reshape(2, num_windows, body)
        if bos is not None:  # it counts as of the record that it stands before
            heads = np.stack([np.full(num_windows, bos, np.int32), piece[1, :, 0]])
            piece = np.concatenate([heads[:, :, None], piece], axis=2)
        pieces.append(piece.swapaxes(0, 1))
    shares = _even_shares([len(piece) for piece in pieces], count)
    if sum(shares) == 0:
        raise UsageError(
            f"the calibration or held-out text has {total} tokens in {len(by_domain)} domains; a "
            f"window takes at least {body} of one domain: give more text or a shorter window"
        )
    chosen = [piece[:share] for piece, share in zip(pieces, shares, strict=True)]
    tokens, owners = np.ascontiguousarray(np.concatenate(chosen).swapaxes(0, 1), dtype=np.int32)
    named = zip(by_domain, shares, strict=True)
    domains = itertools.chain.from_iterable([domain] * share for domain, share in named)
    digest = hashlib.sha256(repr(tokens.shape).encode() + tokens.astype("<i4").tobytes())
    return Windows(tokens, tuple(domains), owners, digest.hexdigest())


def _stream(
    domain: str,
    members: Sequence[tuple[int, Record]],
    tokenizer: TokenizerWrapper,
    bos: int | None,
    seed: int,
) -> npt.NDArray[np.int32]:
    """Shuffled records of a domain, one after the other, without the BOS at their heads.

    Returns:
        (2, T): tokens, and the number of the record that each is of.
    """
    key = hashlib.sha256(f"{seed}\0{domain}".encode()).digest()
    order = np.random.default_rng(list(key)).permutation(len(members))
    parts = [np.zeros((2, 0), np.int32)]
    for index in order:
        number, record = members[index]
        if record.text is None:
            ids = render(tokenizer, record.messages, record.tools)
        else:
            ids = tokenizer.encode(record.text + "\n\n", add_special_tokens=False)
        if bos is not None and ids[:1] == [bos]:
            ids = ids[1:]
        parts.append(np.stack([np.asarray(ids, np.int32), np.full(len(ids), number, np.int32)]))
    return np.concatenate(parts, axis=1)


def _even_shares(available: Sequence[int], count: int | None) -> list[int]:
    """How many windows each domain gives: as even as what is there allows, `count` in all."""
    if count is None or count >= sum(available):
        return list(available)
    shares = [0] * len(available)
    while (left := count - sum(shares)) > 0:
        open_domains = [i for i, share in enumerate(shares) if share < available[i]]
        for i in open_domains[:left]:
            shares[i] += 1
    return shares
