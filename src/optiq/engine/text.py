"""Token ids -> text, piece by piece, and strings that end it.

Bytes are put together into characters before anything is shown, so no half character ever is.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

from optiq.errors import UnsupportedModel
from optiq.upstream import TokenizerWrapper

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNDERSCORE = "\u2581"  # SentencePiece's space
_KEPT_WORDS = 1000


def backend_of(tokenizer: TokenizerWrapper) -> Tokenizer:
    """The tokenizer of the tokenizers library behind mlx-lm's and transformers' wrappers.

    Raises:
        UnsupportedModel: if there is none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UnsupportedModel(
            "the model's tokenizer is no tokenizer.json; convert it with transformers first"
        )
    return backend


def keep_few_words(tokenizer: TokenizerWrapper) -> None:
    """Bound what the tokenizers library remembers of the texts it reads: the ids of 1,000 words.

    It would keep 10,000, and where a vocabulary does not divide texts at spaces a word is all of a
    short text: every message of a chat was kept, up to about 50 MB. Texts of many words are read up
    to a tenth slower.
    """
    resize = getattr(backend_of(tokenizer).model, "_resize_cache", None)
    if resize is not None:  # models that look words up keep nothing
        resize(_KEPT_WORDS)


def ids_of(tokenizer: TokenizerWrapper, *tokens: str) -> tuple[int, ...] | None:
    """Ids of entries of the vocabulary; None if one is missing."""
    backend = backend_of(tokenizer)
    found = [token_id for token in tokens if (token_id := backend.token_to_id(token)) is not None]
    return tuple(found) if len(found) == len(tokens) else None


class Pieces:
    """What each token is as text.

    Byte-level and SentencePiece vocabularies, which nearly all models have, are read as bytes.
    Of others the library decodes a window of tokens.

    Attributes:
        special: ids that are no text.
        strips_start: whether the first space of a text is dropped, as its decoder does.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._backend = backend_of(tokenizer)
        self._added = {
            token: added.content
            for token, added in self._backend.get_added_tokens_decoder().items()
        }
        special = self._backend.get_added_tokens_decoder().items()
        self.special = frozenset(token for token, added in special if added.special)
        self._known: dict[int, bytes] = {}
        decoders = _decoders(self._backend)
        self._to_bytes = _byte_rule(decoders)
        self.strips_start = any(
            (step["type"] == "Strip" and step["start"] > 0)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in decoders
        )

    @property
    def are_bytes(self) -> bool:
        """Whether every token is a fixed sequence of bytes."""
        return self._to_bytes is not None

    def bytes_of(self, token: int) -> bytes:
        """Bytes of a token, special ones written out; none for an id without a token."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def literal(self, token: int) -> str:
        """A token by itself as text, special ones written out."""
        return self._added.get(token) or self.bytes_of(token).decode("utf-8", "replace")

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens as the library decodes them, special ones written out."""
        text: str = self._backend.decode(list(tokens), skip_special_tokens=False)
        return text

    def stream(self, *, at_start: bool = False) -> TextStream:
        """A new stream of text; `at_start` drops a first space where the decoder would."""
        if self.are_bytes:
            return _ByteStream(self, at_start=at_start)
        return _WindowStream(self, at_start=at_start)

    def _read(self, token: int) -> bytes:
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._to_bytes is None:
            return self.decode([token]).encode()
        return self._to_bytes(piece)


class TextStream(Protocol):
    """Token ids go in one by one, whole characters come out."""

    def add(self, token: int) -> str:
        """What can be shown now that the token has come."""
        ...

    def finish(self) -> str:
        """The rest; bytes that are no character become U+FFFD."""
        ...


class _ByteStream:
    """A stream of a vocabulary of bytes."""

    def __init__(self, pieces: Pieces, *, at_start: bool) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = at_start and pieces.strips_start

    def add(self, token: int) -> str:
        return self._begun(self._decoder.decode(self._pieces.bytes_of(token)))

    def finish(self) -> str:
        return self._begun(self._decoder.decode(b"", final=True))

    def _begun(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _WindowStream:
    """A stream of any other vocabulary.

    Tokens are decoded behind those that were shown last, so that a decoder that looks at its
    neighbours (spaces of WordPiece) is asked the right thing. Cost: a few tokens a step.
    """

    def __init__(self, pieces: Pieces, *, at_start: bool) -> None:
        self._pieces = pieces
        self._shown: list[int] = []
        self._waiting: list[int] = []
        self._at_start = at_start

    def add(self, token: int) -> str:
        self._waiting.append(token)
        return self._more(final=False)

    def finish(self) -> str:
        return self._more(final=True) if self._waiting else ""

    def _more(self, *, final: bool) -> str:
        before = self._pieces.decode(self._shown) if self._shown else ""
        text = self._pieces.decode([*self._shown, *self._waiting])[len(before) :]
        is_open = text.endswith(_REPLACEMENT) and len(self._waiting) < _LONGEST_CHARACTER
        if is_open and not final:
            return ""
        self._shown, self._waiting = self._waiting, []
        return text


class StopStrings:
    """Holds back text that may begin a string that ends the answer.

    Args:
        stops: the strings, none empty. The one that is complete first ends the answer; of two
            that are complete at the same character, the longer one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that can be shown, and the stop string that was found, which is not part of it."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            _, at, stop = min(found)
            return text[:at], stop
        keep = next((n for n in range(self._longest(text), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back: no stop string can come of it any more."""
        held, self._held = self._held, ""
        return held

    def _longest(self, text: str) -> int:
        return min(len(text), max(map(len, self._stops)) - 1)

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)


def _decoders(backend: Tokenizer) -> list[Mapping[str, Any]]:
    """Steps of the decoder, as tokenizer.json has them."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _byte_rule(decoders: Sequence[Mapping[str, Any]]) -> Callable[[str], bytes] | None:
    """Vocabulary entry -> bytes; None where the decoder does more than look at one entry."""
    kinds = {step["type"] for step in decoders}
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and kinds & {
        "ByteFallback",
        "Metaspace",
    }:
        replaced = [step for step in decoders if step["type"] == "Replace"]
        plain = all(
            step["pattern"].get("String") == _UNDERSCORE and step["content"] == " "
            for step in replaced
        )
        return _sentence_piece if plain else None
    return None


def _byte_level(piece: str) -> bytes:
    """GPT-2's alphabet of bytes; an entry outside it is itself."""
    try:
        return bytes(_ALPHABET[character] for character in piece)
    except KeyError:
        return piece.encode()


def _sentence_piece(piece: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(_UNDERSCORE, " ").encode()


def _alphabet() -> dict[str, int]:
    """The characters that stand for bytes: printable ones for themselves, others from U+0100."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(0x100 + number): byte for number, byte in enumerate(hidden)}


_ALPHABET = _alphabet()
