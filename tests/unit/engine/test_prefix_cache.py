"""Pasts that are kept: the tree itself, and answers with it against answers without."""

import numpy as np
import pytest

from optiq.backend import mx
from optiq.engine.drafters.gemma4_assistant import AssistantDrafter
from optiq.engine.drafters.ngram import NgramDrafter
from optiq.engine.loop import Loop
from optiq.engine.prefix_cache import IMAGE_KEYS, PrefixCache, needs_snapshots
from optiq.engine.scheduler import Limits
from optiq.engine.store import Cost, Storage
from optiq.engine.target import Gemma4Target
from optiq.models.families.gemma4_assistant import Gemma4Drafter
from tests import gemma4
from tests.engine import CONFIGS, Silent, read, request, tiny_target, uncached, written
from tests.tiny import VOCAB

KINDS = sorted(CONFIGS)
SCALE = 4.0
MARGIN = 1e-3
PLENTY = 1 << 26


def keys(*parts):
    return np.array([x for part in parts for x in part], dtype=np.int64)


def past_of(kind, tokens):
    target = tiny_target(kind)
    cache = target.make_cache()
    read(target, cache, tokens)
    return cache


def hit(prefixes, kind, tokens, limit=None):
    """What is found, checked against a cold run of the whole text."""
    target = tiny_target(kind)
    cache = target.make_cache()
    limit = len(tokens) - 1 if limit is None else limit
    found = prefixes.find("", keys(tokens), limit, cache)
    assert found.length <= found.matched <= limit
    if found.past is not None:
        found.past.put(cache)
    assert cache.length == found.length
    logits = read(target, cache, tokens[found.length :])
    assert mx.abs(logits - uncached(target, tokens)[found.length :]).max().item() < 1e-3
    return found


A, B, C = list(range(20)), list(range(50, 70)), list(range(90, 100))


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_beginning_is_found(kind):
    prefixes = PrefixCache(PLENTY)
    snapshots = needs_snapshots(tiny_target(kind).make_cache())
    assert hit(prefixes, kind, A).length == 0
    prefixes.insert("", keys(A, B), past_of(kind, A + B))
    assert hit(prefixes, kind, A + B + C).length == 40
    assert hit(prefixes, kind, A + C).matched == 20
    assert hit(prefixes, kind, A + C).length == (0 if snapshots else 20)
    assert hit(prefixes, kind, A + B).length == (0 if snapshots else 39)
    prefixes.insert("", keys(A, C), past_of(kind, A + C))
    prefixes.insert("", keys(A), past_of(kind, A))
    for rest, length in ((B + C, 40), (C + B, 30), ([7] * 5, 20)):
        assert hit(prefixes, kind, A + rest).length == length
    assert hit(prefixes, kind, A + B + C, limit=33).length == (20 if snapshots else 33)
    assert prefixes.find("other", keys(A, B), 39, past_of(kind, A)).length == 0


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_arrays_and_within_the_cap(kind):
    cost = Cost.of(tiny_target(kind), 0, 0)
    held = cost.fixed_bytes + sum(
        size * (40 if most is None else most) for most, size in cost.column_bytes.items()
    )
    prefixes = PrefixCache(3 * held)
    rng = np.random.default_rng(0)
    for _ in range(30):
        start = A[: rng.integers(21)]
        text = [*start, *rng.integers(0, VOCAB, rng.integers(1, 21)).tolist()]
        prefixes.insert("", keys(text), past_of(kind, text))
        found = {id(x): x.nbytes for item in prefixes._ages for x in item.arrays}
        assert prefixes.nbytes == sum(found.values()) <= prefixes.capacity_bytes
        hit(prefixes, kind, [*text, 3])
    prefixes.shrink(0)
    assert prefixes.nbytes == len(prefixes._ages) == 0
    assert not prefixes._roots[""].children


@pytest.mark.parametrize("kind", KINDS)
def test_a_hit_renews(kind):
    texts = [[n] * 30 for n in range(4)]
    prefixes = PrefixCache(PLENTY)
    for text in texts[:3]:
        prefixes.insert("", keys(text), past_of(kind, text))
    prefixes.capacity_bytes = prefixes.nbytes
    assert hit(prefixes, kind, [*texts[0], 9]).length == 30
    prefixes.insert("", keys(texts[3]), past_of(kind, texts[3]))
    assert [hit(prefixes, kind, [*text, 9]).length for text in texts] == [30, 0, 30, 30]


def test_what_is_larger_than_the_cap_is_not_kept_and_drives_nothing_out():
    prefixes = PrefixCache(PLENTY)
    prefixes.insert("", keys(A), past_of("full", A))
    prefixes.capacity_bytes = prefixes.nbytes
    prefixes.insert("", keys(A, B), past_of("full", A + B))
    assert hit(prefixes, "full", [*A, 3]).length == 20


def test_no_text_ends_within_an_image():
    image = [IMAGE_KEYS + 5] * 6
    prefixes = PrefixCache(PLENTY)
    prefixes.insert("", keys(A, image, B), past_of("full", A + [1] * 6 + B))
    empty = tiny_target("full").make_cache()
    assert prefixes.find("", keys(A, image, C), 23, empty).length == 20
    assert prefixes.find("", keys(A, image, C), 26, empty).length == 26
    assert prefixes.find("", keys(A, [IMAGE_KEYS + 6] * 6, C), 30, empty).length == 20


