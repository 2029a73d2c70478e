"""Image features against PyTorch, and from the artifact on."""

import json
import shutil

import numpy as np
import pytest
from mlx_lm.utils import load_model
from PIL import Image

from optiq.backend import mx
from optiq.errors import UnsupportedModel, UsageError
from optiq.models.families.gemma4 import Gemma4
from optiq.models.load import read_config
from optiq.models.safetensors_io import INDEX_NAME, SIDECAR_NAME
from optiq.models.vision.gemma4 import Gemma4Vision
from optiq.upstream import dense_float32
from tests.gemma4 import (
    INFO,
    LIMIT,
    TINY,
    apart,
    inputs,
    prefilled,
    reference,
    stored_patches,
)

FEATURE_LIMIT = 1e-5
PIXEL_LIMIT = 2 / 255
CASES = list(INFO["image"])


@pytest.fixture(scope="module")
def vision(gemma_release):
    return Gemma4Vision(gemma_release.path, read_config(gemma_release.path))


@pytest.mark.parametrize("name", CASES)
def test_features(vision, name):
    features = vision.features(stored_patches(name))
    assert features.dtype == mx.float32
    assert apart(features, reference()[f"image/{name}/features"]) <= FEATURE_LIMIT


@pytest.mark.parametrize("name", CASES)
def test_patches(vision, name):
    """Soft tokens and positions are equal, pixels nearly: Pillow's filter is not torchvision's."""
    info = INFO["image"][name]
    for file, expected in zip(info["images"], stored_patches(name), strict=True):
        path = TINY / file
        if info["resize"]:
            found = vision.patches(path)
        else:
            found = vision.rule.squares(np.asarray(Image.open(path)))
        np.testing.assert_array_equal(found.positions, expected.positions)
        assert found.pixels.shape == expected.pixels.shape
        assert np.abs(found.pixels - expected.pixels).max() <= PIXEL_LIMIT


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_expanded_as_the_processor_does(vision, name):
    ids, _ = inputs(f"image/{name}")
    begin, token, end = vision._ids
    images = stored_patches(name)
    short = [i for i, j in zip(ids, [None, *ids], strict=False) if not (i == j == token)]
    short = [i for i in short if i not in {begin, end}]
    assert vision.expand(short, images) == ids
    vision.match(ids, images)


def test_logits_of_the_artifact_from_stored_patches(gemma_release, vision):
    """Through the quantized weights of a checkpoint that lies on its grid: the same bound."""
    model, config = load_model(gemma_release.path, lazy=True)
    model.set_dtype(mx.float32)
    quantized = Gemma4(model, config)
    dense = Gemma4(dense_float32(load_model(gemma_release.path, lazy=True)[0]), config)
    for name in CASES:
        ids, _ = inputs(f"image/{name}")
        features = vision.features(stored_patches(name))
        for gemma in (quantized, dense):
            *states, last = gemma.prefill(ids, gemma.make_cache(), features, 16)
            logits = gemma.logits(mx.concatenate([*states, last], axis=1))[0]
            assert apart(logits, reference()[f"image/{name}/logits"]) <= LIMIT


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_text_logits_of_the_artifact(gemma_release, chunk):
    model, config = load_model(gemma_release.path, lazy=True)
    model.set_dtype(mx.float32)
    for name in INFO["text"]:
        logits = prefilled(Gemma4(model, config), f"text/{name}", chunk)
        assert apart(logits, reference()[f"text/{name}/logits"]) <= LIMIT


# -- patches that somebody else made -------------------------------------------------------------


def test_patches_with_padding_are_taken_without_it(vision):
    (patches,) = stored_patches("one_short")
    pixels = np.concatenate([patches.pixels, np.zeros((64, 432), np.float32)])
    positions = np.concatenate([patches.positions, np.full((64, 2), -1)])
    found = vision.patches((pixels, positions))
    np.testing.assert_array_equal(found.pixels, patches.pixels)
    np.testing.assert_array_equal(found.positions, patches.positions)


@pytest.mark.parametrize(
    ("pixels", "positions", "words"),
    [
        (np.zeros((2, 432)), np.zeros((3, 2), int), "of shape .3, 2. are not"),
        (np.zeros((2, 431)), np.zeros((2, 2), int), "are not .n, 432."),
        (np.zeros((2, 432)), np.zeros((2, 2)), "float64 positions"),
        (np.zeros((2, 432)), np.full((2, 2), -1), "there are 0 patches"),
        (np.zeros((2, 432)), np.full((2, 2), 72), "positions below 72"),
        (np.full((2, 432), np.nan), np.zeros((2, 2), int), "finite"),
    ],
)
def test_patches_that_cannot_be(vision, pixels, positions, words):
    with pytest.raises(UsageError, match=words):
        vision.patches((pixels, positions))


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_images_as_places(vision, count):
    token = vision._ids[1]
    images = stored_patches("one_short") * count
    with pytest.raises(UsageError, match=f"1 places for images and {count} images"):
        vision.expand([2, token, 7], images)
    with pytest.raises(UsageError, match="runs of .1.*the images have"):
        vision.match([2, token, 7], images)


def test_no_images_have_no_features(vision):
    with pytest.raises(UsageError, match="no images to embed"):
        vision.features([])


# -- sidecars that do not fit --------------------------------------------------------------------


@pytest.fixture
def folder(gemma_release, tmp_path):
    """A copy of the artifact to spoil."""
    return shutil.copytree(gemma_release.path, tmp_path / "model")


def refused(folder, words, kind=UsageError):
    with pytest.raises(UsageError, match=words) as caught:
        Gemma4Vision(folder, read_config(folder))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_a_model_without_its_sidecar_reads_text_alone(folder):
    (folder / SIDECAR_NAME).unlink()
    refused(folder, f"has no {SIDECAR_NAME}, so it reads text alone")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_sidecar_cut_short(folder, keep):
    file = folder / SIDECAR_NAME
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "no sound safetensors file .it is cut short")


def test_a_sidecar_of_another_model(folder):
    file = folder / SIDECAR_NAME
    arrays = mx.load(str(file))
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, {"about": "other"})
    refused(folder, "is of another model than the weights beside it")
    arrays.pop("model.vision_embedder.pos_norm.bias")
    mx.save_safetensors(str(file), arrays)
    refused(folder, "is of another model than the weights beside it")


def test_a_sidecar_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["mm_embed_dim"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "config.json asks for .64, 432.*: it is of another model")


def test_an_index_that_cannot_be_read(folder):
    (folder / INDEX_NAME).write_text("{")
    refused(folder, "index.json cannot be read")


@pytest.mark.parametrize("change", [{"model_type": "gemma4"}, {"vision_config": None}])
def test_another_tower(folder, change):
    config = read_config(folder) | change
    with pytest.raises(UnsupportedModel, match="tower not supported by optiq"):
        Gemma4Vision(folder, config)
