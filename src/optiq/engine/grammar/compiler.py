"""Grammars -> automata over the tokens of one model, by llguidance."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from types import ModuleType
from typing import Any

from optiq import extras
from optiq.backend import mx
from optiq.engine.grammar import Grammar
from optiq.engine.grammar.lark import json_rule, quoted
from optiq.engine.grammar.limits import check
from optiq.engine.grammar.masks import Masks
from optiq.engine.grammar.patterns import terminal
from optiq.engine.text import backend_of
from optiq.errors import EngineFailure, UnsupportedModel, UsageError
from optiq.upstream import TokenizerWrapper

_CACHED = 128  # compiled grammars
# nobody asks for tokens that are forced, and looking for them costs seconds in `a{100000}`
_HEADER = '%llguidance {"no_forcing": true}\n'
_SILENT = 0
_CONTEXT = re.compile(r"\s*(\d+ \|.*|\^*)")  # a line of the grammar that a message quotes
_OUTSIDE = re.compile(r"Resource ('.*?') is not present in a registry.*")
_PLACE = re.compile(r"^(at )?\d+\(\d+\): ")


class Compiler:
    """Makes grammars of one model; the last ones are kept.

    Args:
        tokenizer: of the model.
        vocab_size: width of its logits.
        stop: tokens that end an answer.

    Raises:
        UsageError: if llguidance is not installed.
        UnsupportedModel: if it cannot read the tokenizer.

    Cost: a few seconds with a vocabulary of 262,144 tokens.
    """

    def __init__(self, tokenizer: TokenizerWrapper, vocab_size: int, stop: Collection[int]) -> None:
        self._library: ModuleType = extras.load(
            "llguidance", extra="serve", purpose="an answer that obeys a grammar"
        )
        self.masks = Masks(vocab_size, stop)
        self._tokens = self._tokenizer(tokenizer, vocab_size, stop)
        self._limits = self._library.LLParserLimits(verbose_errors=False)
        self._cache: OrderedDict[str, Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Compiled:
        """A grammar of a request.

        Raises:
            UsageError: if it is none, is too large, or needs what is not supported, which is named.

        Cost: about a millisecond, unless it is cached.
        """
        check(grammar)
        return self.lark(_lark(grammar), f"the {grammar.kind} grammar")

    def lark(self, text: str, what: str) -> Compiled:
        """A grammar in llguidance's dialect of Lark.

        Args:
            text: it.
            what: it is, a noun phrase for messages.

        Raises:
            UsageError: if it is none, or costs too much.
        """
        with self._lock:
            found = self._cache.get(text)
            if found is not None:
                self._cache.move_to_end(text)
                return found
        matcher = self._library.LLMatcher(
            self._tokens, _HEADER + text, log_level=_SILENT, limits=self._limits
        )
        if matcher.is_error():
            raise UsageError(f"{what} cannot be used: {_said(matcher.get_error())}")
        made = Compiled(matcher, self.masks, what)
        made.start().allowed()  # says so now if nothing can be written
        with self._lock:
            self._cache[text] = made
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        return made

    def _tokenizer(
        self, tokenizer: TokenizerWrapper, vocab_size: int, stop: Collection[int]
    ) -> Any:  # noqa: ANN401  a type of the library
        backend = backend_of(tokenizer)
        size = max(vocab_size, backend.get_vocab_size())
        text = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
        try:
            return self._library.LLTokenizer(
                json.dumps(text), n_vocab=size, eos_token=sorted(stop), slices=None
            )
        except ValueError as error:
            raise UnsupportedModel(
                f"grammars cannot be used with the model's tokenizer: {_said(str(error))}"
            ) from None


class Compiled:
    """A grammar that answers can be started in.

    Args:
        matcher: at its start, never moved.
        masks: of the model.
        what: it is, for messages.
    """

    def __init__(self, matcher: Any, masks: Masks, what: str) -> None:  # noqa: ANN401
        self._matcher, self._masks, self._what = matcher, masks, what

    def start(self) -> Run:
        """The beginning of an answer."""
        return Run(self._matcher.deep_copy(), self._masks, self._what)


class Run:
    """A place in a grammar.

    Args:
        matcher: of llguidance.
        masks: of the model.
        what: the grammar is, for messages.
        depth: tokens that led here.
    """

    def __init__(self, matcher: Any, masks: Masks, what: str, depth: int = 0) -> None:  # noqa: ANN401
        self._matcher, self._masks, self._what = matcher, masks, what
        self.depth = depth

    def fork(self) -> Run:
        """The same place, for another answer."""
        return Run(self._matcher.deep_copy(), self._masks, self._what, self.depth)

    def allowed(self) -> mx.array:
        """Tokens that may come next: (vocabulary,) bool; the stop tokens where it may end.

        Raises:
            UsageError: if the grammar takes more steps here than the limits allow, or nothing can
                follow.
        """
        bits = self._matcher.compute_bitmask()
        self._check()
        return self._masks.of_bits(bits)

    def accept(self, token: int) -> bool:
        """Go on by a token that is no stop token; False, and nowhere, where it may not come.

        Raises:
            UsageError: as `allowed`.
        """
        if not self._matcher.try_consume_tokens([token]):
            self._check()
            return False
        self.depth += 1
        return True

    def _check(self) -> None:
        """Refuse a grammar of which the library has had enough."""
        if not self._matcher.is_error():
            return
        said = _said(self._matcher.get_error())
        place = f"after {self.depth} tokens" if self.depth else "at its start"
        if said.startswith("NoExtension"):
            raise UsageError(f"{self._what} lets nothing be written {place}; make it possible")
        raise UsageError(f"{self._what} asks too much {place} ({said}); make it simpler")

    def back_to(self, depth: int) -> None:
        """Take back the tokens after the first `depth`."""
        count = self.depth - depth
        if count and not self._matcher.rollback(count):
            raise EngineFailure(
                f"{count} tokens could not be taken back: {_said(self._matcher.get_error())}"
            )
        self.depth = depth

    @property
    def may_end(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def must_end(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())


def _lark(grammar: Grammar) -> str:
    """A grammar of any kind, in Lark."""
    value = grammar.value
    if grammar.kind == "json_object":
        return f"start: {json_rule({'type': 'object'})}\n"
    if grammar.kind == "json_schema":
        return f"start: {json_rule(value)}\n"
    if grammar.kind == "regex":
        return f"start: TEXT\nTEXT: {terminal(str(value))}\n"
    if grammar.kind == "choice":
        assert isinstance(value, tuple)
        return f"start: {' | '.join(map(quoted, value))}\n"
    if "%llguidance" in str(value):
        raise UsageError("%llguidance is not supported in a lark grammar; remove it")
    return str(value)


def _said(message: str) -> str:
    """The first lines of a message of the library, in one."""
    lines = message.split("<non-verbose/>")[0].splitlines()
    kept = [line.strip() for line in lines if not _CONTEXT.fullmatch(line)]
    text = _PLACE.sub("", " ".join(filter(None, kept)))
    text = _OUTSIDE.sub(r"$ref or $schema refers to \1, which is not in the schema", text)
    return text if len(text) <= 300 else f"{text[:297]}..."
