"""Which tokens a piece of text is made of."""

from __future__ import annotations

from collections.abc import Sequence

from optiq.server.jobs import Piece


class Alignment:
    """Tokens that were written, and of which nothing was said yet.

    Text follows its tokens at once or later, among markers that are no text; a token may end in
    another piece of text than it begins in, and counts for the first.
    """

    def __init__(self) -> None:
        self._left = b""  # of the token before the waiting ones
        self._waiting: list[Piece] = []

    def add(self, pieces: Sequence[Piece]) -> None:
        """More tokens."""
        self._waiting += pieces

    def clear(self) -> None:
        """What waits has become something else than text."""
        self._left, self._waiting = b"", []

    def take(self, text: str) -> list[Piece]:
        """The tokens of the next piece of text; those before it are forgotten."""
        wanted = text.encode("utf-8", "replace")
        data = self._left + b"".join(piece.data for piece in self._waiting)
        start = self._start(wanted, data)
        end = start + len(wanted)
        position, first, after = len(self._left), len(self._waiting), len(self._waiting)
        for i, piece in enumerate(self._waiting):
            if position >= end:
                after = i
                break
            position += len(piece.data)
            if position > start:
                first = min(first, i)
        taken = self._waiting[first:after]
        self._left = data[end:position] if end < position else b""
        self._waiting = self._waiting[after:]
        return taken

    def _start(self, wanted: bytes, data: bytes) -> int:
        """Where the text begins: at a token if possible, else anywhere; 0 where it is not found."""
        positions = [0, len(self._left)]
        for piece in self._waiting:
            positions.append(positions[-1] + len(piece.data))
        at_token = (place for place in positions if data.startswith(wanted, place))
        return next(at_token, max(0, data.find(wanted)))
