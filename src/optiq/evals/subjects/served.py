"""A model behind an OpenAI-compatible URL."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import mimetypes
import queue
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from optiq.artifacts import SubjectInfo
from optiq.configs import EvalConfig, ServedConfig
from optiq.errors import EngineFailure, UsageError
from optiq.evals.loops import ends_in_loop
from optiq.evals.subjects.base import Answer, Ask
from optiq.evals.subjects.http import Connection, NotFound, Refused, Retries
from optiq.evals.task import Chat, Choice, Continuation, Prompt, Response, ToolCall

_THOUGHT = re.compile(r"\A(.*?)</think>\s*", re.DOTALL)
_SEED_BITS = 31


class ServedModel:
    """A model behind a URL. One short request, sent when it is made, finds out what it takes.

    Args:
        served: URL, model name, concurrency and timeout.
        config: sampling and thinking.
        key: of the server, if it wants one.
        retries: how requests are sent again.

    Raises:
        UsageError: if the URL, the key or the model name is wrong, or the server cannot be told not
            to sample, or to think, as it is asked to.
        EngineFailure: if the server is dead or gives no usable answer.
    """

    def __init__(
        self,
        served: ServedConfig,
        config: EvalConfig,
        key: str | None,
        retries: Retries | None = None,
    ) -> None:
        assert served.served is not None
        self._options, self._concurrency = config, served.concurrency
        self._http = Connection(served.served, key, served.timeout, retries)
        self._model = self._named(served.served_model)
        self._extra: dict[str, Any] = {}
        self._chat = True
        self._thinking: Literal["off", "on", "server"] = "on" if config.thinking else "off"
        self._worked = False
        self._probe()

    def _named(self, name: str | None) -> str:
        """The model name to send: the one that was given, or the only one of the server.

        Raises:
            UsageError: if the server has several, and which is not said, or not the one given.
        """
        try:
            listed = self._http.get("models").get("data")
        except (NotFound, Refused) as error:
            if name is not None:
                return name  # some servers have no list
            raise UsageError(
                f"{self._http.url} does not list its models ({error}); give --served-model NAME"
            ) from None
        rows = listed if isinstance(listed, list) else []
        names = [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]
        if name is None and len(names) == 1:
            return names[0]
        if name is None or (names and name not in names):
            raise UsageError(
                f"{self._http.url} has {len(names)} models ({', '.join(names[:5])}); choose one "
                f"with --served-model, not '{name}'"
            )
        return name

    def _probe(self) -> None:
        """Find out whether the server takes chat, and the wish about thinking."""
        wish = {"chat_template_kwargs": {"enable_thinking": self._options.thinking}}
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
        try:
            self._http.post("chat/completions", {"model": self._model, **body, **wish})
            self._extra = wish
            return
        except Refused as refused:
            problem = str(refused)
        except NotFound:
            self._chat = False
            return
        if self._options.thinking:
            raise UsageError(
                f"{self._http.url} does not take chat_template_kwargs ({problem}), so it cannot be "
                f"told to think; leave out --thinking"
            )
        try:
            self._http.post("chat/completions", {"model": self._model, **body})
        except Refused as refused:
            if "template" not in refused.reason.lower():
                raise UsageError(f"{self._http.url} refuses to chat: {refused}") from None
            self._chat = False
        self._thinking = "server"

    @property
    def info(self) -> SubjectInfo:
        """What logs tell of it; BOS, template and stop tokens are the server's affair."""
        where = f"{self._http.url}\0{self._model}"
        return SubjectInfo(
            kind="served",
            name=f"{self._model} at {self._http.url}",
            fingerprint=hashlib.sha256(where.encode()).hexdigest(),
            thinking=self._thinking,
            sampling="greedy" if self._options.sampling == "greedy" else "server",
        )

    @property
    def has_template(self) -> bool:
        """Whether it takes chat."""
        return self._chat

    @property
    def context(self) -> None:
        """Not known."""
        return

    @property
    def wave(self) -> None:
        """Any number of questions may be asked together."""
        return

    def num_tokens(self, prompt: Prompt) -> None:
        """Not known."""
        return

    def seconds(self, asks: Sequence[Ask]) -> None:
        """Not known before the server was asked."""
        return

    def check(self, prompt: Prompt) -> None:
        """Refuse log-likelihoods that the server does not give.

        Raises:
            UsageError: in that case.
        """
        if not isinstance(prompt, Choice):
            return
        what = "mmlu over a URL needs log-likelihoods of raw text"
        if prompt.chat:
            raise UsageError(f"{what}, which its chat form has not; leave out --mmlu-form chat")
        try:
            self._option(prompt.shared + prompt.own, prompt.options[0])
        except (Refused, UsageError, LookupError, TypeError, ValueError) as error:
            raise UsageError(
                f"{what} (/v1/completions with 'echo' and 'logprobs'), which {self._http.url} does "
                f"not give ({error}); evaluate the model directory itself, or leave mmlu out with "
                f"--tasks"
            ) from None

    def answer(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Answer]]:
        """Answers with the position of their question, as they come.

        A request that the server refuses is a failure of its question alone, unless it has answered
        none so far.

        Raises:
            UsageError: if it refuses the first ones.
            EngineFailure: if it gives no usable answer.
        """
        self._worked = False
        left: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(asks)):
            left.put(index)
        ready: queue.SimpleQueue[tuple[int, Answer | BaseException]] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    index = left.get_nowait()
                except queue.Empty:
                    return
                try:
                    ready.put((index, self._one(asks[index])))
                except BaseException as error:  # noqa: BLE001  raised again by the reader
                    ready.put((index, error))

        # daemons: after an interrupt nobody waits for a slow server
        for _ in range(min(self._concurrency, len(asks))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in asks:
                index, answer = ready.get()
                if isinstance(answer, BaseException):
                    raise answer
                yield index, answer
        finally:
            stop.set()

    def _one(self, ask: Ask) -> Answer:
        prompt = ask.prompt
        try:
            if isinstance(prompt, Choice):
                text = prompt.shared + prompt.own
                values = tuple(self._option(text, option) for option in prompt.options)
                answer = Answer(Response("", logprobs=values))
            elif isinstance(prompt, Chat):
                answer = self._reply(prompt, ask.key)
            else:
                answer = self._continuation(prompt, ask.key)
        except Refused as refused:
            if not self._worked:
                raise UsageError(f"{self._http.url} refuses the request: {refused}") from None
            return Answer(None, failure=f"the server refused: {refused}")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineFailure(
                f"{self._http.url} answers in another form than OpenAI's "
                f"({type(error).__name__}: {error}); see to the server"
            ) from None
        self._worked = True
        return answer

    def _settings(self, max_tokens: int, key: int) -> dict[str, Any]:
        settings: dict[str, Any] = {"model": self._model, "max_tokens": max_tokens}
        if self._options.sampling == "greedy":
            return settings | {"temperature": 0}
        return settings | {"seed": key % 2**_SEED_BITS}

    def _reply(self, prompt: Chat, key: int) -> Answer:
        body = self._settings(prompt.max_tokens, key) | self._extra
        if prompt.thinking is not None:
            if not self._extra:
                raise UsageError(
                    f"{self._http.url} cannot be told whether to think, which an item asks for"
                )
            body["chat_template_kwargs"] = {"enable_thinking": prompt.thinking}
        images = iter(prompt.images)
        body["messages"] = [_with_pictures(message, images) for message in prompt.messages]
        if prompt.tools:
            body["tools"] = [dict(tool) for tool in prompt.tools]
        data = self._http.post("chat/completions", body)
        choice, message = data["choices"][0], data["choices"][0]["message"]
        whole = message.get("content") or ""
        thought = _THOUGHT.match(whole)
        text = whole[thought.end() :] if thought else whole
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        reasoning = reasoning or (thought[1].removeprefix("<think>") if thought else "")
        calls = None
        if prompt.tools and message.get("tool_calls") is not None:
            calls, broken = _calls(message["tool_calls"])
            text += broken
        response = Response(text, calls, None, *_ending(data, choice))
        return Answer(response, reasoning, ends_in_loop(whole or reasoning))

    def _continuation(self, prompt: Continuation, key: int) -> Answer:
        body = self._settings(prompt.max_tokens, key) | {"prompt": prompt.text}
        if prompt.stop:
            body["stop"] = list(prompt.stop)[:4]  # more are refused by OpenAI's own
        data = self._http.post("completions", body)
        choice = data["choices"][0]
        text = str(choice["text"])
        ends = [found for stop in prompt.stop if (found := text.find(stop)) >= 0]
        num_tokens, truncated = _ending(data, choice)
        text = text[: min(ends, default=len(text))]
        response = Response(text, num_tokens=num_tokens, truncated=truncated and not ends)
        return Answer(response, looped=ends_in_loop(text))

    def _option(self, text: str, option: str) -> float:
        """Log-likelihood of an option: of the echoed tokens that end after the text."""
        body = {"model": self._model, "prompt": text + option, "temperature": 0}
        body |= {"max_tokens": 1, "echo": True, "logprobs": 1}
        found = self._http.post("completions", body)["choices"][0]["logprobs"]
        starts, values = found["text_offset"], found["token_logprobs"]
        ends = [*starts[1:], math.inf]
        whole = len(text) + len(option)
        own = [
            value
            for start, end, value in zip(starts, ends, values, strict=True)
            if end > len(text) and start < whole
        ]
        if starts[0] > 0 or not own or any(value is None or value != value for value in own):
            raise ValueError("the prompt is not echoed with its log-likelihoods")
        return float(sum(own))


def _with_pictures(message: Mapping[str, Any], images: Iterator[Path]) -> dict[str, Any]:
    """A message whose image parts hold the next pictures, as data URLs."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    parts = [_picture(next(images)) if part["type"] == "image" else part for part in content]
    return dict(message) | {"content": parts}


def _picture(path: Path) -> dict[str, Any]:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def _ending(data: dict[str, Any], choice: dict[str, Any]) -> tuple[int, bool]:
    """Tokens of an answer (0 where the server does not count them), and whether it was cut."""
    usage = data.get("usage") or {}
    return int(usage.get("completion_tokens") or 0), choice.get("finish_reason") == "length"


def _calls(given: Sequence[dict[str, Any]]) -> tuple[tuple[ToolCall, ...], str]:
    """The calls of a message, and those that are none as text."""
    calls, broken = [], ""
    for call in given:
        function = call["function"]
        arguments = function.get("arguments") or "{}"
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            calls.append(ToolCall(str(function["name"]), parsed))
        else:
            broken += f"{function['name']}({arguments})"
    return tuple(calls), broken
