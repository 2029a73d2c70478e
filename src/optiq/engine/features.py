"""Features of pictures, computed once for each content."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from optiq.backend import mx
from optiq.engine.prefix_cache import IMAGE_KEYS
from optiq.models.vision.patches import Patches

_CAPACITY_BYTES = 1 << 28


def content_hash(patches: Patches) -> int:
    """A number of 61 bits for what a picture shows, as it was cut."""
    state = hashlib.blake2b(digest_size=8)
    for part in (np.asarray(patches.pixels), np.asarray(patches.positions)):
        state.update(f"{part.shape}{part.dtype}".encode())
        state.update(np.ascontiguousarray(part).tobytes())
    return int.from_bytes(state.digest(), "big") >> 3


@dataclasses.dataclass
class FeatureCache:
    """Features by content, the least recently used given up first.

    Args:
        compute: what makes the features of a picture: (its patches, H).
        capacity_bytes: of all that are held.

    Attributes:
        nbytes: of those that are held.
    """

    compute: Callable[[Sequence[Patches]], mx.array]
    capacity_bytes: int = _CAPACITY_BYTES
    nbytes: int = 0
    _held: OrderedDict[int, mx.array] = dataclasses.field(default_factory=OrderedDict)

    def of(self, images: Sequence[Patches], hashes: Sequence[int]) -> mx.array:
        """Features of pictures, in order: (all patches, H).

        Each is computed alone, so that the same picture has the same features in any company.
        """
        found = [self._one(*pair) for pair in zip(images, hashes, strict=True)]
        return found[0] if len(found) == 1 else mx.concatenate(found)

    def _one(self, image: Patches, key: int) -> mx.array:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        features = self.compute([image])
        mx.eval(features)
        self._held[key] = features
        self.nbytes += features.nbytes
        while self.nbytes > self.capacity_bytes:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes
        return features


def keys_of(
    tokens: Sequence[int], image: int | None, images: Sequence[tuple[int, int]]
) -> tuple[int, ...]:
    """Tokens with keys of content in place of image tokens, see `prefix_cache.Keys`.

    A run of image tokens has one key, for all images in it: they see each other.

    Args:
        tokens: of a prompt, one for each soft token.
        image: the id of those.
        images: soft tokens and hash of each image.
    """
    out: list[int] = []
    waiting = iter(images)
    for token, run in itertools.groupby(tokens):
        count = sum(1 for _ in run)
        if token != image:
            out += [token] * count
            continue
        left, parts = count, [count]
        while left > 0:
            size, content = next(waiting)
            left -= size
            parts.append(content)
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
        out += [IMAGE_KEYS + (int.from_bytes(digest, "big") >> 3)] * count
    return tuple(out)
