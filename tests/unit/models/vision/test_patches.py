"""How a picture is scaled and cut."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from optiq.errors import UsageError
from optiq.models.vision.patches import BUDGETS, PatchRule

PUBLISHED = PatchRule(side=48, budget=280, max_budget=1120)
sides = st.integers(1, 5000)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1024, 768), (19, 14)),
        ((1920, 1080), (22, 12)),
        ((960, 672), (20, 14)),
        ((48, 48), (16, 16)),
        ((100, 2000), (3, 74)),
        ((1, 100_000), (1, 280)),
        ((100_000, 1), (280, 1)),
        ((9, 2000), (1, 249)),
    ],
)
def test_sizes_of_the_published_processor(size, grid):
    """The first five were taken from transformers, the rest follow its rule."""
    width, height = PUBLISHED.size(*size, 280)
    assert (width // 48, height // 48) == grid


@given(sides, sides, st.sampled_from([1, 2, 70, 280, 1120]), st.sampled_from([12, 48]))
def test_a_size_is_whole_patches_within_the_budget(width, height, budget, side):
    found = PatchRule(side, budget, 1120).size(width, height, budget)
    columns, rows = (n // side for n in found)
    assert found == (columns * side, rows * side)
    assert 1 <= columns * rows <= budget
    if min(columns, rows) > 1:  # as near to the shape as whole patches allow
        factor = math.sqrt(budget * side**2 / (width * height))
        assert columns * side <= factor * width + 1e-6 < (columns + 1) * side + 1e-6
        assert rows * side <= factor * height + 1e-6 < (rows + 1) * side + 1e-6


def test_patches_come_row_by_row_with_their_places():
    rule = PatchRule(2, 70, 72)
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    found = rule.squares(pixels)
    assert found.positions.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert found.pixels.dtype == np.float32
    expected = pixels[2:4, 2:4].astype(np.float32) / 255
    np.testing.assert_allclose(found.pixels[4], expected.reshape(-1), rtol=1e-6)


def test_a_small_picture_is_scaled_up():
    rule = PatchRule(12, 70, 72)
    found = rule.cut(Image.new("RGB", (5, 5), (255, 0, 51)), 70)
    assert len(found.pixels) == 64
    np.testing.assert_allclose(found.pixels[0, :3], [1, 0, 0.2], atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "published", "tiny"),
    [
        (None, 280, 70),
        ("auto", 280, 70),
        ("low", 70, 70),
        ("high", 1120, 70),
        (1, 1, 1),
        (72, 72, 72),
    ],
)
def test_what_a_request_may_ask_for(wanted, published, tiny):
    assert PUBLISHED.soft_tokens(wanted) == published
    assert PatchRule(12, 70, 72).soft_tokens(wanted) == tiny


@pytest.mark.parametrize("wanted", [0, -1, 1121])
def test_more_than_there_are_positions(wanted):
    with pytest.raises(UsageError, match=f"{wanted} soft tokens.*positions for 1 to 1120"):
        PUBLISHED.soft_tokens(wanted)


def test_a_detail_that_is_none():
    with pytest.raises(UsageError, match="image detail 'huge' is none of low, auto, high"):
        PUBLISHED.soft_tokens("huge")


def test_the_rule_comes_from_the_processor_then_from_the_config(tmp_path):
    vision = {"patch_size": 4, "pooling_kernel_size": 3, "num_soft_tokens": 70}
    vision["mm_posemb_size"] = 72
    assert PatchRule.read(tmp_path, vision) == PatchRule(12, 70, 72)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_soft_tokens": 60}))
    assert PatchRule.read(tmp_path, vision) == PatchRule(12, 60, 72)
    nested = {"image_processor": {"max_soft_tokens": 50, "patch_size": 8}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert PatchRule.read(tmp_path, vision) == PatchRule(24, 50, 72)
    assert PatchRule.read(tmp_path / "none", {}) == PUBLISHED
    assert max(BUDGETS) == PUBLISHED.max_budget


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "describes no image processor"),
        ('{"image_processor": 3}', "describes no image processor"),
        ('{"max_soft_tokens": "many"}', "which cannot be"),
        ('{"max_soft_tokens": 2000}', "which cannot be"),
        ('{"max_soft_tokens": 70, "patch_size": 0}', "which cannot be"),
    ],
)
def test_processor_files_that_cannot_be(tmp_path, text, words):
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        PatchRule.read(tmp_path, {})
