"""What a step holds; no arrays are needed."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiq.engine.scheduler import GROWTH, Limits, Memory, Scheduler, Step


def scheduler_of(prompts, limits=None, memory=None):
    """A scheduler of sequences by number, with the chunks of each."""
    scheduler = Scheduler(prompts.__getitem__, limits, memory)
    for number, chunks in prompts.items():
        scheduler.add(number, sum(chunks) + 1)
    return scheduler


def test_prompts_are_read_first_come_first_served_beside_decoding():
    scheduler = scheduler_of({1: [], 2: [10, 10], 3: [4]}, Limits(running=2, prefill_tokens=10))
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
    scheduler = scheduler_of({0: [4], 1: [4], 2: [4], 3: [30]}, Limits(prefill_tokens=10))
    assert scheduler.next().prefill == (0, 1)
    assert scheduler.next().prefill == (2,)
    assert scheduler.next().prefill == (3,)


def test_the_youngest_gives_way_and_comes_back_as_it_was():
    memory = Memory(3 * (600 + GROWTH), lambda tokens: tokens)
    scheduler = scheduler_of({0: [299], 1: [], 2: [299]}, memory=memory)
    assert scheduler.next() == Step(prefill=(0,), decode=(1,))
    assert scheduler.next() == Step(prefill=(2,), decode=(0, 1))
    scheduler.grown(1, 600)
    assert scheduler.next() == Step(decode=(0, 1, 2))
    scheduler.grown(1, 601)
    assert scheduler.next() == Step(decode=(0, 1), preempted=(2,))
    assert scheduler.next() == Step(decode=(0, 1))
    scheduler.remove(1)
    assert scheduler.next() == Step(decode=(0,), prefill=(2,))
    assert scheduler.next() == Step(decode=(0, 2))


def test_followers_take_over_what_their_leader_has_read():
    scheduler = Scheduler({0: [4, 4], 3: [4]}.__getitem__, Limits(prefill_tokens=4))
    scheduler.add(0, 9)
    scheduler.add(1, 9, leader=0)
    scheduler.add(2, 9, leader=0)
    scheduler.add(3, 5)
    assert scheduler.next() == Step(prefill=(0,))
    assert scheduler.next() == Step(prefill=(0,))
    assert scheduler.next() == Step(prefill=(3,), decode=(0, 1, 2), forks=((0, 1), (0, 2)))
    assert scheduler.next() == Step(decode=(0, 1, 2, 3))


def test_a_follower_without_its_leader_reads_itself():
    scheduler = Scheduler(lambda _: [4, 4], Limits(running=2, prefill_tokens=4))
    for number, leader in enumerate([None, 0, 0]):
        scheduler.add(number, 9, leader)
    assert scheduler.next() == Step(prefill=(0,))
    scheduler.remove(0)
    assert scheduler.next() == Step(prefill=(1,))
    assert scheduler.next() == Step(prefill=(1,))
    assert scheduler.next() == Step(prefill=(2,), decode=(1,))


class Replay:
    """Sequences that do what a scheduler says, and what must hold.

    Every one has tokens to read and to write, and may share its prompt with the one before it. What
    was put back reads all of its tokens again.
    """

    def __init__(self, asked, limits, spare):
        self.lengths = {n: size for n, (size, _, _) in enumerate(asked)}
        self.leaders = {n: n - 1 for n, (_, _, follows) in enumerate(asked) if n and follows}
        for number, leader in self.leaders.items():
            self.lengths[number] = self.lengths[leader]
        self.ends = {n: self.lengths[n] + count for n, (_, count, _) in enumerate(asked)}
        self.left = {}
        self.memory = None
        longest = max(self.ends.values())
        if spare is not None:
            self.memory = Memory(longest + GROWTH + spare, lambda tokens: tokens)
            assert self.memory.longest() >= longest
        self.scheduler = Scheduler(self.begin, limits, self.memory)
        for number, length in self.lengths.items():
            self.scheduler.add(number, length, self.leaders.get(number))
        self.pending = list(self.lengths)

    def begin(self, number):
        size = self.lengths[number] - 1
        self.left[number] = [7] * (size // 7) + ([size % 7] if size % 7 else [])
        return tuple(self.left[number])

    def step(self, random):
        step = self.scheduler.next()
        limits = self.scheduler.limits
        assert len({*step.prefill, *step.decode}) <= limits.running
        assert self.pending[0] in {*step.prefill, *step.decode}
        assert self.pending[0] not in step.preempted
        for number in step.preempted:
            self.left.pop(number, None)
        for leader, follower in step.forks:
            assert not self.left[leader]
            assert self.lengths[leader] == self.lengths[follower]
            self.left[follower] = []
        assert not any(self.left[number] for number in step.decode)
        sizes = [self.left[number].pop(0) for number in step.prefill]
        assert sum(sizes) <= limits.prefill_tokens or len(sizes) == 1
        for number in step.decode:
            self.grow(number, random.randint(1, GROWTH))
        self.check_memory()
        gone = {n for n in step.decode if self.lengths[n] == self.ends[n]}
        self.remove(gone | {n for n in self.pending if random.random() < 0.001})  # or cancelled

    def grow(self, number, count):
        self.lengths[number] = min(self.lengths[number] + count, self.ends[number])
        self.scheduler.grown(number, self.lengths[number])

    def check_memory(self):
        running = self.scheduler._running
        assert running == self.pending[: len(running)]  # the oldest: nobody overtakes
        if self.memory:
            longest = max(self.lengths[number] for number in running)
            assert len(running) * longest <= self.memory.budget_bytes

    def remove(self, numbers):
        for number in numbers:
            self.scheduler.remove(number)
            self.pending.remove(number)


@given(
    st.lists(
        st.tuples(st.integers(1, 100), st.integers(1, 900), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.builds(Limits, st.integers(1, 5), st.integers(1, 25)),
    st.one_of(st.none(), st.integers(0, 4000)),
    st.randoms(use_true_random=False),
)
def test_everyone_gets_there(asked, limits, spare, random):
    """No chunk is lost, no step is over its limits, the oldest goes on, nobody overtakes."""
    replay = Replay(asked, limits, spare)
    for _ in range(100_000):
        if replay.scheduler.idle:
            break
        replay.step(random)
    assert not replay.pending


@pytest.mark.parametrize("budget", [0, GROWTH, GROWTH + 1, 100, 12345])
def test_the_longest_that_fits_alone(budget):
    memory = Memory(budget, lambda tokens: tokens)
    assert memory.longest() == max(0, budget - GROWTH)


def test_it_imports_no_arrays():
    code = "import sys, optiq.engine.scheduler; assert 'mlx.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
