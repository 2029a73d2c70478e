"""What does a token cost beside the model: in the engine process, and in the HTTP process?

    python bench/serve_overhead.py [--tokens 300]

A tiny random model writes for several clients. In the engine process everything of a turn counts
that is not `Engine.step`: taking jobs, collecting events, packing and sending. In the HTTP process
all counts that brings the answers to their readers. Both are times of the processor, so that a busy
machine does not matter much. Prints JSON: microseconds per token and bytes through the pipe.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from optiq.events import no_emit
from optiq.server.catalog import Catalog
from optiq.server.jobs import GenerateJob
from optiq.server.messages import Begin, Message, Report, WorkerOptions, packed
from optiq.server.shelf import Shelf
from optiq.server.supervisor import Supervisor
from optiq.server.worker import Worker

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny import tiny_checkpoint

CLIENTS = (1, 4, 16, 32)


def job(model: str, number: int, tokens: int) -> GenerateJob:
    """The job of one client; the token that would end the answer is forbidden."""
    sampling = {"seed": number, "max_tokens": tokens, "logit_bias": {258: -100}}
    return GenerateJob(model, "Hello", sampling=sampling)


class Sink:
    """The pipe of a worker in this process, read to nowhere."""

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair()
        self.bytes, self.open = 0, 0
        self._socket = ours
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while self._theirs.recv(1 << 16):
            pass

    def send(self, message: Message) -> None:
        """Pack and send, and count."""
        if isinstance(message, Report):
            self.open -= sum(part.ended for part in message.parts)
        frame = packed(message)
        self.bytes += len(frame)
        self._socket.sendall(frame)


class Timed:
    """An engine that knows how long its steps took."""

    def __init__(self, engine: Any) -> None:  # noqa: ANN401
        self._engine, self.seconds = engine, 0.0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._engine, name)

    def step(self) -> None:
        """One step, and its time of the processor."""
        start = time.thread_time()
        self._engine.step()
        self.seconds += time.thread_time() - start


def engine_side(folder: Path, clients: int, tokens: int) -> dict[str, float]:
    """Owner thread of the engine process, without its steps."""
    sink, inbox = Sink(), queue.SimpleQueue()
    shelf = Shelf(Catalog.of([folder]).entries, WorkerOptions(), no_emit, lambda name: None)
    worker = Worker(shelf, inbox, sink.send)
    worker.ready()
    loaded = shelf.loaded[0]
    loaded.engine = timed = Timed(loaded.engine)
    sink.bytes, sink.open = 0, clients
    for number in range(clients):
        inbox.put(Begin(number, job(loaded.name, number, tokens)))
    start = time.thread_time()
    while sink.open:
        worker.turn()
    total = time.thread_time() - start
    return {
        "engine_us": (total - timed.seconds) / clients / tokens * 1e6,
        "step_us": timed.seconds / clients / tokens * 1e6,
        "pipe_bytes": sink.bytes / clients / tokens,
    }


async def http_side(folder: Path, clients: int, tokens: int) -> dict[str, float]:
    """This process, from the pipe to the readers."""
    supervisor = Supervisor(Catalog.of([folder]))
    await supervisor.start()

    async def read(number: int) -> None:
        async for _ in supervisor.submit(job(supervisor.resolve(None), number, tokens)):
            pass

    start = time.process_time()
    await asyncio.gather(*(read(number) for number in range(clients)))
    seconds = time.process_time() - start
    await supervisor.close()
    return {"http_us": seconds / clients / tokens * 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=300)
    tokens = parser.parse_args().tokens
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = tiny_checkpoint(Path(name), hidden_size=32, intermediate_size=32, head_dim=8)
        for clients in CLIENTS:
            engine = engine_side(folder, clients, tokens)
            http = asyncio.run(http_side(folder, clients, tokens))
            rows.append({"clients": clients} | engine | http)
    rows = [{key: round(value, 1) for key, value in row.items()} for row in rows]
    print(json.dumps({"tokens": tokens, "cpus": os.cpu_count(), "per_token": rows}, indent=2))


if __name__ == "__main__":
    main()
