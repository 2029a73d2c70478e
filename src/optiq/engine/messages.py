"""Messages -> token ids, through the checkpoint's chat template.

Text of a message never becomes a special token, whatever it says; nor does the text of tool
schemas, names or arguments. What a template has no place for is refused, not left out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from optiq.data import chat
from optiq.data.calibration import needs_bos
from optiq.engine.encoding import Guard, SafeEncoder
from optiq.engine.reasoning import reasoning_format
from optiq.engine.tools import call_format
from optiq.errors import UsageError
from optiq.upstream import TokenizerWrapper

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
_TEXT_PARTS = {"text", "input_text", "output_text"}
_IMAGE_PARTS = {"image", "image_url", "input_image"}
_KEPT = ("name", "reasoning", "reasoning_content", "tool_call_id")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model is to go on with.

    Attributes:
        ids: token ids, with one marker for each image.
        images: what the image parts hold, in order: whatever `image`, or the `url` of `image_url`,
            was; None where the part only says that an image stands there.
    """

    ids: tuple[int, ...]
    images: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How a conversation is put to the model.

    Attributes:
        tools: OpenAI function schemas that it may call.
        thinking: whether it may think first, where it knows how.
        continue_final: go on with the last message, which is the assistant's, where it ends.
    """

    tools: Sequence[Tool] = ()
    thinking: bool = False
    continue_final: bool = False


class Prompter:
    """Makes prompts for one model.

    Args:
        tokenizer: of the model, with its chat template.
        config: of the model: its type says whether BOS is needed, `image_token_id` what stands
            for an image.
    """

    def __init__(self, tokenizer: TokenizerWrapper, config: Mapping[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._image = config.get("image_token_id")
        self._bos = tokenizer.bos_token_id if needs_bos(tokenizer, dict(config)) else None
        self._reasoning = reasoning_format(tokenizer)
        calls = call_format(tokenizer)
        around = [(form.start, form.end) for form in (self._reasoning, calls) if form]
        markers = [ids[0] for pair in around for ids in pair if len(ids) == 1]
        template = tokenizer.chat_template
        source = template if isinstance(template, str) else json.dumps(template or "")
        self._encoder = SafeEncoder(tokenizer, source, markers)

    def raw(self, text: str, num_images: int = 0) -> Prompt:
        """A prompt of raw text: BOS once where the model wants it, special tokens parsed.

        Raises:
            UsageError: if the text has not one marker for each image, or is empty.
        """
        ids = self._with_bos(self._encoder.encode(text))
        if not ids:
            raise UsageError("the prompt is empty; give some text")
        self._check_images(ids, num_images, "prompt")
        return Prompt(tuple(ids), (None,) * num_images)

    def plain(self, text: str) -> tuple[int, ...]:
        """Text in which no token is special, after BOS where the model wants it."""
        ids = self._encoder.encode_plain(self._encoder.writable(text))
        return tuple(ids if self._bos is None else [self._bos, *ids])

    def chat(self, messages: Sequence[Message], options: ChatOptions | None = None) -> Prompt:
        """A prompt of a conversation that waits for the assistant.

        Messages are OpenAI style. A developer is the system. Leading system messages are one, and
        part of the user's where the template has no system. Neighbours of one role are joined
        where the template refuses them apart. Arguments of past calls may be JSON text. So may
        results, which protocols have as text alone: where the template has a form for objects, the
        text of an object is written in it.

        Raises:
            UsageError: if a message is none, or the template has no place for one.
        """
        options = options or ChatOptions()
        if not self._tokenizer.has_chat_template:
            raise UsageError("the model has no chat template; give the prompt as raw text")
        turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
        if not turns:
            raise UsageError("there are no messages; give at least one")
        turns = _named_results(_one_system(turns))
        if self._takes_results:
            turns = [_with_object(turn) for turn in turns]
        if turns[0]["role"] == "system" and not self._writes_system:
            turns = _joined([turns[0] | {"role": "user"}, *turns[1:]])
        images = tuple(part.pop("source") for part in _image_parts(turns))
        final = self._final(turns) if options.continue_final else ""
        self._check_places(turns, options.tools)
        _check_tools(options.tools)
        guard = self._encoder.guard_for(_texts([turns, options.tools, final]))
        guarded = [self._shaped(turn, guard) for turn in turns]
        text = self._rendered(guarded, guard.value(list(options.tools)), options.thinking)
        ids = self._with_bos(guard.encode(text))
        ids = self._continued(ids, text, final, guard) if final else ids
        self._check_images(ids, len(images), "conversation, as its template writes it,")
        return Prompt(tuple(ids), images)

    def marks(
        self, messages: Sequence[Message], options: ChatOptions | None, ids: Sequence[int]
    ) -> tuple[int, ...]:
        """Lengths of a prompt from which another is likely to go on differently.

        They are where the content of the last user's turn begins, as another try of it would have
        it, and where the prompt ends as part of a longer conversation.

        Args:
            messages: as given to `chat`.
            options: likewise.
            ids: what it made of them.

        Cost: two more runs of the template.
        """
        same = dataclasses.replace(options or ChatOptions(), continue_final=False)
        last = max((i for i, m in enumerate(messages) if m.get("role") == "user"), default=-1)
        others: list[list[Message]] = []
        if last >= 0:
            text = "x" if str(messages[last].get("content")).startswith("0") else "0"
            others.append([*messages[:last], {"role": "user", "content": text}])
        if messages[-1].get("role") != "assistant":
            more = [{"role": role, "content": "0"} for role in ("assistant", "user")]
            others.append([*messages, *more])
        return tuple(_common(ids, self.chat(other, same).ids) for other in others)

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads lists of parts."""
        text = self._probe([{"role": "user", "content": [{"type": "text", "text": "Zebra"}]}])
        return "Zebra" in text and "'Zebra'" not in text

    @functools.cached_property
    def _takes_results(self) -> bool:
        """Whether the template writes results that are objects in a form of its own."""
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        text = self._probe(
            [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "", "tool_calls": [call | {"id": "call00000"}]},
                {"role": "tool", "tool_call_id": "call00000", "content": {"quagga": "okapi"}},
            ]
        )
        return "quagga" in text and "okapi" in text and "'quagga'" not in text

    @functools.cached_property
    def _writes_tools(self) -> bool:
        return chat.writes_tools(self._tokenizer)

    @functools.cached_property
    def _offers_tools(self) -> bool:
        return chat.offers_tools(self._tokenizer)

    @functools.cached_property
    def _writes_system(self) -> bool:
        return chat.writes_system(self._tokenizer)

    def _probe(self, messages: list[dict[str, Any]]) -> str:
        try:
            return chat.question(self._tokenizer, messages)
        except UsageError:
            return ""

    def _check_places(self, turns: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> None:
        """Refuse what the template would leave out."""
        has_calls = any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns)
        if (has_calls and not self._writes_tools) or (tools and not self._offers_tools):
            raise UsageError(
                "the chat template of the model has no place for tools; leave out the tools and "
                "the messages about them, or use another model"
            )

    def _shaped(self, turn: dict[str, Any], guard: Guard) -> dict[str, Any]:
        """A turn with guards, its content in a form that the template reads."""
        turn = dict(turn)
        content = turn["content"]
        if isinstance(content, list) and not self._takes_parts:
            turn["content"] = _as_text(content)
            if turn["content"] is content:
                raise UsageError(
                    "the chat template of the model has no place for images; use another model"
                )
        elif isinstance(content, dict) and not self._takes_results:
            turn["content"] = json.dumps(content, ensure_ascii=False)
        return {name: one if name == "role" else guard.value(one) for name, one in turn.items()}

    def _rendered(self, turns: list[dict[str, Any]], tools: Any, thinking: bool) -> str:  # noqa: ANN401
        try:
            return chat.question(self._tokenizer, turns, tools, thinking=thinking)
        except UsageError:
            joined = _joined(turns)
            if len(joined) == len(turns):
                raise
        return chat.question(self._tokenizer, joined, tools, thinking=thinking)

    def _final(self, turns: list[dict[str, Any]]) -> str:
        """Text of the last message, which is taken off."""
        last = turns.pop()
        content = last["content"]
        if last["role"] != "assistant" or last.get("tool_calls") or not turns:
            raise UsageError("only a text of the assistant that answers a message can be continued")
        if isinstance(content, list):
            if any(part["type"] == "image" for part in content):
                raise UsageError("a message with an image cannot be continued")
            content = "".join(part["text"] for part in content)
        return str(content)

    def _continued(self, ids: list[int], text: str, final: str, guard: Guard) -> list[int]:
        """The ids of a prompt with the beginning of its answer."""
        form = self._reasoning
        if form is None or form.open_tail(ids) is None:
            return self._with_bos(guard.encode(text + guard.text(final)))
        # an answer has begun, so that the thinking that the template opened is over
        return [*ids, *form.end, *self._encoder.encode_plain(f"\n\n{final}")]

    def _with_bos(self, ids: list[int]) -> list[int]:
        return [self._bos, *ids] if self._bos is not None and ids[:1] != [self._bos] else ids

    def _check_images(self, ids: Sequence[int], count: int, what: str) -> None:
        markers = sum(token == self._image for token in ids) if self._image is not None else 0
        if markers != count:
            raise UsageError(
                f"the {what} has {markers} image markers for {count} images; there must be one each"
            )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the beginning that are the same."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _turn(message: Message, where: str) -> dict[str, Any]:
    """A message with nothing in it but what templates know."""
    role = message.get("role")
    if role not in _ROLES:
        raise UsageError(f"{where}.role is {role!r}; there are {sorted(_ROLES)}")
    turn = {"role": _ROLES[role]} | {
        name: message[name] for name in _KEPT if message.get(name) is not None
    }
    for name in _KEPT:
        if not isinstance(turn.get(name, ""), str):
            raise UsageError(f"{where}.{name} is {turn[name]!r}; give text")
    content = message.get("content")
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            raise UsageError(f"{where}.tool_calls: only the assistant calls, in a list")
        turn["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    elif content is None:
        raise UsageError(f"{where}.content is missing; give text")
    turn["content"] = _content("" if content is None else content, turn["role"], where)
    return turn


def _content(content: Any, role: str, where: str) -> str | list[Any] | dict[str, Any]:  # noqa: ANN401
    if isinstance(content, str) or (isinstance(content, dict) and role == "tool"):
        return content
    if not isinstance(content, list):
        raise UsageError(f"{where}.content is {content!r}; give text or a list of parts")
    parts = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    has_image = any(part["type"] == "image" for part in parts)
    if has_image and role != "user":
        raise UsageError(f"{where} has an image; only a user's message can")
    if role == "tool":
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(part: Any, where: str) -> dict[str, Any]:  # noqa: ANN401  any JSON value
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in _IMAGE_PARTS:
        held = part.get("image", part.get("image_url"))
        return {"type": "image", "source": held.get("url") if isinstance(held, dict) else held}
    if kind in _TEXT_PARTS:
        raise UsageError(f"{where}.text is {part.get('text')!r}; give text")
    raise UsageError(f"{where} is of type {kind!r}; there are text and image")


def _call(call: Any, where: str) -> dict[str, Any]:  # noqa: ANN401  any JSON value
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(f"{where} is no call of a function; give its function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise UsageError(f"{where}.function.arguments is no JSON: {arguments!r}") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise UsageError(f"{where}.function.arguments is {arguments!r}; give an object")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {
        **named,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _with_object(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn; a result that is the text of a JSON object is that object."""
    text = turn["content"]
    if turn["role"] != "tool" or not isinstance(text, str):
        return turn
    try:
        found = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return turn
    return turn | {"content": found} if isinstance(found, dict) else turn


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, none of whose members another one hides."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _check_tools(tools: Sequence[Tool]) -> None:
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise UsageError(f"tools[{i}] is no function with a name; give an OpenAI function")


def _named_results(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of calls with the name of the function, which some templates ask for."""
    names: dict[str, str] = {}
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            if "id" in call:
                names[call["id"]] = call["function"]["name"]
        name = names.get(turn.get("tool_call_id", ""))
        if turn["role"] == "tool" and name is not None:
            turn.setdefault("name", name)
    return turns


def _one_system(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with those of the system at the front joined: many templates read one."""
    count = next((i for i, t in enumerate(turns) if t["role"] != "system"), len(turns))
    return [*_joined(turns[:count]), *turns[count:]]


def _joined(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours of one role joined; calls and their results stay apart."""
    out: list[dict[str, Any]] = []
    for turn in turns:
        apart = turn["role"] == "tool" or "tool_calls" in turn or not out
        if apart or out[-1]["role"] != turn["role"] or "tool_calls" in out[-1]:
            out.append(dict(turn))
        else:
            out[-1]["content"] = _sum(out[-1]["content"], turn["content"])
    return out


def _sum(first: Any, second: Any) -> str | list[Any]:  # noqa: ANN401  contents of turns
    contents = [_as_text(first), _as_text(second)]
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(contents)
    parts = [[{"type": "text", "text": c}] if isinstance(c, str) else c for c in contents]
    return [*parts[0], *parts[1]]


def _as_text(content: Any) -> Any:  # noqa: ANN401  content of a turn
    """Parts as one text, if all of them are text."""
    if isinstance(content, list) and all(part["type"] == "text" for part in content):
        return "\n".join(part["text"] for part in content)
    return content


def _image_parts(turns: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for turn in turns:
        if isinstance(turn["content"], list):
            yield from (part for part in turn["content"] if part["type"] == "image")


def _texts(value: Any) -> Iterator[str]:  # noqa: ANN401  any JSON value
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (str(key) for key in value)
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
