"""The tiny random Gemma-4 with reference values from PyTorch: `assets/gemma4-tiny/README.md`."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from optiq.backend import mx, nn
from optiq.models.families.gemma4 import Gemma4, ImageMask
from optiq.models.families.gemma4_assistant import Model as AssistantModel
from optiq.models.load import Source, open_source
from optiq.models.vision.patches import Patches

TINY = Path(__file__).parent / "assets" / "gemma4-tiny"
TARGET, ASSISTANT = TINY / "target", TINY / "assistant"
INFO: dict[str, Any] = json.loads((TINY / "reference.json").read_text())
SUPPRESSED = (510, 509)
LIMIT = 1e-3
"""Largest difference of a logit: wrong masks differ by 0.65 and more."""


@functools.cache
def reference() -> dict[str, np.ndarray]:
    """Arrays of reference.npz."""
    with np.load(TINY / "reference.npz") as stored:
        return {name: stored[name] for name in stored.files}


@functools.cache
def source(path: Path = TARGET) -> Source:
    """A checkpoint, opened."""
    return open_source(str(path))


@functools.cache
def tree(path: Path = TARGET) -> nn.Module:
    """Its module tree in float32."""
    model = source(path).model()
    model.set_dtype(mx.float32)
    return model


def target(image_mask: ImageMask | None = None) -> Gemma4:
    """The target in float32."""
    return Gemma4(tree(), source().config, image_mask)


def assistant() -> AssistantModel:
    """The drafter in float32."""
    model = tree(ASSISTANT)
    assert isinstance(model, AssistantModel)
    return model


def inputs(case: str) -> tuple[list[int], mx.array | None]:
    """Tokens of `text/NAME` or `image/NAME`, and the features of its images."""
    ids = [int(token) for token in reference()[f"{case}/ids"]]
    features = reference().get(f"{case}/features")
    return ids, None if features is None else mx.array(features)


def apart(found: mx.array, expected: np.ndarray) -> float:
    """Largest absolute difference."""
    assert found.shape == expected.shape
    return float(np.abs(np.array(found.astype(mx.float32)) - expected).max())


def prefilled(model: Gemma4, case: str, chunk: int, slack: int = 0) -> mx.array:
    """Logits of a whole prompt through the cache: (L, V)."""
    ids, features = inputs(case)
    states = list(model.prefill(ids, model.make_cache(slack), features, chunk))
    return model.logits(mx.concatenate(states, axis=1))[0]


def stored_patches(name: str) -> list[Patches]:
    """The reference's patches, image by image."""
    arrays = [reference()[f"image/{name}/{leaf}"] for leaf in ("patches", "positions")]
    cuts = np.cumsum(reference()[f"image/{name}/soft_tokens"])[:-1]
    pieces = [np.split(array, cuts) for array in arrays]
    return [Patches(*pair) for pair in zip(*pieces, strict=True)]
