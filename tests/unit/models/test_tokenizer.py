"""Tokenizers of sources: where they lie, and what is wrong with one."""

import json
import logging
import shutil

import pytest

from optiq.configs import RunConfig
from optiq.errors import UsageError
from optiq.models.load import load_tokenizer, open_source, read_config
from tests.tiny import tiny_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A checkpoint to spoil."""
    return tiny_checkpoint(tmp_path)


def test_a_missing_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    source = open_source(str(folder))
    with pytest.raises(
        UsageError, match="has no tokenizer; add tokenizer.json or give --tokenizer"
    ):
        source.tokenizer  # noqa: B018


def test_a_tokenizer_from_another_directory(folder, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(folder / name, other / name)
    source = open_source(str(folder), RunConfig(tokenizer=other))
    assert source.tokenizer_path == other
    assert source.tokenizer.encode("a", add_special_tokens=False) == [64]
    assert source.tokenizer is source.tokenizer


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"version": "1.0"}', '{"model": {"type": "BPE"}}', "[]"]
)
def test_a_broken_tokenizer(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UsageError, match="cannot be loaded .*; give --tokenizer DIR") as caught:
        load_tokenizer(folder, read_config(folder))
    assert "\n" not in str(caught.value)


def test_a_text_beyond_the_context_is_tokenized_without_a_word(folder, caplog, monkeypatch):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 8}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = load_tokenizer(folder, {})
    assert len(tokenizer.encode("one two three " * 100)) > 100
    assert not caplog.records
