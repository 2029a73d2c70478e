"""Several processes with one model: what they write together, and what they refuse."""

import json
import subprocess
import sys

import numpy as np
import pytest

import optiq
from optiq import upstream
from optiq.artifacts import QuantOption
from optiq.backend import mx, nn
from optiq.engine import ranks, sampling
from optiq.engine.sampling import Place
from optiq.errors import UnsupportedModel, UsageError
from optiq.events import no_emit
from optiq.models.load import open_source
from optiq.quant.baseline import write_uniform
from tests.ranks import said, started
from tests.tiny import tiny_checkpoint, tiny_config

LIMIT_S = 300
MARGIN, MOST_DIFFERENT = 1e-3, 0.005
PROMPTS = ["a", "hello there", "one two three four", "x" * 90, "and so on, and on", "\n\n"]
SEED = 5
ASKED = [*((text, 0) for text in PROMPTS), (PROMPTS[1], 0), (PROMPTS[1], 1)]
PACKED = "400kB"  # less than dense float32 takes

SCRIPT = """
import json, sys
import optiq
from optiq import settings
from optiq.engine.options import EngineOptions

out, prompts = sys.argv[1], json.loads(sys.argv[2])
answers = {}
for words in sys.argv[3:]:
    folder, _, limit = words.partition("=")
    engine = optiq.load(folder, options=EngineOptions(memory_limit=limit or None))
    for kind, how in {
        "greedy": {"temperature": 0},
        "sampled": {"temperature": 1, "seed": 5},
        "unseeded": {"temperature": 1},
    }.items():
        begun = [engine.generate(text, max_tokens=24, **how) for text in prompts]
        begun += engine.generate_choices(prompts[1], choices=2, max_tokens=24, **how)
        answers[f"{words} {kind}"] = [answer.result().token_ids for answer in begun]
    tree = engine._target.model
    answers[f"{words} layers"] = sorted({type(each).__name__ for each in tree.modules()})
    answers[f"{words} embedding"] = engine.embed(prompts[1:2])[0].tolist()
rank = settings.load().rank
with open(f"{out}/{'alone' if rank is None else rank}.json", "w") as file:
    json.dump(answers, file)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Sources of two families, and an artifact of one of them."""
    folder = tmp_path_factory.mktemp("models")
    llama, qwen3 = (tiny_checkpoint(folder, family) for family in ("llama", "qwen3"))
    option = QuantOption("affine", 4, 32)
    write_uniform(open_source(str(llama)), option, folder / "artifact", no_emit)
    return llama, qwen3, folder / "artifact"


def margin(logits, place=None):
    """How far the most likely token, after the noise of a draw, is before the next."""
    scores = logits.astype(mx.float32)
    if place is not None:
        noise = mx.random.uniform(shape=scores.shape, key=mx.array(place.key(), dtype=mx.uint32))
        scores = scores + sampling._gumbel(noise)
    two = np.sort(np.array(scores))[-2:]
    return two[1] - two[0]


def different(folder, before, after, seed=None):
    """Answers that differ; a difference that rounding does not decide fails."""
    engine, near = optiq.load(folder), 0
    for number, (a, b) in enumerate(zip(before, after, strict=True)):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None:
            assert a == b
            continue
        text, choice = ASKED[number]
        read = [*engine.prompts.raw(text).tokens, *a[:at]]
        place = None if seed is None else Place(seed, choice, at)
        assert margin(engine.logits(read)[-1], place) < MARGIN, (text, a, b)
        near += 1
    return near


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(models, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    llama, qwen3, artifact = models
    cases = [str(llama), str(qwen3), str(artifact), f"{artifact}={PACKED}"]
    words = [str(script), str(tmp_path), json.dumps(PROMPTS), *cases]
    subprocess.run([sys.executable, *words], check=True, timeout=LIMIT_S)
    with started(tmp_path, *words) as processes:
        for rank, process in enumerate(processes):
            assert process.wait(LIMIT_S) == 0, said(tmp_path, rank)
    one, first, second = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", 0, 1)
    )
    assert first == second
    total = near = 0
    for case in cases:
        kind = "QuantizedShardedToAllLinear" if "=" in case else "ShardedToAllLinear"
        assert kind in first[f"{case} layers"]
        assert kind not in one[f"{case} layers"]
        np.testing.assert_allclose(first[f"{case} embedding"], one[f"{case} embedding"], atol=1e-4)
        assert first[f"{case} unseeded"] != first[f"{case} sampled"]
        folder = case.partition("=")[0]
        for kind, seed in (("greedy", None), ("sampled", SEED)):
            before, after = one[f"{case} {kind}"], first[f"{case} {kind}"]
            near += different(folder, before, after, seed)
            total += len(before)
    assert near <= MOST_DIFFERENT * total + 1


# -- what cannot be shared -----------------------------------------------------------------------


def test_alone_everything_is_as_it_was():
    numbers = mx.array([3, 1])
    assert ranks.count() == 1
    assert ranks.of_first(numbers) is numbers
    assert ranks.least(7) == 7
    assert ranks.fresh_seed() != ranks.fresh_seed()
    ranks.refuse_drafter("ngram")


class Pretended:
    """A group of so many ranks, which nobody reaches."""

    def __init__(self, count):
        self._count = count

    def size(self):
        return self._count


@pytest.mark.parametrize("wrapped", [False, True])
def test_heads_that_do_not_divide_are_refused(monkeypatch, wrapped):
    monkeypatch.setattr(ranks, "group", lambda: Pretended(4))
    config = tiny_config()
    tree = upstream.build_model(config)
    with pytest.raises(UsageError, match=r"2 heads \(num_key_value_heads .*4 ranks"):
        ranks.shard(tree, {"text_config": config} if wrapped else config)


def test_a_drafter_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(UsageError, match="drafter 'ngram' cannot be used by 2 ranks"):
        ranks.refuse_drafter("ngram")


def test_a_family_that_mlx_lm_does_not_share_out_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "group", mx.distributed.init)
    tree = upstream.build_model(tiny_config("gemma3_text"))
    with pytest.raises(UnsupportedModel, match="tensor parallelism for mlx_lm.models.gemma3_text"):
        ranks.shard(tree, {})


def test_sizes_that_do_not_divide_are_refused(monkeypatch):
    class Uneven(nn.Module):
        def shard(self, group):
            raise ValueError("Cannot shard the output of size 3 across 2 devices.")

    monkeypatch.setattr(ranks, "group", mx.distributed.init)
    with pytest.raises(UsageError, match=r"output of size 3.*start fewer"):
        ranks.shard(Uneven(), {})
