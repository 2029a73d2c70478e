"""Keys and values in few bits: the laws of the cache, answers, memory, and what is refused."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optiq
from optiq.backend import mx
from optiq.configs import KV_BITS, ServeConfig
from optiq.engine.drafters.gemma4_assistant import AssistantDrafter
from optiq.engine.engine import EngineOptions
from optiq.engine.kv_cache import KeyValueCache, SequenceCache
from optiq.engine.kv_coding import Quantized
from optiq.engine.loop import Loop
from optiq.engine.prefix_cache import PrefixCache
from optiq.engine.scheduler import Limits
from optiq.engine.store import Cost, Storage
from optiq.engine.target import Gemma4Target, kv_note
from optiq.errors import UnsupportedModel, UsageError
from optiq.events import Notice
from optiq.models.families.gemma4_assistant import Gemma4Drafter
from optiq.server.life import options_of
from optiq.upstream import ArraysCache, RotatingKVCache
from tests import gemma4
from tests.drafters import Forced
from tests.engine import CONFIGS, Silent, read, request, tiny_target, written
from tests.tiny import VOCAB, tiny_checkpoint

MIXED = list(zip(sorted(CONFIGS), itertools.cycle(KV_BITS)))
SCALE = 4.0
KEY, VALUE = 64, 96  # groups of 64, and of 32


# -- the cache: what goes in comes out as quantized by itself -------------------------------------


def rounded(x, bits):
    group = 64 if x.shape[-1] % 64 == 0 else 32
    return mx.dequantize(*mx.quantize(x, group, bits), group, bits)


def exact(found, expected, bits):
    for side, true in zip(found, expected, strict=True):
        assert mx.array_equal(side, rounded(true, bits)).item()
        assert not mx.array_equal(side, true).item()


def new_columns(rng, rows, count):
    shape = (rows, 2, count)
    keys, values = (mx.array(rng.normal(size=(*shape, dim)), mx.float32) for dim in (KEY, VALUE))
    return keys, values


class Model:
    """A cache and the texts that it should hold, column by column."""

    def __init__(self, bits, rng):
        self.bits, self.rng = bits, rng
        self.cache = KeyValueCache(coding=Quantized(bits))
        self.true = [tuple(mx.zeros((1, 2, 0, dim)) for dim in (KEY, VALUE))]

    def append(self, count):
        new = new_columns(self.rng, len(self.true), count)
        self.true = [
            tuple(mx.concatenate([old, n[i : i + 1]], 2) for old, n in zip(text, new, strict=True))
            for i, text in enumerate(self.true)
        ]
        found = self.cache.update_and_fetch(*new)
        for i, (text, length) in enumerate(zip(self.true, self.cache.lengths, strict=True)):
            own = tuple(side[i : i + 1, :, side.shape[2] - length :] for side in found)
            exact(own, text, self.bits)

    def trim(self, counts):
        self.cache.trim(counts)
        self.true = [
            tuple(side[:, :, : side.shape[2] - n] for side in text)
            for text, n in zip(self.true, counts, strict=True)
        ]

    def check(self):
        for i, text in enumerate(self.true):
            exact(self.cache.rows([i]).last(None), text, self.bits)


@pytest.mark.parametrize("bits", KV_BITS)
@settings(max_examples=20)
@given(
    parts=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 9)), min_size=1, max_size=5),
    others=st.lists(st.integers(1, 40), max_size=3),
    seed=st.integers(0, 99),
)
def test_append_trim_join_and_part_are_those_of_a_plain_cache(bits, parts, others, seed):
    rng = np.random.default_rng(seed)
    one = Model(bits, rng)
    for count, back in parts:
        one.append(count)
        one.trim([min(back, count - 1)])
        one.check()
    rest = [Model(bits, rng) for _ in others]
    for model, count in zip(rest, others, strict=True):
        model.append(count)
    batch = Model(bits, rng)
    batch.cache = KeyValueCache.join([m.cache for m in (one, *rest)])
    batch.true = [m.true[0] for m in (one, *rest)]
    for step in range(3):
        batch.append(2)
        batch.trim([(step + i) % 3 for i in range(len(batch.true))])
        batch.check()
    copy = batch.cache.rows([0]).fork()
    batch.append(1)
    exact(copy.last(None), [side[:, :, :-1] for side in batch.true[0]], bits)


@pytest.mark.parametrize("bits", KV_BITS)
def test_pieces_are_put_together_again(bits):
    one = Model(bits, np.random.default_rng(0))
    one.append(30)
    pieces = [one.cache.piece(0, 11), one.cache.piece(11, 30)]
    again = KeyValueCache(coding=Quantized(bits))
    again.fill(pieces, 30)
    exact(again.last(None), one.true[0], bits)


@pytest.mark.parametrize(("bits", "share"), [(8, (8 + 1) / 32), (4, (4 + 1) / 32)])
def test_bytes_are_those_of_codes_scales_and_biases(bits, share):
    caches = KeyValueCache(), KeyValueCache(coding=Quantized(bits))
    one = mx.ones((1, 2, 1, 64))
    for cache in caches:
        cache.update_and_fetch(one, one)
    plain, packed = caches
    assert packed.column_bytes == share * plain.column_bytes
    assert packed.nbytes == share * plain.nbytes


# -- answers -------------------------------------------------------------------------------------


def asked_for():
    rng = np.random.default_rng(2)
    return [
        request(rng.integers(0, VOCAB, 1 + 9 * n).tolist(), 5 + 3 * n, seed=n, temperature=n % 2)
        for n in range(6)
    ]


@pytest.mark.parametrize(("kind", "bits"), MIXED)
def test_answers_are_the_same_alone_in_a_batch_and_with_drafts(kind, bits):
    target = tiny_target(kind, scale=SCALE, kv_bits=bits)
    asked = asked_for()
    alone = [written(Loop(target), each)[0] for each in asked]
    assert written(Loop(target, limits=Limits(8, 7)), *asked) == alone
    for each, answer in zip(asked, alone, strict=True):
        drafter = Forced({each.tokens: answer}, 0.6, VOCAB)
        assert written(Loop(target, drafter=drafter), each)[0] == answer


@pytest.mark.parametrize(("kind", "bits"), MIXED)
def test_kept_and_lost_pasts_change_no_answer(kind, bits):
    """Prompts go on from others while memory is too small for all of them."""
    target = tiny_target(kind, scale=SCALE, kv_bits=bits)
    first = list(range(40))
    asked = [request([*first[:n], *range(n)], 30, seed=n) for n in (40, 33, 12, 40)]
    alone = [written(Loop(target), each)[0] for each in asked]
    cost = Cost.of(target, 0, 16)
    storage = Storage(memory_bytes=2 * cost(500), prefix_bytes=2 * cost(500), least_gain=1)
    loop = Loop(target, limits=Limits(8, 16), storage=storage)
    assert written(loop, *asked) == alone
    sequences = [loop.add(each, Silent()) for each in asked]
    while not loop.idle:
        loop.step()
    assert [s.tokens[len(s.request.tokens) :] for s in sequences] == alone
    assert sequences[0].cached >= 32


@pytest.mark.parametrize("bits", KV_BITS)
def test_kept_pasts_are_counted_as_they_are_held(bits):
    """Full layers alone: a token takes what the cost of the model says."""
    target = tiny_target("full", kv_bits=bits)
    plain = tiny_target("full", wide=True)
    sizes = []
    for each in (target, plain):
        cache, prefixes = each.make_cache(), PrefixCache(1 << 26)
        read(each, cache, list(range(50)))
        prefixes.insert("", np.arange(50), cache)
        assert prefixes.nbytes == 50 * sum(Cost.of(each, 0, 0).column_bytes.values())
        sizes.append(prefixes.nbytes)
    assert sizes[0] == sizes[1] * (bits + 2) / 32  # a float32 scale and bias for 32 numbers


def test_a_drafter_that_reads_keys_is_given_them():
    """Gemma-4's assistant drafts from the same keys that the target attends to."""
    target = Gemma4Target(gemma4.target(), 8)
    assistant = Gemma4Drafter(gemma4.assistant(), target.model)
    drafter = AssistantDrafter(assistant, gemma4.SUPPRESSED)
    for n in range(3):
        each = request(range(10 * n + 2, 20 * n + 9), 24, temperature=0, num_drafts=4)
        plain = written(Loop(target, gemma4.SUPPRESSED), each)
        loop = Loop(target, gemma4.SUPPRESSED, drafter)
        sequence = loop.add(each, Silent())
        while not loop.idle:
            loop.step()
        assert sequence.error is None
        assert sequence.report.drafted > 0
        assert [sequence.tokens[len(each.tokens) :]] == plain


