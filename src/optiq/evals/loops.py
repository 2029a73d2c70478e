"""Whether a text ends in a cycle, as quantized models are prone to."""

from __future__ import annotations

_LONGEST_PERIOD = 512
_MIN_REPEATS = 4
_MIN_CHARS = 80


def ends_in_loop(text: str) -> bool:
    """Whether the end of a text is one piece over and over.

    The piece has at most 512 characters and stands there at least 4 times, over at least 80
    characters; blanks at the very end do not count, and a text of a single character repeated
    counts as any other.

    Cost: a comparison of at most 2,048 characters for each length of the piece.
    """
    text = text.rstrip()
    for period in range(1, min(_LONGEST_PERIOD, len(text) // _MIN_REPEATS) + 1):
        span = max(_MIN_REPEATS * period, _MIN_CHARS)
        if span <= len(text) and text[-span:-period] == text[period - span :]:
            return True
    return False
