"""Targets and drafters from directories."""

import json
import shutil

import numpy as np
import pytest

from optiq.backend import load_arrays, mx
from optiq.errors import UsageError
from optiq.models import gemma4 as gemma4_module
from optiq.models.families.gemma4_assistant import Drafting
from optiq.models.gemma4 import load_drafter, load_target
from optiq.models.load import load_tree
from tests.gemma4 import ASSISTANT, INFO, LIMIT, TARGET, apart, prefilled, reference
from tests.unit.models.families.test_gemma4_config import resaved


@pytest.mark.parametrize("case", [f"text/{name}" for name in INFO["text"]])
def test_source_and_artifact_are_the_same_target(gemma_release, case):
    for path in (TARGET, gemma_release.path):
        logits = prefilled(load_target(path), case, 16)
        assert apart(logits, reference()[f"{case}/logits"]) <= LIMIT


def test_a_source_that_was_saved_again(tmp_path):
    """Stock mlx-lm cannot load it."""
    folder = shutil.copytree(TARGET, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(resaved()))
    expected = reference()["text/short/logits"]
    assert apart(prefilled(load_target(folder), "text/short", 64), expected) <= LIMIT


def test_a_text_checkpoint(tmp_path):
    """`gemma4_unified_text`, which mlx-lm does not know by that name."""
    folder = shutil.copytree(TARGET, tmp_path / "model")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    (folder / "config.json").write_text(json.dumps(text))
    for file in folder.glob("*.safetensors"):
        named = {
            name.replace("model.language_model.", "model."): value
            for name, value in load_arrays(file).items()
            if "language_model" in name
        }
        mx.eval(named)
        mx.save_safetensors(str(file), named)
    (folder / "model.safetensors.index.json").unlink()
    target = load_target(folder)
    assert load_tree(folder)[1]["model_type"] == "gemma4_text"
    assert target.image_token_id is None
    expected = reference()["text/short/logits"]
    assert apart(prefilled(target, "text/short", 64), expected) <= LIMIT


def test_on_a_gpu_the_weights_stay_packed(gemma_release, monkeypatch):
    monkeypatch.setattr(gemma4_module, "is_cpu", lambda: False)
    tree = load_target(gemma_release.path).text
    assert hasattr(tree.embed_tokens, "scales")


def test_a_drafter(gemma_release):
    target = load_target(gemma_release.path)
    drafting = Drafting(position_base=2)
    drafter = load_drafter(ASSISTANT, target, drafting)
    assert drafter.drafting is drafting
    assert np.array(drafter.model.pre_projection.weight).dtype == np.float32


def test_a_drafter_alone_and_a_target_as_drafter():
    with pytest.raises(UsageError, match="load the target and pass it as drafter="):
        load_target(ASSISTANT)
    with pytest.raises(UsageError, match="is a gemma4_unified, not the drafter"):
        load_drafter(TARGET, load_target(TARGET))


def test_a_directory_that_lacks_tensors(tmp_path):
    folder = shutil.copytree(TARGET, tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="cannot be loaded .*Missing.*; get the model again"):
        load_target(folder)
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="has no config.json"):
        load_target(folder)
