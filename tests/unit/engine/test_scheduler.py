"""What a step holds; no arrays are needed."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from optiq.engine.scheduler import Limits, Scheduler, Step


def test_prompts_are_read_first_come_first_served_beside_decoding():
    scheduler = Scheduler(Limits(running=2, prefill_tokens=10))
    scheduler.add(1, [])
    scheduler.add(2, [10, 10])
    scheduler.add(3, [4])
    assert scheduler.num_waiting == 3
    assert scheduler.next() == Step(prefill=(2,), decode=(1,))
    assert scheduler.num_waiting == 1
    assert scheduler.next() == Step(prefill=(2,), decode=(1,))
    scheduler.remove(1)
    assert scheduler.next() == Step(prefill=(3,), decode=(2,))
    assert scheduler.next() == Step(prefill=(), decode=(2, 3))
    scheduler.remove(2)
    scheduler.remove(3)
    assert scheduler.idle


def test_short_prompts_share_a_step_and_a_long_chunk_is_alone():
    scheduler = Scheduler(Limits(prefill_tokens=10))
    for number, chunks in enumerate([[4], [4], [4], [30]]):
        scheduler.add(number, chunks)
    assert scheduler.next().prefill == (0, 1)
    assert scheduler.next().prefill == (2,)
    assert scheduler.next().prefill == (3,)


@given(
    st.lists(st.lists(st.integers(1, 20), max_size=5), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 25),
)
def test_everyone_gets_there(prompts, running, budget):
    """No chunk is lost or read twice, no step is over its limits, nobody writes before reading."""
    scheduler = Scheduler(Limits(running, budget))
    for number, chunks in enumerate(prompts):
        scheduler.add(number, chunks)
    left = {number: list(chunks) for number, chunks in enumerate(prompts)}
    finished = []
    for _ in range(200):
        if scheduler.idle:
            break
        step = scheduler.next()
        assert len({*step.prefill, *step.decode}) <= running
        assert all(not left[number] for number in step.decode)
        sizes = [left[number].pop(0) for number in step.prefill]
        assert sum(sizes) <= budget or len(sizes) == 1
        for number in step.decode:
            scheduler.remove(number)
            finished.append(number)
    assert sorted(finished) == list(range(len(prompts)))


def test_it_imports_no_arrays():
    code = "import sys, optiq.engine.scheduler; assert 'mlx.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
