"""Images for Gemma-4's unified models: patches are projected straight into the decoder.

There is no tower: norm, projection, norm, a learned position for the column and one for the row,
norm, then the projection that all modalities share.

Reference: transformers `Gemma4UnifiedVisionEmbedder`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from optiq.backend import compute_dtype, mx
from optiq.errors import UnsupportedModel, UsageError
from optiq.models.families import Config
from optiq.models.families.gemma4_config import text_config
from optiq.models.vision.patches import Detail, Patches, PatchRule
from optiq.models.vision.pictures import open_picture
from optiq.models.vision.sidecar import read_sidecar

Picture = Image.Image | Path | str | bytes | tuple[Any, Any]
"""A picture, the path of one, or its patches and positions."""

_NORM_EPS = 1e-5
_EMBEDDER, _PROJECTION = "model.vision_embedder.", "model.embed_vision.embedding_projection.weight"


class Gemma4Vision:
    """Pictures -> features for the image tokens of a prompt.

    Args:
        folder: a Gemma-4 unified model directory of ours, with its sidecar.
        config: its config.json.

    Attributes:
        rule: how pictures are cut.
        dtype: of the computation and the features: float32 on the CPU, else bfloat16.

    Raises:
        UnsupportedModel: if the model has another tower.
        UsageError: if the sidecar is missing, damaged, or of another model.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        vision = config.get("vision_config")
        if config.get("model_type") != "gemma4_unified" or not isinstance(vision, dict):
            raise UnsupportedModel(
                f"tower not supported by optiq: it runs images of gemma4_unified, and this is "
                f"{config.get('model_type')}{'' if vision else ' without vision_config'}; leave "
                "the images out, or run them with mlx-vlm"
            )
        self.rule = PatchRule.read(folder, vision)
        self.dtype = compute_dtype(mx.bfloat16)
        self._eps = float(vision.get("rms_norm_eps", 1e-6))
        self._ids = [config.get(f"{name}_token_id") for name in ("boi", "image", "eoi")]
        width = vision.get("mm_embed_dim", 3840)
        hidden = text_config(config)["hidden_size"]
        self._weights = self._checked(read_sidecar(folder), width, hidden, folder)

    def _checked(
        self, tensors: dict[str, mx.array], width: int, hidden: int, folder: Path
    ) -> dict[str, mx.array]:
        """The tensors in the dtype of the computation, under short names."""
        pixels = self.rule.side**2 * 3
        shapes = {
            "patch_ln1.weight": (pixels,),
            "patch_ln1.bias": (pixels,),
            "patch_dense.weight": (width, pixels),
            "patch_dense.bias": (width,),
            "patch_ln2.weight": (width,),
            "patch_ln2.bias": (width,),
            "pos_embedding": (self.rule.max_budget, 2, width),
            "pos_norm.weight": (width,),
            "pos_norm.bias": (width,),
        }
        wanted = {f"{_EMBEDDER}{name}": shape for name, shape in shapes.items()}
        wanted[_PROJECTION] = (hidden, width)
        for name, shape in wanted.items():
            found = tuple(tensors[name].shape) if name in tensors else None
            if found != shape:
                raise UsageError(
                    f"the sidecar of {folder} has {found or 'nothing'} for '{name}', config.json "
                    f"asks for {shape}: it is of another model; convert again"
                )
        chosen = {name.removeprefix(_EMBEDDER): tensors[name].astype(self.dtype) for name in wanted}
        mx.eval(chosen)
        return chosen

    def patches(self, picture: Picture, wanted: int | Detail | None = None) -> Patches:
        """The patches of one picture, each of which is a soft token.

        Args:
            picture: what to look at; patches are checked and taken as they are.
            wanted: soft tokens at most, or the detail; see `PatchRule.soft_tokens`.

        Raises:
            UsageError: if the picture cannot be used, or the model has no such detail.
        """
        budget = self.rule.soft_tokens(wanted)
        if isinstance(picture, tuple):
            return self.rule.check(*picture)
        return self.rule.cut(open_picture(picture), budget)

    def features(self, images: Sequence[Patches]) -> mx.array:
        """What stands in place of the embeddings at the image tokens: (all patches, hidden)."""
        if not images:
            raise UsageError("there are no images to embed")
        pixels = mx.concatenate([mx.array(image.pixels) for image in images])
        places = mx.concatenate([mx.array(image.positions) for image in images])
        table = self._weights["pos_embedding"]
        h = self._norm("patch_ln1", pixels.astype(self.dtype))
        h = h @ self._weights["patch_dense.weight"].T + self._weights["patch_dense.bias"]
        h = self._norm("patch_ln2", h)
        h = h + table[places[:, 0], 0] + table[places[:, 1], 1]
        h = mx.fast.rms_norm(self._norm("pos_norm", h), None, self._eps)
        return h @ self._weights[_PROJECTION].T

    def _norm(self, name: str, x: mx.array) -> mx.array:
        weight, bias = (self._weights[f"{name}.{leaf}"] for leaf in ("weight", "bias"))
        # the norm of a shifted row is the same, and MLX's sum of a long row of like numbers is poor
        centred = x - x.mean(axis=-1, keepdims=True)
        return mx.fast.layer_norm(centred, weight, bias, _NORM_EPS)

    def expand(self, tokens: Sequence[int], images: Sequence[Patches]) -> list[int]:
        """A prompt with as many tokens for each image as it has patches, and marks around them.

        Args:
            tokens: with one image token for each image, as a chat template writes it.
            images: in order.

        Raises:
            UsageError: if there are not as many image tokens as images.
        """
        begin, token, end = self._ids
        count = sum(item == token for item in tokens)
        if token is None or count != len(images):
            raise UsageError(
                f"the prompt has {count} places for images and {len(images)} images were given; "
                "give one image for each place"
            )
        waiting = iter(images)
        out: list[int] = []
        for item in tokens:
            if item != token:
                out.append(item)
                continue
            marks = [begin] if begin is not None else [], [end] if end is not None else []
            out += [*marks[0], *[token] * len(next(waiting).pixels), *marks[1]]
        return out

    def match(self, tokens: Sequence[int], images: Sequence[Patches]) -> None:
        """Check an expanded prompt against its images.

        Args:
            tokens: with an image token for each patch; see `expand`.
            images: in order.

        Raises:
            UsageError: if the runs of image tokens are not those of the images.
        """
        token = self._ids[1]
        runs = [len(list(run)) for item, run in itertools.groupby(tokens) if item == token]
        sizes = [len(image.pixels) for image in images]
        if runs != sizes:
            raise UsageError(
                f"the prompt has image tokens in runs of {runs}, the images have {sizes} soft "
                "tokens; give the images of the prompt, in order"
            )
