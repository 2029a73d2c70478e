"""A picture -> the patches that Gemma-4's unified models take in, and their places.

The picture is scaled, up or down, to the most patches that a budget of soft tokens allows, cut
into squares and left at 0..1.

Reference: transformers `Gemma4UnifiedImageProcessor`. Pillow's bicubic filter stands in for
torchvision's; pixels differ by 1/255 at most.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from optiq.errors import UsageError

Detail = Literal["low", "auto", "high"]
BUDGETS = (70, 140, 280, 560, 1120)
"""Soft tokens an image that the published models were trained with."""
_DEFAULT_BUDGET = 280


class Patches(NamedTuple):
    """A picture in squares.

    Attributes:
        pixels: (n, side * side * 3) float32 in 0..1, row by row, channel last.
        positions: (n, 2) int32, column and row of each.
    """

    pixels: npt.NDArray[np.float32]
    positions: npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class PatchRule:
    """How pictures are cut.

    Attributes:
        side: pixels of a patch, which is one soft token.
        budget: most soft tokens of a picture where nobody says otherwise.
        max_budget: most soft tokens that the model has positions for.
    """

    side: int
    budget: int
    max_budget: int

    @classmethod
    def read(cls, folder: Path, vision: dict[str, Any]) -> PatchRule:
        """The rule of a model directory.

        Args:
            folder: with processor_config.json or preprocessor_config.json, if it has one.
            vision: `vision_config` of config.json.

        Raises:
            UsageError: if what they say cannot be.
        """
        processor = _processor(folder)
        patch = processor.get("patch_size", vision.get("patch_size", 16))
        pool = processor.get("pooling_kernel_size", vision.get("pooling_kernel_size", 3))
        known = vision.get("num_soft_tokens", _DEFAULT_BUDGET)
        budget = processor.get("max_soft_tokens", known)
        table = vision.get("mm_posemb_size", max(BUDGETS))
        numbers = (patch, pool, budget, table)
        if not all(isinstance(n, int) and n > 0 for n in numbers) or budget > table:
            raise UsageError(
                f"the image processor of {folder} asks for patches of {patch} x {pool} pixels, "
                f"{budget} soft tokens and {table} positions, which cannot be; get its config "
                "files again"
            )
        return cls(patch * pool, budget, table)

    def soft_tokens(self, wanted: int | Detail | None) -> int:
        """The budget that a request asks for.

        Args:
            wanted: a number; `low` for 70, `auto` or None for the model's own, `high` for the
                largest that the model was trained with and has positions for.

        Raises:
            UsageError: if it is below 1 or above the positions of the model, or another word.
        """
        if wanted is None or wanted == "auto":
            return self.budget
        if wanted == "low":
            wanted = BUDGETS[0]
        elif wanted == "high":
            fitting = [n for n in BUDGETS if n <= self.max_budget]
            wanted = max([self.budget, *fitting])
        if not isinstance(wanted, int):
            raise UsageError(f"image detail '{wanted}' is none of low, auto, high")
        if not 1 <= wanted <= self.max_budget:
            raise UsageError(
                f"{wanted} soft tokens an image are not possible: this model has positions for 1 "
                f"to {self.max_budget}"
            )
        return wanted

    def size(self, width: int, height: int, budget: int) -> tuple[int, int]:
        """Width and height that a picture is scaled to: whole patches, `budget` at most."""
        factor = math.sqrt(budget * self.side**2 / (width * height))
        columns = math.floor(factor * width / self.side)
        rows = math.floor(factor * height / self.side)
        if rows == 0:
            rows, columns = 1, min(width // height, budget)
        elif columns == 0:
            rows, columns = min(height // width, budget), 1
        return columns * self.side, rows * self.side

    def cut(self, picture: Image.Image, budget: int) -> Patches:
        """Scale an RGB picture to a budget and cut it up."""
        size = self.size(*picture.size, budget)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        return self.squares(np.asarray(picture))

    def squares(self, pixels: npt.NDArray[np.uint8]) -> Patches:
        """Cut (height, width, 3) pixels, whose sides are whole patches."""
        rows, columns = pixels.shape[0] // self.side, pixels.shape[1] // self.side
        scaled = pixels.astype(np.float32) * np.float32(1 / 255)
        grid = scaled.reshape(rows, self.side, columns, self.side, 3).transpose(0, 2, 1, 3, 4)
        row, column = np.mgrid[:rows, :columns]
        places = np.stack([column.reshape(-1), row.reshape(-1)], axis=-1)
        flat = np.ascontiguousarray(grid.reshape(rows * columns, -1))
        return Patches(flat, places.astype(np.int32))

    def check(self, pixels: object, positions: object) -> Patches:
        """Patches that somebody else made, without padding (positions of -1).

        Raises:
            UsageError: if they are not of this model's shape, or lie outside its positions.
        """
        flat = np.asarray(pixels, dtype=np.float32)
        places = np.asarray(positions)
        width = self.side**2 * 3
        sound = flat.ndim == 2 and flat.shape[1] == width and places.shape == (len(flat), 2)
        if not sound or not np.issubdtype(places.dtype, np.integer):
            raise UsageError(
                f"patches of shape {flat.shape} with {places.dtype} positions of shape "
                f"{places.shape} are not (n, {width}) and whole numbers (n, 2)"
            )
        real = (places >= 0).all(axis=1)
        flat, places = flat[real], places[real]
        if not len(flat) or places.max() >= self.max_budget or not np.isfinite(flat).all():
            raise UsageError(
                f"there are {len(flat)} patches; give at least one, finite, at positions below "
                f"{self.max_budget}"
            )
        return Patches(flat, places.astype(np.int32))


def _processor(folder: Path) -> dict[str, Any]:
    """Settings of the image processor; empty where there is no file."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise UsageError(f"{file} cannot be read ({error}); get it again") from None
        found = data.get("image_processor", data) if isinstance(data, dict) else None
        if not isinstance(found, dict):
            raise UsageError(f"{file} describes no image processor; get it again")
        if "max_soft_tokens" in found:
            return found
    return {}