# -- in the loop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_prompt_reads_its_last_token_alone(kind):
    target = tiny_target(kind, scale=SCALE)
    loop = Loop(target, storage=Storage(prefix_bytes=PLENTY))
    asked = [request(A + B, 5, temperature=0) for _ in range(3)]
    expected = written(Loop(target), asked[0])[0]
    seen = []
    for each in (asked[0], asked[1], request([*A, *B, *expected, 3], 5)):
        sequence = loop.add(each, Silent())
        while not loop.idle:
            loop.step()
        seen.append(sequence.events[-1].usage.cached_tokens)
        if each.tokens == tuple(A + B):
            assert sequence.tokens[40:] == expected
    assert seen == [0, 39, 44]


def conversation(rng, loop, ask):
    """Requests that begin like one another: more turns, other turns, the same again."""
    texts = [rng.integers(0, VOCAB, rng.integers(2, 20)).tolist()]
    for _ in range(3):
        group = []
        for _ in range(rng.integers(1, 4)):
            text = texts[rng.integers(len(texts))]
            at = rng.integers(1, len(text) + 1) if rng.random() < 0.4 else len(text)
            more = rng.integers(0, VOCAB, rng.integers(0, 8)).tolist()
            marks = (int(rng.integers(0, at + 1)),)
            asked = ask([*text[:at], *more], seed=int(rng.integers(9)), marks=marks)
            group.append((asked, loop.add(asked, Silent())))
        while not loop.idle:
            loop.step()
        texts += [sequence.tokens for _, sequence in group]
        yield from group


def compare(target, loop, trees, ask, seed=0):
    """Answers that differ at a clear margin, those that rounding decides, and hits."""
    rng = np.random.default_rng(seed)
    wrong, near, count, cached = [], 0, 0, 0
    for _ in range(trees):
        for asked, sequence in conversation(rng, loop, ask):
            assert sequence.error is None
            cold = written(Loop(target), asked)[0]
            warm = sequence.tokens[len(asked.tokens) :]
            count += 1
            cached += sequence.events[-1].usage.cached_tokens
            if cold == warm:
                continue
            at = next(i for i in range(len(cold)) if cold[i] != warm[i])
            best = np.sort(np.array(uncached(target, [*asked.tokens, *cold[:at]])[-1]))
            close = best[-1] - best[-2] < MARGIN
            near += close
            wrong += [] if close else [(asked, at)]
    assert not wrong
    assert near <= 0.005 * count
    assert cached > 2 * count
    return loop


def greedy(tokens, seed, marks):
    del seed
    return request(tokens, 3, temperature=0, marks=marks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "trees", [8, pytest.param(100, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_trees_of_conversations(kind, trees):
    """Forty in all, or five hundred: with pasts that are kept and driven out, and without."""
    target = tiny_target(kind, scale=SCALE)
    room = 12 * Cost.of(target, 0, 0)(30) // 8
    storage = Storage(prefix_bytes=room, least_gain=2)
    loop = Loop(target, limits=Limits(8, 8), storage=storage)
    compare(target, loop, trees, greedy)
    assert 0 < loop.store.prefixes.nbytes <= room


@pytest.mark.parametrize("drafter", ["ngram", "assistant"])
def test_trees_of_conversations_with_a_drafter(drafter):
    """Gemma-4's reads keys and values of the target, which come out of the tree."""
    model = gemma4.target()
    target = Gemma4Target(model)
    assistant = AssistantDrafter(Gemma4Drafter(gemma4.assistant(), model))
    chosen = assistant if drafter == "assistant" else NgramDrafter()
    loop = Loop(target, (), chosen, storage=Storage(prefix_bytes=PLENTY, least_gain=2))

    def ask(tokens, seed, marks):
        del seed
        return request([t % 256 for t in tokens], 4, temperature=0, marks=marks, num_drafts=2)

    compare(target, loop, 2, ask)


def test_pasts_that_are_kept_give_way_to_sequences_that_run():
    target = tiny_target("sliding", scale=SCALE)
    cost = Cost.of(target, 0, 512)
    storage = Storage(memory_bytes=2 * cost(400), prefix_bytes=2 * cost(400))
    loop = Loop(target, storage=storage)
    for number in range(6):
        written(loop, request([number] * 200, 2))
    before = loop.store.prefixes.nbytes
    assert before > cost(200) // 2
    begun = [loop.add(request([9, n], 5, seed=n), Silent()) for n in range(2)]
    while not loop.idle:
        loop.step()
        if loop._scheduler.needed_bytes:
            room = storage.memory_bytes - loop._scheduler.needed_bytes
            assert loop.store.prefixes.nbytes <= room
    assert not loop._scheduler.num_waiting
    expected = [written(Loop(target), request([9, n], 5, seed=n))[0] for n in range(2)]
    assert [s.tokens[2:] for s in begun] == expected
