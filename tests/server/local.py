"""A server in a thread, and answers of the wire as they are."""

import asyncio
import contextlib
import socket
import threading
import time

from optiq.configs import ServeConfig
from optiq.server import life
from optiq.server.app import create_app
from tests.server import echo
from tests.server.managed import ManagedService

WAIT_S = 60.0


def app_of(service=None, **options):
    """The application of a scripted service, with the routes of `echo`."""
    app = create_app(service or ManagedService(), ServeConfig(**options))
    app.include_router(echo.router)
    return app


@contextlib.contextmanager
def listening(app):
    """The port at which an application is served."""
    listener = life.listen("127.0.0.1", 0)
    server = life.Server(life.uvicorn_config(app))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


def spoken(port, *parts):
    """What the server says to bytes, until it closes the connection or one answer is complete."""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
        for part in parts:
            with contextlib.suppress(ConnectionError):
                connection.sendall(part)
        return read_answer(connection)


def read_answer(connection):
    """Status, headers and body of an answer."""
    reader = connection.makefile("rb")
    status = int(reader.readline().split()[1])
    headers = {}
    while (line := reader.readline().strip()) != b"":
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, reader.read(int(headers["content-length"]))


def until(condition):
    """Wait for a condition."""
    end = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found
