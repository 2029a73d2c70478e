"""How a model is loaded and run in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from optiq.backend import memory_left
from optiq.configs import KV_BITS
from optiq.engine import ranks
from optiq.engine.pace import MAX_DRAFTS
from optiq.engine.scheduler import Limits
from optiq.engine.store import Storage
from optiq.errors import UsageError
from optiq.models.families.gemma4 import ImageMask

KV_SHARE = 0.45
"""Of the memory that is left, for pasts: they are held twice while they are put side by side."""


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How a model is loaded and run.

    Attributes:
        memory_limit: most bytes of weights, such as `8GB`; default: four fifths of the memory.
        num_drafts: drafts of a round; None lets measurements decide.
        image_mask: see `families.gemma4.Gemma4`.
        position_base: of a Gemma-4 drafter, see `families.gemma4_assistant.Drafting`.
        sliding_keys: of a Gemma-4 drafter, see there.
        kv_bits: of the keys and values of layers with full attention, 8 or 4; None for the
            model's own type. It saves memory, not time, and changes answers a little.
        limits: of a step.
        kv_memory: bytes that the pasts of answers in progress may take, with those kept for later
            prompts; default: what is left of the memory when the model is loaded, but for room to
            put pasts together; with several ranks, where that is least.
        prefix_memory: bytes of the pasts that are kept for later prompts which begin alike; None
            for half of `kv_memory`.
        tokenizer: directory of the tokenizer, where it is not the model's.
    """

    memory_limit: str | None = None
    num_drafts: int | None = None
    image_mask: ImageMask | None = None
    position_base: int = 1
    sliding_keys: int | None = None
    kv_bits: int | None = None
    limits: Limits = Limits()
    kv_memory: int | None = None
    prefix_memory: int | None = 0
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be had."""
        if self.num_drafts is not None and not 0 <= self.num_drafts <= MAX_DRAFTS:
            raise UsageError(f"num_drafts is {self.num_drafts}; give 0 to {MAX_DRAFTS}, or None")
        if self.kv_bits not in (None, *KV_BITS):
            raise UsageError(f"kv_bits is {self.kv_bits}; give 8 or 4, or None")
        for name in ("kv_memory", "prefix_memory"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; give bytes, 0 or more")

    def storage(self) -> Storage:
        """What the loop may keep; memory that is not given is measured."""
        kv = self.kv_memory
        if kv is None:
            kv = ranks.least(int(KV_SHARE * memory_left()))
        prefix = kv // 2 if self.prefix_memory is None else self.prefix_memory
        return Storage(max(0, (self.sliding_keys or 0) - 1), kv, prefix)