# -- how much it costs ---------------------------------------------------------------------------


def divergence(right, other):
    """Mean KL of rows of logits, in nats a token."""
    first, second = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (right, other))
    return float((mx.exp(first) * (first - second)).sum(-1).mean())


@pytest.mark.parametrize(("bits", "bound"), [(8, 1e-4), (4, 0.05)])
def test_distributions_are_close_to_those_of_the_plain_cache(bits, bound):
    tokens = np.random.default_rng(0).integers(0, VOCAB, 200).tolist()
    plain, packed = (
        read(each, each.make_cache(), tokens)
        for each in (tiny_target("full", wide=True), tiny_target("full", kv_bits=bits))
    )
    assert 0 < divergence(plain, packed) < bound


# -- options -------------------------------------------------------------------------------------


def test_a_notice_says_which_layers_hold_what(tmp_path):
    notices = []
    folder = tiny_checkpoint(tmp_path, "gemma3_text")
    engine = optiq.load(folder, options=EngineOptions(kv_bits=8), emit=notices.append)
    texts = [event.text for event in notices if isinstance(event, Notice)]
    # heads of 32: 32 bytes of codes, a float32 scale and a bias, instead of 128; 2 x 2 of them
    wanted = "8 bits in layers of full attention (1), 160 bytes a token instead of 512"
    assert any(wanted in text and text.endswith("as they are: sliding (2)") for text in texts)
    answer = engine.generate("Hello", temperature=0, max_tokens=8, logit_bias={258: -100}).result()
    assert answer.usage.completion_tokens == 8


def test_what_cannot_be_honoured_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match="kv_bits is 3"):
        EngineOptions(kv_bits=3)
    with pytest.raises(UsageError, match="--kv-bits is 16; give 8 or 4"):
        ServeConfig(kv_bits=16)
    odd = tiny_checkpoint(tmp_path, "llama", head_dim=40)
    with pytest.raises(UnsupportedModel, match="heads of 40 numbers"):
        optiq.load(odd, options=EngineOptions(kv_bits=4))
    with pytest.raises(UnsupportedModel, match="kv_bits 8 would change nothing"):
        kv_note(Windows(), 8)


class Windows:
    """A target none of whose layers sees all."""

    vocab_size, image_token_id = VOCAB, None

    def make_cache(self, slack=0):
        return SequenceCache([RotatingKVCache(max_size=8), ArraysCache(1)], slack, 8)

    def states(self, tokens, cache, features=None):
        del features
        columns = mx.ones((*tokens.shape, 1, 64))
        return cache.attention[0].update_and_fetch(columns, columns)[0]


def test_the_server_passes_it_on():
    assert options_of(ServeConfig(kv_bits=4)).worker.engine["kv_bits"] == 4
    assert options_of(ServeConfig()).worker.engine["kv_bits"] is None
