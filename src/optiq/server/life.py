"""Start, drain, stop.

The first SIGTERM or SIGINT closes the doors; what runs gets `drain` seconds, then its streams end
with an error event. The second ends everything at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import sys
from collections.abc import Callable, Generator
from typing import Final

import uvicorn

from optiq import settings
from optiq.configs import ServeConfig, parse_size
from optiq.engine.scheduler import Limits
from optiq.errors import UsageError
from optiq.events import Event, Notice
from optiq.server import shared
from optiq.server.access import LogFormatter
from optiq.server.app import App, create_app
from optiq.server.catalog import Catalog
from optiq.server.messages import WorkerOptions
from optiq.server.service import Managed
from optiq.server.supervisor import Supervisor, SupervisorOptions

EXIT_INTERRUPTED: Final = 130

_FLUSH_S: Final = 5
_KEEP_ALIVE_S: Final = 30


def run(config: ServeConfig, announce: Callable[[str], None]) -> int:
    """Serve models until a signal says to stop; see `serve`.

    Under `mlx.launch` all ranks run one model together, and rank 0 alone listens.

    Raises:
        UsageError: if a model cannot be served, or as `serve` does.
        EngineFailure: if the engine cannot start.
    """
    catalog = Catalog.of(config.model, config.alias, config.drafter)
    options, rank = options_of(config), settings.load().rank
    if rank is None:
        return serve(Supervisor(catalog, options, emit=_log_event), config, announce)
    shared.check(catalog, config)
    if rank > 0:
        log_to_stderr(as_json=config.log_json)
        shared.follow(_log_event)
    once = dataclasses.replace(options, restarts=0)  # the other ranks do not come back
    return serve(Supervisor(catalog, once, _log_event, shared.COMMAND), config, announce)


def options_of(config: ServeConfig) -> SupervisorOptions:
    """What the engine process and its supervisor are told."""
    engine = {
        "num_drafts": None if config.num_drafts == "auto" else int(config.num_drafts),
        "kv_bits": config.kv_bits,
        "prefix_memory": None if config.cache_limit is None else parse_size(config.cache_limit),
    }
    worker = WorkerOptions(
        memory_limit=config.memory_limit,
        max_context=config.max_context,
        idle_unload_s=config.idle_unload,
        limits=Limits(running=config.max_running),
        engine=engine,
    )
    return SupervisorOptions(
        worker=worker, max_queue=config.max_queue, request_timeout_s=config.request_timeout
    )


def _log_event(event: Event) -> None:
    """Write what the engine process has to say into the log."""
    if isinstance(event, Notice):
        level = logging.WARNING if event.level == "warning" else logging.INFO
        logging.getLogger("optiq.engine").log(level, "%s", event.text)


def serve(service: Managed, config: ServeConfig, announce: Callable[[str], None]) -> int:
    """Serve until a signal says to stop.

    Args:
        service: not yet started.
        config: where to listen, and to whom.
        announce: called with the URL when connections are taken.

    Returns:
        Exit status: 0 after a signal, 130 after a second one.

    Raises:
        UsageError: if the address cannot be listened at, or what is to be served cannot be.
        EngineFailure: if the engine cannot start.
    """
    log_to_stderr(as_json=config.log_json)
    app = create_app(service, config)
    with listen(config.host, config.port) as listener:
        return asyncio.run(_Life(service, app, config).run(listener, announce))


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; it listens when the server does.

    Raises:
        UsageError: if the address is not of this machine, or the port is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"--host {host} is no address of this machine: {error}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise UsageError(
            f"{host}:{port} cannot be listened at ({reason.lower()}); give another --port, or 0 "
            "for any free one"
        ) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """The address of a socket as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_to_stderr(*, as_json: bool) -> None:
    """Send the log of requests and of faults to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(as_json=as_json))
    for name, level in (("optiq", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class Server(uvicorn.Server):
    """A server that leaves signals to us: they drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """No signals."""
        yield


class _Life:
    """One run of the server."""

    def __init__(self, service: Managed, app: App, config: ServeConfig) -> None:
        self._service, self._app, self._config = service, app, config
        self._first, self._second = asyncio.Event(), asyncio.Event()

    async def run(self, listener: socket.socket, announce: Callable[[str], None]) -> int:
        """From the start to the end; the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        server = Server(uvicorn_config(self._app))
        second = asyncio.create_task(self._second.wait())
        main = asyncio.create_task(self._main(server, listener, announce))
        await asyncio.wait({main, second}, return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if main.done():
            main.result()
            return 0
        main.cancel()
        await asyncio.wait({main})
        return EXIT_INTERRUPTED

    def _signalled(self) -> None:
        (self._second if self._first.is_set() else self._first).set()

    async def _main(
        self, server: Server, listener: socket.socket, announce: Callable[[str], None]
    ) -> None:
        starting = asyncio.create_task(self._service.start())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        told = asyncio.create_task(self._first.wait())
        try:
            announce(url_of(listener))
            await asyncio.wait({starting, serving, told}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()  # what cannot be loaded ends the server
                await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
            self._app.state.draining = True
            await self._service.drain(self._config.drain)
        finally:
            starting.cancel()
            told.cancel()
            await self._service.close()  # ends the streams that are left, with an error event
            await self._stop(server, serving)

    async def _stop(self, server: Server, serving: asyncio.Task[None]) -> None:
        """Let what is written reach its readers; not after a second signal."""
        server.should_exit = True
        if self._second.is_set():
            serving.cancel()
        await asyncio.wait({serving})


def uvicorn_config(app: App) -> uvicorn.Config:
    """How uvicorn runs an application of ours."""
    return uvicorn.Config(
        app,
        http="h11",  # strict about what is one request and what is two
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,  # `access` has its own
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_FLUSH_S,
    )
