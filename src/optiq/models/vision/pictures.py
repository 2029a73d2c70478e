"""Pictures from files or from Pillow, as upright RGB; whatever cannot be one is refused by name."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from optiq.errors import UsageError

MAX_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_ADDRESS = re.compile(r"data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
)
_WHITE = (255, 255, 255, 255)
_DEEP = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I", "F"})


def open_picture(source: Image.Image | Path | str | bytes) -> Image.Image:
    """A picture as it is to be looked at: upright, 8-bit RGB, on white where it is transparent.

    Of an animation the first frame is taken.

    Args:
        source: a file, its bytes, or a picture of Pillow, which is left alone.

    Raises:
        UsageError: if there is no such file, it is no picture, is damaged or empty, or has more
            than 64 megapixels, which is seen from its header.

    Cost: memory for the pixels, 4 bytes each and as much again.
    """
    with warnings.catch_warnings():
        # Pillow warns of large pictures, which are measured here, and of harmless oddities
        warnings.simplefilter("ignore")
        if isinstance(source, Image.Image):
            return _upright_rgb(source, "the picture")
        if isinstance(source, bytes):
            return _opened(io.BytesIO(source), "the picture")
        path = _file(source)
        return _opened(path, str(path))


def _file(source: Path | str) -> Path:
    if isinstance(source, str) and _ADDRESS.match(source):
        raise UsageError(
            f"'{source[:80]}' is an address; optiq opens image files and fetches nothing: give a "
            "path"
        )
    path = Path(source)
    try:
        size_bytes = path.stat().st_size if path.is_file() else None
    except OSError:
        size_bytes = None
    if size_bytes is None:
        raise UsageError(f"there is no image file {str(source)[:200]}; check the path")
    if size_bytes == 0:
        raise UsageError(f"the image file {path} is empty; give another")
    return path


def _opened(file: Path | io.BytesIO, name: str) -> Image.Image:
    Image.init()
    readable = [name for name in _FORMATS if name in Image.OPEN]  # a Pillow may lack a library
    try:
        with Image.open(file, formats=readable) as picture:
            return _upright_rgb(picture, name)
    except UnidentifiedImageError:
        raise UsageError(
            f"{name} is no image that optiq reads; give a PNG, JPEG, WebP, GIF, BMP or TIFF"
        ) from None
    except Image.DecompressionBombError:
        raise _too_large(name, "far more than") from None
    except _DAMAGE as error:
        raise _damaged(name, error) from None


def _too_large(name: str, size: str) -> UsageError:
    return UsageError(
        f"{name} has {size} {MAX_PIXELS // 10**6} megapixels; make it smaller: a model sees about "
        "a tenth of one megapixel to three"
    )


def _damaged(name: str, error: BaseException) -> UsageError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UsageError(f"{name} cannot be decoded ({reason}); it is damaged: give another image")


def _upright_rgb(picture: Image.Image, name: str) -> Image.Image:
    width, height = picture.size
    if width < 1 or height < 1:
        raise UsageError(f"{name} has {width} x {height} pixels; give one that has some")
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width} x {height} pixels, more than")
    try:
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        return _rgb(upright)
    except UsageError:
        raise
    except _DAMAGE as error:
        raise _damaged(name, error) from None


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in _DEEP:
        return _gray(picture).convert("RGB")
    transparent = "A" in picture.getbands() or "a" in picture.getbands()
    if transparent or picture.info.get("transparency") is not None:
        layers = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, _WHITE), layers).convert("RGB")
    return picture.convert("RGB")


def _gray(picture: Image.Image) -> Image.Image:
    """8-bit gray of one channel with more bits, for which Pillow would cut at 255.

    Whole numbers of 32 bits are taken as 16-bit ones where they fit, fractions as 0..1 where they
    fit: no format says what they mean.
    """
    values = np.asarray(picture).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=0.0)
    most = float(values.max())
    steps = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(picture.mode, (65535.0,))
    top = next((step for step in steps if most <= step), most)
    return Image.fromarray(np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8))
