"""Text with guarded parts -> token ids in which the guarded parts are ordinary tokens.

A guard is one character that nobody wrote. It is put into every place of a guarded text where a
special token would begin, and where one could come about at its ends. A template may trim, split
and escape what it is given as before; what it writes itself stays special; and when the text is cut
into tokens the guards go away. A character that the vocabulary cannot write, which tokenizers make
a special token of, is U+FFFD.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from optiq.engine.text import backend_of
from optiq.errors import UsageError
from optiq.upstream import TokenizerWrapper

_REPLACEMENT = "\ufffd"
_PRIVATE_USE = ((0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))


class SafeEncoder:
    """Encodes text for one model.

    Guarded are its special tokens, and other added tokens that the chat template or the
    `markers` name: to the model they mean as much. The rest of the added tokens is ordinary text.

    Args:
        tokenizer: of the model.
        template: source of its chat template.
        markers: ids of further tokens to guard.
    """

    def __init__(
        self, tokenizer: TokenizerWrapper, template: str = "", markers: Iterable[int] = ()
    ) -> None:
        self._backend = backend_of(tokenizer)
        self._template = template
        wanted = set(markers)
        added = self._backend.get_added_tokens_decoder()
        self.guarded = {
            token: one.content
            for token, one in added.items()
            if one.special or token in wanted or (len(one.content) > 1 and one.content in template)
        }
        contents = sorted(self.guarded.values(), key=len, reverse=True)
        self._starts = re.compile(
            f"(?={'|'.join(map(re.escape, contents))})" if contents else r"\Z."
        )
        self._heads = _proper(contents, from_start=True)
        self._tails = _proper(contents, from_start=False)
        self._normalizes = self._backend.normalizer is not None and any(
            added[token].normalized for token in self.guarded
        )
        free = [one for token, one in added.items() if token not in self.guarded]
        self._plain = _without_guarded(self._backend, free)
        self._writes_all = _has_all_bytes(self._backend)

    def writable(self, text: str) -> str:
        """The text with U+FFFD, or nothing, for characters that the vocabulary cannot write."""
        if self._writes_all:
            return text
        for instead in (_REPLACEMENT, ""):
            encoded = self._plain.encode(text, add_special_tokens=False)
            unknown = {
                character
                for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True)
                if token in self.guarded
                for character in text[start:end]
            }
            text = text.translate({ord(character): instead for character in unknown})
        return text

    def guard_for(self, texts: Iterable[str]) -> Guard:
        """A guard that is in none of the texts, nor in the template.

        Raises:
            UsageError: if the texts use up all characters that mean nothing.
        """
        used = set(self._template).union(*map(set, texts))
        codes = chain.from_iterable(range(first, end) for first, end in _PRIVATE_USE)
        free = next((chr(code) for code in codes if chr(code) not in used), None)
        if free is None:
            raise UsageError("the messages use every private-use character; leave one out")
        return Guard(self, free)

    def encode(self, text: str) -> list[int]:
        """Token ids of text in which special tokens are special; none is added."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text in which nothing is special."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def breaks(self, text: str) -> set[int]:
        """Where guards go into a text: character positions that they stand before."""
        places = {match.start() + 1 for match in self._starts.finditer(text)}
        left, right = text.lstrip(), text.rstrip()  # templates trim
        if left.startswith(self._tails):
            places.add(len(text) - len(left))
        if right.endswith(self._heads):
            places.add(len(right))
        return places

    def breaks_when_normalized(self, text: str) -> set[int]:
        """The same for tokens that come about when the text is normalized."""
        if not self._normalizes:
            return set()
        encoded = self._backend.encode(text, add_special_tokens=False)
        found = zip(encoded.ids, encoded.offsets, strict=True)
        return {a + 1 for token, (a, b) in found if self._is_written(token, text[a:b])}

    def encode_guarded(self, text: str, guard: str) -> list[int]:
        """Token ids of text with guards, which go away."""
        encoded = self._backend.encode(text, add_special_tokens=False)
        if guard not in text:
            return list(encoded.ids)
        out: list[int] = []
        run: list[int] = []  # ids since the last guarded token
        at = 0
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            if not self._is_written(token, text[start:end]):
                run.append(token)
                continue
            out += [*self._run(run, text[at:start], guard), token]
            run, at = [], end
        return out + self._run(run, text[at:], guard)

    def _run(self, ids: list[int], text: str, guard: str) -> list[int]:
        """Ids of text between two special tokens, anew if guards were in it."""
        return self.encode_plain(text.replace(guard, "")) if guard in text else ids

    def _is_written(self, token: int, text: str) -> bool:
        """Whether a token is a guarded one that stands in the text, not one for the unknown."""
        content = self.guarded.get(token)
        if content is None or content in text:
            return content is not None
        return self._normalizes and content in self._backend.normalizer.normalize_str(text)


class Guard:
    """Puts guards of one character into texts and encodes what a template makes of them.

    Args:
        encoder: of the model.
        character: the guard.
    """

    def __init__(self, encoder: SafeEncoder, character: str) -> None:
        self._encoder = encoder
        self._character = character

    def text(self, text: str) -> str:
        """The text with guards."""
        text = self._encoder.writable(text)
        text = self._put(text, self._encoder.breaks(text))
        return self._put(text, self._encoder.breaks_when_normalized(text))

    def value(self, value: object) -> object:
        """A JSON value with guards in all its texts, keys among them."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(one) for one in value]
        return value

    def encode(self, text: str) -> list[int]:
        """Token ids of text with guards."""
        return self._encoder.encode_guarded(text, self._character)

    def _put(self, text: str, places: set[int]) -> str:
        cuts = [0, *sorted(places), len(text)]
        return self._character.join(text[a:b] for a, b in zip(cuts, cuts[1:], strict=False))


def _has_all_bytes(backend: Tokenizer) -> bool:
    """Whether every text can be written, in bytes if need be."""
    model = backend.model
    if getattr(model, "byte_fallback", False):
        return all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    is_byte_level = "ByteLevel" in str(backend.pre_tokenizer)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return is_byte_level and all(model.token_to_id(one) is not None for one in alphabet)


def _proper(contents: Sequence[str], *, from_start: bool) -> tuple[str, ...]:
    """All beginnings (or ends) of the tokens that are not whole."""
    parts = {
        content[:cut] if from_start else content[cut:]
        for content in contents
        for cut in range(1, len(content))
    }
    return tuple(parts)


def _without_guarded(backend: Tokenizer, free: Sequence[AddedToken]) -> Tokenizer:
    """A tokenizer of the same model that knows no guarded token; nothing is copied."""
    plain = Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    before = backend.pre_tokenizer
    if isinstance(before, pre_tokenizers.Metaspace) and before.prepend_scheme == "first":
        # what it encodes stands behind a special token, where no space is put
        before = pre_tokenizers.Metaspace(
            replacement=before.replacement, prepend_scheme="never", split=before.split
        )
    if before is not None:
        plain.pre_tokenizer = before
    in_model = [one for one in free if backend.model.token_to_id(one.content) is not None]
    plain.add_tokens(in_model)
    return plain
