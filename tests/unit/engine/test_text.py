"""Tokens -> text in pieces."""

import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from optiq.engine.text import Pieces, StopStrings, backend_of, ids_of, keep_few_words
from optiq.errors import UnsupportedModel
from tests.tiny import SPECIALS

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def streamed(pieces, ids, **options):
    stream = pieces.stream(**options)
    return [*(stream.add(token) for token in ids), stream.finish()]


def check_round_trip(tokenizer, text):
    pieces, backend = Pieces(tokenizer), backend_of(tokenizer)
    ids = backend.encode(text, add_special_tokens=False).ids
    shown = streamed(pieces, ids)
    assert "".join(shown) == text
    assert "".join(shown) == backend.decode(ids, skip_special_tokens=False)
    if pieces.are_bytes:
        assert b"".join(pieces.bytes_of(token) for token in ids) == text.encode()
    # what is shown early is right: no character is taken back
    whole = ""
    for piece in shown:
        whole += piece
        assert text.startswith(whole)


@settings(max_examples=60)
@given(TEXTS)
@example(" leading  spaces\n")
@example("👩‍👩‍👧‍👦 e\u0301 \u2581 <0x41>")
def test_bytes_of_sentencepiece(gemma, text):
    if "\u2581" not in text:  # stands for the space in this vocabulary
        check_round_trip(gemma, text)


@settings(max_examples=60)
@given(TEXTS)
@example(" leading  spaces\n")
@example("👩‍👩‍👧‍👦 e\u0301 \u2581 <0x41>")
def test_bytes_of_byte_level(tiny_tokenizer, text):
    check_round_trip(tiny_tokenizer, text)


@pytest.mark.assets
@pytest.mark.parametrize("name", ["gemma_real", "smollm"])
def test_published_vocabularies(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in ["Déjà vu", " 日本語 🦓\n\n", "<0x41> a  b", "x = {'k': [1, 2]}\t", "𐍈é̂"]:
        check_round_trip(tokenizer, text)


def test_no_half_character_is_shown(gemma, tiny_tokenizer):
    for tokenizer in (gemma, tiny_tokenizer):
        pieces = Pieces(tokenizer)
        ids = backend_of(tokenizer).encode("a🦓", add_special_tokens=False).ids
        assert len(ids) == 5
        assert streamed(pieces, ids) == ["a", "", "", "", "🦓", ""]
        assert streamed(pieces, ids[:3]) == ["a", "", "", "\ufffd"]
        # a character that breaks off does not swallow what follows
        assert "".join(streamed(pieces, [*ids[:3], ids[0]])) == "a\ufffda"


def test_special_tokens_are_written_out_where_asked(tiny_tokenizer):
    pieces = Pieces(tiny_tokenizer)
    (end,) = ids_of(tiny_tokenizer, "<|im_end|>")
    assert pieces.literal(end) == "<|im_end|>"
    assert pieces.special == set(ids_of(tiny_tokenizer, *SPECIALS))
    assert ids_of(tiny_tokenizer, "<|im_end|>", "<none>") is None
    assert (pieces.bytes_of(5000), pieces.literal(5000)) == (b"", "")


class Wrapped:
    def __init__(self, backend):
        self.backend_tokenizer = backend


def sentencepiece(decoder):
    vocabulary = {"\u2581Hi": 0, "\u2581you": 1, "<0xC3>": 2, "<0xA9>": 3, "!": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoder
    return Pieces(Wrapped(backend))


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    ],
)
def test_the_first_space_is_dropped_at_a_start_alone(decoder):
    pieces = sentencepiece(decoder)
    assert "".join(streamed(pieces, [0, 2, 3, 1, 4], at_start=True)) == "Hié you!"
    assert "".join(streamed(pieces, [0, 2, 3, 1, 4])) == " Hié you!"


def test_other_decoders_decode_a_window():
    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2, "ball": 3}
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    keep_few_words(Wrapped(backend))  # it keeps none
    pieces = Pieces(Wrapped(backend))
    assert not pieces.are_bytes
    assert streamed(pieces, [1, 2, 3]) == ["play", "ing", " ball", ""]
    backend.decoder = decoders.Sequence([decoders.Replace("a", "b"), decoders.ByteFallback()])
    assert "".join(streamed(Pieces(Wrapped(backend)), [1, 3])) == backend.decode([1, 3])


def test_tokenizers_of_other_kinds_are_refused():
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        Pieces(Wrapped(None))


@settings(max_examples=200)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_end_the_text_where_the_first_is_complete(parts, stops):
    filter_, shown, found = StopStrings(stops), "", None
    for part in parts:
        more, found = filter_.push(part)
        shown += more
        if found:
            break
    else:
        shown += filter_.flush()
    text, want, at = "", None, None
    for character in "".join(parts):  # the definition, a character at a time
        text += character
        ended = [stop for stop in stops if text.endswith(stop)]
        if ended:
            want = max(ended, key=len)
            at = len(text) - len(want)
            break
    assert (shown, found) == (text[:at], want)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_read_is_not_kept(gemma):
    def pages():
        return int(Path("/proc/self/statm").read_text().split()[1])

    keep_few_words(gemma)
    backend = backend_of(gemma)
    before = pages()
    for number in range(12_000):
        backend.encode(f"{number} apples " * 10)
    assert pages() - before < 4000, "16 MB; with all of them kept it is 40"
