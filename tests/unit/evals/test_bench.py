"""Speed of a tiny model: what is counted, and what is refused."""

import json
import shutil

import pytest

from optiq.artifacts import Speed
from optiq.configs import BenchConfig
from optiq.errors import UsageError
from optiq.evals.bench import _prompt, bench
from optiq.events import Progress, no_emit


def test_speed_is_measured(quantized, tmp_path):
    seen = []
    config = BenchConfig(prompt_tokens=12, new_tokens=4, repeats=3)
    speed = bench(quantized.good, config, seen.append)
    assert speed.prompt_tokens == 12
    assert speed.new_tokens == 4
    assert speed.prefill_tps > 0
    assert speed.decode_tps > 0
    assert speed.peak_memory_bytes > (quantized.good / "model.safetensors").stat().st_size
    assert [e.done for e in seen if isinstance(e, Progress)] == [1, 2, 3]
    speed.save(tmp_path / "speed.json")
    assert Speed.load(tmp_path / "speed.json") == speed


def test_a_prompt_longer_than_the_corpus(tiny_tokenizer):
    assert len(_prompt(tiny_tokenizer, {"model_type": "llama"}, 100_000)) == 100_000
    gemma = _prompt(tiny_tokenizer, {"model_type": "gemma3_text"}, 8)
    assert len(gemma) == 8
    assert gemma[0] == tiny_tokenizer.bos_token_id


def test_a_directory_that_is_no_model(tmp_path, quantized):
    with pytest.raises(UsageError, match=r"no config\.json"):
        bench(tmp_path, BenchConfig(), no_emit)
    broken = tmp_path / "broken"
    shutil.copytree(quantized.good, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UsageError, match="cannot be loaded"):
        bench(broken, BenchConfig(prompt_tokens=4, new_tokens=1, repeats=1), no_emit)
