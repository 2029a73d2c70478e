"""One answer that is being written."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np

from optiq.backend import mx
from optiq.engine.drafters.base import Session
from optiq.engine.events import Event, FinishReason, TokenLogprob, Tokens, Usage
from optiq.engine.kv_cache import SequenceCache
from optiq.engine.pace import DraftReport, Pace
from optiq.engine.prefix_cache import Keys
from optiq.engine.requests import Reader, Request
from optiq.engine.sampling import History, Place, Row
from optiq.errors import EngineFailure
from optiq.models.families.gemma4 import chunks


@dataclasses.dataclass(frozen=True)
class Drafting:
    """A drafter at work on a sequence.

    Attributes:
        name: of the drafter.
        session: its memory of the sequence.
        pace: how many drafts a round has.
    """

    name: str
    session: Session
    pace: Pace


class SequenceState:
    """A request, what has been read and written of it, and its past in the model.

    Args:
        request: it.
        reader: makes text of its tokens.
        drafting: a drafter, if it has one.

    Attributes:
        tokens: prompt and answer.
        cache: holds the first `cache.length` of them; while the sequence is in a batch, stale.
        state: of the target, that the last token was chosen from.
        parts: tokens of the chunks that are still to be read before it writes.
        marks: lengths at which the past is worth keeping for others.
        cached: tokens of the prompt that it did not read; None before it began.
        events: not yet given out.
        done: nothing more will be written.
        error: what ended it, if that was an error.
    """

    def __init__(
        self,
        request: Request,
        reader: Reader,
        drafting: Drafting | None = None,
    ) -> None:
        self.request, self.drafting = request, drafting
        self.cache = SequenceCache.elsewhere(0)
        self.tokens = list(request.tokens)
        self.state: mx.array | None = None
        self.events: deque[Event] = deque()
        self.done = False
        self.error: Exception | None = None
        self._reader = reader
        self._history = History(request.tokens)
        self._image = _image_id(request)
        self._features_used = 0
        self.parts: deque[int] = deque()
        self.marks: frozenset[int] = frozenset()
        self.cached: int | None = None

    def begin(self, cache: SequenceCache, chunk: int, marks: Collection[int] = ()) -> None:
        """Have the first `cache.length` tokens read already, and the rest to read.

        Args:
            cache: of its own.
            chunk: tokens of a chunk at most, but for an image.
            marks: lengths at which a chunk ends.
        """
        start, stop, prompt = cache.length, self.readable, len(self.request.tokens)
        self.cache, self.state, self.marks = cache, None, frozenset(marks)
        if self.cached is None:
            self.cached = start
        # an image token in the answer is a token like others
        self._features_used = sum(token == self._image for token in self.request.tokens[:start])
        ends = sorted({at for at in (*marks, prompt, stop) if start < at <= stop})
        self.parts = deque(
            span.stop - span.start
            for first, last in itertools.pairwise([start, *ends])
            for span in chunks(self.tokens[first:last], chunk, self._image)
        )

    def take_over(self, leader: SequenceState) -> None:
        """Have read what another sequence of the same tokens has read."""
        self.cache, self.state, self.cached = leader.cache.fork(), leader.state, leader.cached
        self._features_used = leader._features_used
        self.parts.clear()

    def lose(self) -> None:
        """Forget what was read."""
        self.cache, self.state = SequenceCache.elsewhere(0), None
        self.parts.clear()

    @property
    def readable(self) -> int:
        """Tokens before those that are read in the step that chooses the next: one, or an image."""
        if self._image is None or self.tokens[-1] != self._image:
            return len(self.tokens) - 1
        run = itertools.takewhile(lambda token: token == self._image, reversed(self.tokens))
        return len(self.tokens) - sum(1 for _ in run)

    def keys(self, count: int) -> Keys:
        """What tells the first tokens apart."""
        prompt = self.request.keys or self.request.tokens
        return np.array([*prompt, *self.tokens[len(prompt) :]][:count], dtype=np.int64)

    @property
    def written(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.tokens)

    @property
    def unread(self) -> list[int]:
        """Tokens that are not in the cache."""
        return self.tokens[self.cache.length :]

    @property
    def begins_alone(self) -> bool:
        """Whether its next pass is not that of a batch: the first token, or an image, is read."""
        return not self.cache.length or len(self.unread) > 1

    @property
    def may_run_ahead(self) -> bool:
        """Whether the token after the next can be drawn before the next is known to Python."""
        request = self.request
        free = request.constraint is None and not request.sampling.penalizes
        return free and self.written + 1 < request.max_tokens

    def features_of(self, tokens: Sequence[int]) -> mx.array | None:
        """Features of the images among the next tokens to read; each is given once."""
        if self.request.features is None:
            return None
        count = sum(token == self._image for token in tokens)
        if not count or self._features_used >= len(self.request.features):
            return None  # an image token in the answer is a token like others
        start = self._features_used
        self._features_used += count
        return self.request.features[start : self._features_used]

    def rows(self, drafts: Sequence[int] = ()) -> list[Row]:
        """Whose logits those after the text, and after each draft, are."""
        sampling = self.request.sampling
        if not sampling.penalizes:
            return [Row(sampling)] * (len(drafts) + 1)
        ends = range(len(drafts) + 1)
        return [Row(sampling, self._history.after(drafts[:end])) for end in ends]

    def places(self, count: int) -> list[Place]:
        """What the next draws follow from."""
        seed = self.request.sampling.seed
        assert seed is not None
        return [Place(seed, self.request.choice, self.written + i) for i in range(count)]

    def up_to_stop(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first that ends an answer, that one among them."""
        ends = (i + 1 for i, token in enumerate(tokens) if token in self.request.stop)
        return tokens[: next(ends, len(tokens))]

    def take(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """Go on by tokens that were drawn, as far as the answer goes.

        Args:
            tokens: at least one.
            logprobs: one a token, or none.
        """
        request = self.request
        out: list[Event] = []
        taken = 0
        reason: FinishReason | None = None
        for token in tokens:
            taken += 1
            self.tokens.append(token)
            if request.constraint is not None and not request.constraint.accept(token):
                raise EngineFailure(f"token {token} was drawn, which the grammar forbids")
            if token in request.stop:
                reason = "stop"
            else:
                out += self._reader.feed([token])
                if self._reader.stopped is not None:
                    reason = "stop"
                elif self.written >= request.max_tokens:
                    reason = "length"
            if reason:
                break
        self._history.add(tokens[:taken])
        logprobs = logprobs[:taken] if request.sampling.logprobs else ()
        self.events.append(Tokens(tuple(tokens[:taken]), tuple(logprobs)))
        self.events += out
        if reason:
            self.end(reason)

    def end(self, reason: FinishReason) -> None:
        """No more of it."""
        report = self.report
        usage = Usage(
            prompt_tokens=len(self.request.tokens),
            completion_tokens=self.written,
            cached_tokens=self.cached or 0,
            drafted_tokens=report.drafted if report else 0,
            accepted_tokens=report.accepted if report else 0,
        )
        self.events += self._reader.finish(reason, usage)
        self.done = True

    @property
    def report(self) -> DraftReport | None:
        """What its drafter was good for; None without one."""
        if self.drafting is None:
            return None
        return self.drafting.pace.report(self.drafting.name)


def _image_id(request: Request) -> int | None:
    return request.image_token_id if request.features is not None else None
