"""What the loop is asked for, and whom it asks while it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from optiq.backend import mx
from optiq.engine.events import Event, FinishReason, Usage
from optiq.engine.sampling import Sampling


class Reader(Protocol):
    """Makes events of the tokens of one answer; `output.OutputParser` is one.

    Attributes:
        stopped: the stop string that was found; None while there is none.
    """

    stopped: str | None

    def feed(self, tokens: Sequence[int]) -> Sequence[Event]:
        """Take the next tokens of the answer; stop tokens are not fed."""
        ...

    def finish(self, reason: FinishReason, usage: Usage | None = None) -> Sequence[Event]:
        """Give what was held back, and `Finished`, which is the last event."""
        ...


class Constraint(Protocol):
    """A grammar that an answer obeys, at the place it has reached."""

    def allowed(self) -> mx.array | None:
        """Tokens that may come next: (vocabulary,) bool, at least one; None for all."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by a token; False, and nowhere, where it may not come."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens that were accepted."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to write.

    Attributes:
        tokens: the prompt, one id for each soft token of an image.
        sampling: settings, with a seed.
        max_tokens: most tokens of the answer, at least 1.
        stop: tokens that end it.
        features: (P, H), of the P image tokens of the prompt.
        image_token_id: of those.
        choice: number of the answer among those of one prompt.
        num_drafts: drafts of a round; None lets measurements decide.
        constraint: a grammar.
        keys: what tells the tokens of the prompt apart, see `prefix_cache.Keys`; None: their ids.
        marks: lengths of the prompt from which another is likely to go on.
        namespace: what the past of a text depends on besides: adapter, mask.
    """

    tokens: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    stop: frozenset[int] = frozenset()
    features: mx.array | None = None
    image_token_id: int | None = None
    choice: int = 0
    num_drafts: int | None = None
    constraint: Constraint | None = None
    keys: tuple[int, ...] | None = None
    marks: tuple[int, ...] = ()
    namespace: str = ""
