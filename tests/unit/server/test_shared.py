"""What several ranks are refused, and the sockets between them."""

import queue
import socket
import threading
from pathlib import Path

import pytest

from optiq.configs import ServeConfig
from optiq.engine.scheduler import Limits
from optiq.errors import EngineFailure, UsageError
from optiq.events import no_emit
from optiq.server import shared
from optiq.server.catalog import Catalog, Entry
from optiq.server.jobs import DetokenizeJob, GenerateJob
from optiq.server.messages import Begin, Cancel, Setup, Turn, WorkerOptions
from optiq.server.ranks import Follower, Leader
from optiq.server.shelf import Shelf
from optiq.server.worker import Pipe
from tests.tiny import tiny_checkpoint

WAIT_S = 60
SECRET = bytes(range(shared.SECRET_BYTES))


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (2, {}, "2 models cannot be served under mlx.launch"),
        (1, {"drafter": "ngram"}, "--drafter ngram cannot be used under mlx.launch"),
        (1, {"idle_unload": 5.0}, r"--idle-unload 5.0 cannot be used under mlx.launch"),
    ],
)
def test_what_ranks_cannot_do_is_refused(count, options, message):
    catalog = Catalog(tuple(Entry(f"m{i}", Path(f"m{i}")) for i in range(count)))
    with pytest.raises(UsageError, match=message):
        shared.check(catalog, ServeConfig(**options))


def test_one_model_is_served():
    shared.check(Catalog((Entry("m", Path("m")),)), ServeConfig())


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def test_followers_are_known_by_the_secret_and_told_apart(listener):
    host, port = listener.getsockname()
    strangers = [socket.create_connection((host, port)) for _ in range(2)]
    strangers[0].sendall(bytes(shared.SECRET_BYTES + 2))
    strangers[1].close()
    others = [shared.joined(host, port, SECRET, rank) for rank in (2, 1)]
    ends = shared.gathered(listener, SECRET, 2)
    lost = queue.SimpleQueue()
    shared.watch(ends, lost.put)
    for rank, other in zip((2, 1), others, strict=True):
        other.close()
        assert lost.get(timeout=WAIT_S) == rank
    assert strangers[0].recv(1) == b""
    for end in (strangers[0], *ends):
        end.close()


def test_a_rank_that_does_not_come_is_missed(listener, monkeypatch):
    monkeypatch.setattr(shared, "_JOIN_S", 0.05)
    with pytest.raises(EngineFailure, match=r"0 of 1 ranks have come within 0.05 s"):
        shared.gathered(listener, SECRET, 1)


def test_a_leader_that_is_not_there_is_named(listener):
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(EngineFailure, match=f"rank 0 cannot be reached at 127.0.0.1:{port}"):
        shared.joined("127.0.0.1", port, SECRET, 1)


# -- turns ---------------------------------------------------------------------------------------


class Pair:
    """A leader and a follower, each with a whole model, in this process."""

    def __init__(self, folder):
        setup = Setup(Catalog.of([folder]).entries, WorkerOptions(limits=Limits(running=2)))
        self.ends = [*socket.socketpair(), *socket.socketpair()]
        near, self.far, ours, theirs = self.ends
        self.inbox, self.turns = queue.SimpleQueue(), queue.SimpleQueue()
        shelves = [Shelf(setup.entries, setup.options, no_emit, lambda name: None) for _ in "12"]
        self.leader = Leader(shelves[0], self.inbox, Pipe(near), [ours])
        self.follower = Follower(shelves[1], self.turns)
        self._heard = Pipe(theirs)
        threading.Thread(target=self._drain, daemon=True).start()
        self.leader.ready()
        self.follower.ready()

    def _drain(self):
        while self.far.recv(1 << 16):
            pass

    def turn(self):
        """One turn of both, and what the leader told."""
        self.leader.turn()
        self.turns.put(told := self._heard.receive())
        self.follower.turn()
        return told

    def sequences(self, worker):
        loop = worker._shelf.loaded[0].engine._loop
        return [(n, s.tokens) for n, s in loop._sequences.items()]


@pytest.fixture
def pair(tmp_path):
    found = Pair(tiny_checkpoint(tmp_path, "llama"))
    yield found
    for end in found.ends:
        end.close()


def job(number):
    return GenerateJob("llama", "abc " * number, sampling={"max_tokens": 6 + number}, choices=2)


def test_a_follower_does_what_the_leader_does(pair):
    for number in range(4):
        pair.inbox.put(Begin(number, job(number + 1)))
    pair.inbox.put(Begin(4, DetokenizeJob("llama", (65, 66))))
    pair.inbox.put(Cancel(1))
    seen = 0
    for turn in range(200):
        told = pair.turn()
        assert pair.sequences(pair.leader) == pair.sequences(pair.follower)
        seen = max(seen, len(pair.sequences(pair.leader)))
        if turn == 3:
            pair.inbox.put(Cancel(2))
        if not told.tasks and turn:
            break
        pair.inbox.put(Cancel(99))  # so that the leader need not wait at the end
    assert seen >= 4
    assert not pair.leader._tasks


def test_a_follower_that_does_something_else_says_so(pair):
    pair.turns.put(Turn((), (7,)))
    with pytest.raises(EngineFailure, match=r"rank 0 is doing the jobs \[7\] and this one \[\]"):
        pair.follower.turn()


def test_nothing_is_left_to_chance(pair):
    pair.inbox.put(Begin(0, job(1)))
    pair.inbox.put(Begin(1, GenerateJob("llama", "a", sampling={"seed": 3})))
    first, second = pair.turn().orders
    assert first.job.sampling["seed"] is not None
    assert second.job.sampling["seed"] == 3
