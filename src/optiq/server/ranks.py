"""Engine processes that share a model: one leads, the others do the same in the same order.

A worker's turn depends on what it takes in and on nothing else that differs between ranks, see
`engine.ranks`. So the leader tells what it takes in, and fixes what would be drawn: seeds.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import queue
import secrets
import signal
import socket
import sys
import threading
from typing import Final, NoReturn

from optiq import settings
from optiq.engine import ranks
from optiq.errors import EngineFailure
from optiq.events import Emit, Notice
from optiq.server import messages, shared, worker
from optiq.server.jobs import GenerateJob
from optiq.server.messages import Begin, Broken, Message, Order, Setup, Turn
from optiq.server.shelf import Shelf
from optiq.server.worker import Pipe, Worker

_PORT_BYTES: Final = 2
_SEED_BITS: Final = 63


class _InStep(Worker):
    """A worker that depends on no clock."""

    def _is_enough(self, count: int, start: float) -> bool:
        del start
        return count > 0


class Leader(_InStep):
    """Tells others what it does.

    Args:
        shelf: see `Worker`.
        inbox: see there.
        pipe: to the process that started this one.
        followers: connections to the other ranks.
    """

    def __init__(
        self,
        shelf: Shelf,
        inbox: queue.SimpleQueue[Order],
        pipe: Pipe,
        followers: list[socket.socket],
    ) -> None:
        super().__init__(shelf, inbox, pipe.send)
        self._followers = followers

    def _received(self) -> list[Order]:
        orders = [_seeded(order) for order in super()._received()]
        _tell(self._followers, Turn(tuple(orders), tuple(self._tasks)))
        return orders


class Follower(_InStep):
    """Does what the leader does; nobody hears what comes of it.

    Args:
        shelf: see `Worker`.
        turns: of the leader.
    """

    def __init__(self, shelf: Shelf, turns: queue.SimpleQueue[Turn]) -> None:
        super().__init__(shelf, queue.SimpleQueue(), _unheard)
        self._turns = turns

    def _received(self) -> list[Order]:
        turn = self._turns.get()
        if turn.tasks != tuple(self._tasks):
            raise EngineFailure(
                f"rank 0 is doing the jobs {list(turn.tasks)} and this one {list(self._tasks)}; "
                "start all ranks again, with the same files and versions"
            )
        return list(turn.orders)


def _seeded(order: Order) -> Order:
    """An order that leaves nothing to chance."""
    if not isinstance(order, Begin) or not isinstance(order.job, GenerateJob):
        return order
    sampling = order.job.sampling
    if sampling.get("seed") is not None:
        return order
    seed = secrets.randbits(_SEED_BITS)
    job = dataclasses.replace(order.job, sampling={**sampling, "seed": seed})
    return dataclasses.replace(order, job=job)


def _tell(followers: list[socket.socket], message: Turn | Setup) -> None:
    frame = messages.packed(message)
    for rank, end in enumerate(followers, 1):
        try:
            end.sendall(frame)
        except OSError:
            raise _lost(rank) from None


def _unheard(message: Message) -> None:
    """Takes what only rank 0 reports."""


def _lost(rank: int) -> EngineFailure:
    return EngineFailure(f"rank {rank} of {ranks.count()} has ended; all have to be started again")


def lead(setup: Setup, inbox: queue.SimpleQueue[Order], pipe: Pipe) -> Worker:
    """The worker of rank 0, when the others have joined it.

    Raises:
        OptiqError: if what is to be served cannot be, or a rank does not come.
    """
    count = ranks.count()
    if count == 1:
        return Worker(worker.shelf_of(setup, pipe), inbox, pipe.send)
    secret, host = secrets.token_bytes(shared.SECRET_BYTES), settings.load().first_host
    with socket.create_server((host, 0)) as listener:
        port = int(listener.getsockname()[1])
        ranks.bytes_of_first(secret + port.to_bytes(_PORT_BYTES))
        followers = shared.gathered(listener, secret, count - 1)

    def end(rank: int) -> NoReturn:
        worker.send_last(pipe, Broken(_lost(rank)))
        os._exit(1)  # the owner may be waiting for that rank

    shared.watch(followers, end)
    _tell(followers, setup)
    return Leader(worker.shelf_of(setup, pipe), inbox, pipe, followers)


def follow(emit: Emit) -> NoReturn:
    """Be a rank that is not the first, until the first one ends; the process ends with it.

    Args:
        emit: receives notices.

    Raises:
        OptiqError: if what is to be served cannot be, or ranks disagree.
    """
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # MLX waits for others without Python
    said = ranks.bytes_of_first(bytes(shared.SECRET_BYTES + _PORT_BYTES))
    secret, port = said[: shared.SECRET_BYTES], int.from_bytes(said[shared.SECRET_BYTES :])
    found = settings.load()
    assert found.rank is not None
    pipe = Pipe(shared.joined(found.first_host, port, secret, found.rank))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 lets answers end, and then ends
    setup = pipe.receive()
    if not isinstance(setup, Setup):
        raise EngineFailure("rank 0 has ended before it said what to serve; look at its output")
    turns: queue.SimpleQueue[Turn] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, turns, emit), daemon=True).start()
    follower = Follower(Shelf(setup.entries, setup.options, emit, lambda name: None), turns)
    follower.ready()
    while True:
        follower.turn()


def _listen(pipe: Pipe, turns: queue.SimpleQueue[Turn], emit: Emit) -> None:
    """Put turns into the queue; the end of rank 0 is the end of the process."""
    while isinstance(turn := pipe.receive(), Turn):
        turns.put(turn)
    emit(Notice("rank 0 has ended, and so does this one"))
    os._exit(0)  # the owner may be waiting for rank 0


if __name__ == "__main__":
    worker.main(sys.argv[1:], lead)
