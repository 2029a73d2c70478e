"""Which tokens a piece of text is made of."""

from hypothesis import given
from hypothesis import strategies as st

from optiq.server.alignment import Alignment
from optiq.server.jobs import Piece


def pieces(*texts):
    return [
        Piece(i, text if isinstance(text, bytes) else text.encode()) for i, text in enumerate(texts)
    ]


def taken(alignment, text):
    return [piece.token for piece in alignment.take(text)]


@given(st.text("ab é€", max_size=12), st.lists(st.integers(0, 30)), st.lists(st.integers(0, 12)))
def test_every_token_of_a_text_is_taken_once(text, cuts, stops):
    data = text.encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    tokens = pieces(*(data[a:b] for a, b in zip(places, places[1:], strict=False)))
    marks = sorted({0, len(text), *(stop for stop in stops if stop < len(text))})
    alignment = Alignment()
    alignment.add(tokens)
    found = []
    for a, b in zip(marks, marks[1:], strict=False):
        found += taken(alignment, text[a:b])
    assert found == [piece.token for piece in tokens]


def test_markers_before_and_after_are_not_of_it():
    alignment = Alignment()
    alignment.add(pieces("<|a|>", "a", "b", "<|end|>"))
    assert taken(alignment, "ab") == [1, 2]
    alignment.clear()
    alignment.add(pieces("b"))
    assert taken(alignment, "b") == [0]


def test_a_space_that_a_tokenizer_drops_does_not_matter():
    alignment = Alignment()
    alignment.add(pieces(" Hello", " world"))
    assert taken(alignment, "Hello world") == [0, 1]


def test_a_token_cut_by_a_stop_string_counts_for_what_is_left_of_it():
    alignment = Alignment()
    alignment.add(pieces("ab", "cST", "OP"))
    assert taken(alignment, "abc") == [0, 1]


def test_a_character_over_two_tokens_counts_with_the_first_text_that_has_it():
    alignment = Alignment()
    alignment.add(pieces(b"a\xe2", b"\x82\xac", b"b"))
    assert taken(alignment, "a") == [0]
    assert taken(alignment, "€b") == [1, 2]
