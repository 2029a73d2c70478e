"""What a checkpoint says about generating with it."""

import json

import pytest

from optiq.errors import UsageError
from optiq.models.generation import GenerationDefaults, read_generation
from tests.gemma4 import TARGET
from tests.tiny import tiny_config


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    return tmp_path


def say(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    return read_generation(folder)


def test_gemma():
    assert read_generation(TARGET) == GenerationDefaults(
        bos=2,
        stop=(1, 6, 14),
        suppressed=(510, 509),
        temperature=1.0,
        top_k=64,
        top_p=0.95,
    )


def test_the_artifact_says_the_same(gemma_release):
    assert read_generation(gemma_release.path) == read_generation(TARGET)


def test_without_a_file(folder):
    assert read_generation(folder) == GenerationDefaults(bos=256, stop=(258,), suppressed=())


def test_a_checkpoint_that_does_not_sample(folder):
    assert say(folder, do_sample=False, temperature=0.7).temperature == 0
    assert say(folder, temperature=0.7, top_k=0, top_p=None).temperature == 0.7
    assert say(folder, top_k=0).top_k is None
    assert say(folder, eos_token_id=[3, 3, 1], min_p=0.1).stop == (3, 1)
    assert say(folder, repetition_penalty=1.1).repetition_penalty == 1.1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"suppress_tokens": ["a"]}, "suppress_tokens .*no token ids"),
        ({"suppress_tokens": [-1]}, "no token ids"),
        ({"eos_token_id": True}, "eos_token_id .*no token ids"),
        ({"temperature": "hot"}, "temperature .*is no number"),
        ({"top_p": -0.1}, "top_p .*below 0"),
        ({"top_k": 1.5}, "top_k .*is not whole"),
    ],
)
def test_values_that_cannot_be(folder, values, words):
    with pytest.raises(UsageError, match=words):
        say(folder, **values)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_files_that_cannot_be_read(folder, text):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UsageError, match="generation_config.json"):
        read_generation(folder)
