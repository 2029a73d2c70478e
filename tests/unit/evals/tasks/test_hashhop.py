"""HashHop: chains that are right, prompts that never change, lengths that fit."""

import hashlib
import importlib.util
import random
import re
from collections import Counter

import numpy as np
import pytest

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import UsageError
from optiq.evals.task import Response
from optiq.evals.tasks.hashhop import HOPS, LENGTHS, TASK, prompt_chars

NO_DATA = BenchmarkData(None)
CONFIG = EvalConfig()
PUBLISHED = EvalConfig(hashhop_published=True)


def items_of(config):
    return TASK.dataset(NO_DATA, config)


def text_of(item, config=CONFIG):
    return TASK.solver(item, config).messages[0]["content"]


def test_a_thousand_chains_over_all_lengths_and_hops():
    items = items_of(CONFIG)
    assert len(items) == 1000
    cells = Counter((item.fields["chars"], item.fields["hops"]) for item in items)
    assert cells == {(chars, hops): 50 for chars in LENGTHS for hops in HOPS}


@pytest.mark.parametrize("config", [CONFIG, PUBLISHED], ids=["own", "published"])
def test_the_target_is_reached_in_the_steps_that_are_asked(config):
    for item in items_of(config)[::7]:
        pairs = dict(line.replace("'", "").split(" = ") for line in item.fields["lines"])
        assert len(pairs) == len(item.fields["lines"])
        found = item.fields["start"]
        for _ in range(item.fields["hops"]):
            found = pairs[found]
        assert found == item.fields["target"]
        assert found not in pairs  # the end of the chain
        assert re.fullmatch(r"[A-Za-z]{16}", found)


@pytest.mark.parametrize("config", [CONFIG, PUBLISHED], ids=["own", "published"])
def test_prompts_have_about_the_length_they_name(config):
    for item in items_of(config):
        length = item.fields["chars"]
        assert length <= len(text_of(item)) <= prompt_chars(length, config)


def test_prompts_never_change():
    digests = [
        hashlib.sha256(text_of(items_of(config)[99]).encode()).hexdigest()[:16]
        for config in (CONFIG, PUBLISHED)
    ]
    assert digests == GOLDEN


def test_another_seed_gives_other_chains_under_other_names():
    first, second = items_of(EvalConfig(limit=20)), items_of(EvalConfig(limit=20, seed=1))
    assert not {item.id for item in first} & {item.id for item in second}
    assert not {i.fields["target"] for i in first} & {i.fields["target"] for i in second}


def test_lengths_beyond_the_limit_are_left_out_and_the_version_says_so():
    limit = EvalConfig(hashhop_max_chars=prompt_chars(2000, CONFIG))
    assert {item.fields["chars"] for item in items_of(limit)} == {1000, 2000}
    assert TASK.full_version(limit) == "1+to-2000"
    wide = EvalConfig(hashhop_max_chars=prompt_chars(16_000, CONFIG))
    assert len(items_of(wide)) == 1000
    assert TASK.full_version(wide) == TASK.full_version(CONFIG) == "1"


def test_a_limit_that_nothing_fits_into():
    with pytest.raises(UsageError, match="no HashHop list fits into 900 characters"):
        items_of(EvalConfig(hashhop_max_chars=900))


def test_the_published_hundred():
    items = items_of(PUBLISHED)
    assert Counter(item.fields["hops"] for item in items) == {1: 25, 2: 25, 3: 25, 4: 25}
    assert {item.fields["chars"] for item in items} == {12_000}
    assert TASK.full_version(PUBLISHED) == "1+published"
    short = EvalConfig(hashhop_published=True, hashhop_max_chars=12_000)
    with pytest.raises(UsageError, match="no HashHop list fits"):
        items_of(short)


@pytest.mark.assets
def test_the_published_form_is_that_of_its_authors_generator(shared):
    path = shared / "assets" / "eval" / "hashhop" / "generate.py"
    spec = importlib.util.spec_from_file_location("hashhop_generate", path)
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    for item in items_of(PUBLISHED)[::9]:
        seed = int(item.id.rpartition("-")[2])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the generator draws from it
        problem = official.MultiHopEval.make_one(
            item.fields["chars"], 1, item.fields["hops"], 16, chain_of_thought=False
        )
        assert "\n".join(item.fields["lines"]) == problem.prompt
        assert next(iter(problem.targets.items())) == (item.fields["start"], item.fields["target"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{target}", 1.0),
        ("The hash is '{target}'.", 1.0),
        ("{start} -> {target}", 1.0),
        ("{target} is where {start} leads", 0.0),
        ("{target}x", 0.0),
        ("{lower}", 0.0),
        ("none", 0.0),
    ],
)
def test_the_last_hash_counts_exactly(text, value):
    item = items_of(EvalConfig(limit=1))[0]
    start, target = item.fields["start"], item.fields["target"]
    answer = text.format(start=start, target=target, lower=target.lower())
    assert TASK.scorer(item, Response(answer), CONFIG).value == value


GOLDEN = ["64e97929684f07ce", "ec3498039e961c43"]
