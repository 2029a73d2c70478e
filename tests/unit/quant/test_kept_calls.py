"""What a backward pass reaches comes back as it was, from memory and from files."""

import numpy as np
import pytest

from optiq.backend import mx
from optiq.models.taps import Call
from optiq.quant.kept_calls import KeptCalls


def micro_batch(seed):
    mx.random.seed(seed)
    x, g = mx.random.normal((2, 5, 8)), mx.random.normal((2, 5, 6))
    other = Call("c", mx.random.normal((2, 5, 6)), indices=mx.array([[1]]), g=g + 2)
    return [Call("a", x, g=g), Call("b", x, g=g + 1), Call("unreached", x), other]


@pytest.mark.parametrize("in_memory", [0, 1000, 1 << 20])
def test_calls_come_back_in_bfloat16(tmp_path, in_memory):
    kept = KeptCalls(tmp_path, in_memory)
    batches = {first: micro_batch(first) for first in (0, 2, 4)}
    for first, calls in batches.items():
        kept.add(first, calls)
    assert len(list(tmp_path.iterdir())) == {0: 3, 1000: 2, 1 << 20: 0}[in_memory]
    assert kept.paths == ["a", "b", "c"]
    for at, path in ((0, "a"), (1, "b"), (3, "c")):
        for (first, call), (number, calls) in zip(kept.pop(path), batches.items(), strict=True):
            assert first == number
            assert call.path == path
            assert call.indices is calls[at].indices
            for name in ("x", "g"):
                expected = getattr(calls[at], name).astype(mx.bfloat16)
                assert getattr(call, name).dtype == mx.bfloat16
                assert np.array_equal(
                    np.array(getattr(call, name).astype(mx.float32)),
                    np.array(expected.astype(mx.float32)),
                )
    assert kept.paths == []
    kept.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_shared_inputs_are_kept_once(tmp_path, in_memory):
    kept = KeptCalls(tmp_path, in_memory)
    kept.add(0, micro_batch(0))
    (_, a), (_, b) = kept.pop("a")[0], kept.pop("b")[0]
    assert a.x is b.x
